"""The swap-like file, without and with a mount."""
