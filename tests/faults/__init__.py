"""Faults around a mount, and their effects on it."""
