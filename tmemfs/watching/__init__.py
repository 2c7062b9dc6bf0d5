"""What others change in the backing, seen at once."""
