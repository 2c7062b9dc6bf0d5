"""Fixtures of the application tests."""

from __future__ import annotations

import pytest

from tests.mounted import VARIANTS
from tests.public_place import mounted, open_place

__all__ = ["mounted", "open_place", "writing"]


@pytest.fixture(params=["through", "writeback"])
def writing(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the options of write-through, write-back and a pool that is too small."""
    return ("--pool", "512K", *VARIANTS[request.param])
