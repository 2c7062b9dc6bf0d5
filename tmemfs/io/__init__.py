"""Content: open files, and the paths that read and write them."""
