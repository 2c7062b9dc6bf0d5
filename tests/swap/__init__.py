"""Real swap to a mount: machine-wide, so these run alone and one after the other."""
