"""Real applications on a mount that constantly evicts pages."""
