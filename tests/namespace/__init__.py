"""Tests of inodes and descriptors."""
