"""Measurements: each module is one, runnable by `python -m bench.NAME`; `python -m bench` runs all of them."""
