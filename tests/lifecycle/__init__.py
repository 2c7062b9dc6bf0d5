"""Tests of mounts as processes."""
