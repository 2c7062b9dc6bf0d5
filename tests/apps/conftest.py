"""Fixtures of the application tests."""

from __future__ import annotations

import pytest

from tests.mounted import VARIANTS
from tests.public_place import mounted, open_place

__all__ = ["mounted", "open_place", "writing"]


@pytest.fixture(params=["through", "writeback"])
def writing(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Give the options of both ways of writing, with a pool that is too small as well."""
    return ("--pool", "512K", *VARIANTS[request.param])
