"""Torture: random operations on a mount and on a plain directory, compared one by one."""
