"""Transcendent memory in user space, for any directory."""

__version__ = "0.1.0"
