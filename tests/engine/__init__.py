"""Tests of the engine in C, without Python: random operations against models, and real threads."""
