"""Tests of what the pool, tmemd and the mounts share."""
