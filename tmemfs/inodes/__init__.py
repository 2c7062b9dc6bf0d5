"""What the kernel knows by number: inodes, their versions and descriptors."""
