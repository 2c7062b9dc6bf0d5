"""The swap-like file, whose pages are in the persistent pool or in the overflow file."""
