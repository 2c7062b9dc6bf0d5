"""Real applications on a mount whose pages are evicted all the time."""
