"""Tests of the swap-like file, without and with a mount."""
