"""Tests of the lender, which has no I/O and no clock."""
