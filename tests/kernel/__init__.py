"""Tests of the handshake and of notifications to the kernel."""
