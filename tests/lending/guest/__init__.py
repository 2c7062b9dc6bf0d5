"""Tests of the guest's side of lending."""
