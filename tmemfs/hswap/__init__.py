"""The swap-like file, whose pages live in the persistent pool."""
