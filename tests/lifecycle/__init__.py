"""Tests of the process of a mount and of the commands."""
