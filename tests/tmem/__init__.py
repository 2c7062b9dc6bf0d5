"""Tests of the pool: the contract as a conformance suite, and the modules below it."""
