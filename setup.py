"""Describe the extension; everything else is in pyproject.toml."""

from setuptools import setup

# The extension uses the stable interface of Python 3.11 only: one wheel is for all later ones.
setup(cffi_modules=["backend/engine/build.py:make_ffi"], options={"bdist_wheel": {"py_limited_api": "cp311"}})
