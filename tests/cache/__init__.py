"""Tests of the cache and the way into the pool."""
