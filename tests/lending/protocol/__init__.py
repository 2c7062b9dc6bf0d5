"""Tests of messages and frames."""
