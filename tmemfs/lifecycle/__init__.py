"""The life of a mount as a process, and talking with one that runs."""
