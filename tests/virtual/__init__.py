"""Tests of the control files."""
