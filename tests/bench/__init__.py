"""Tests of the measures: that they run, and that their shape holds."""
