"""Inodes, their versions and their descriptors."""
