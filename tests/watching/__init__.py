"""Tests of --watch."""
