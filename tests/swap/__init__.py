"""Tests with real swap to a mount. Swap is machine-wide, so they run alone and one at a time."""
