"""Tests of names, attributes and listings."""
