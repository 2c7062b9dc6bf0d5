"""The tests of tmemfs."""
