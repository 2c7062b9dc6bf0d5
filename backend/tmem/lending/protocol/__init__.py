"""The messages between mounts, tmemctl and tmemd."""
