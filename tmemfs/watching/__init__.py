"""Detection of changes that others make in the backing."""
