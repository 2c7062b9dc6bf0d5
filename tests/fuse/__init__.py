"""Tests of what stands behind the requests."""
