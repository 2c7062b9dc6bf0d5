"""Caches, pools and divisions that are computed, not mounted."""
