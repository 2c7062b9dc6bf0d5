"""Tests of tmemd's process."""
