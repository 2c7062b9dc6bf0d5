"""Lending: one daemon holds the memory of many pools, and lends it out slab by slab."""
