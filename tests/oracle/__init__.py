"""Pool and page cache in Python: the oracles that the engine is compared with, and the tests of their parts."""
