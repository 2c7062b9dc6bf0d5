"""What mounts, tmemctl and tmemd say to each other."""
