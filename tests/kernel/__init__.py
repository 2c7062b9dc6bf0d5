"""Tests of the handshake and of what the kernel is told."""
