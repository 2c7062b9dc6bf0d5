"""What goes wrong around a mount, and what must not go wrong because of it."""
