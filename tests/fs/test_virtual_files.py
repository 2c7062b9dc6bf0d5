"""The kernel's virtual filesystems as sources: their files are shorter or longer than their sizes say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mounted import Mounted

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("name", ["/proc/sys/kernel/hostname", "/sys/class/net/lo/address", "/proc/net/protocols"])
def test_a_file_of_proc_is_read_whole(mounted: Mounted, name: str, tmp_path: Path) -> None:
    path = Path(name)
    if not path.exists():
        pytest.skip(f"missing: {name}")
    mounted.place.source = path.parent
    root = mounted.start("--throttle", "latency=20us")
    for _ in range(2):
        assert (root / path.name).read_bytes() == path.read_bytes()
    with (root / path.name).open("rb", buffering=0) as file:
        assert b"".join(iter(lambda: file.read(7), b"")) == path.read_bytes()
