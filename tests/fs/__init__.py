"""Tests of whole mounts."""
