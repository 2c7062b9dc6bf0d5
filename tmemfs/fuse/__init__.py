"""The FUSE request handlers, and the replies to the kernel."""
