"""swapon and swapoff: what they refuse, the messages, and that a failed step leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REAL, environment
from tests.swap.swapped import SwappedMount, fake_tool
from tmemfs.lifecycle import loopswap

pytestmark = [pytest.mark.mount, pytest.mark.root, pytest.mark.timeout(900)]


def test_a_mount_in_use_as_swap_is_not_unmounted(swapped: SwappedMount) -> None:
    swapped.start()
    for options in ((), ("--lazy",)):
        done = swapped.command("umount", *options)
        assert done.returncode == 1
        assert f"run tmemfs swapoff {swapped.place.mountpoint} first" in done.stderr
    assert swapped.place.is_mounted()
    assert swapped.command("swapoff").returncode == 0
    assert swapped.stats()["hswap_pool_pages"] == 0


def test_a_second_swapon_and_a_second_swapoff_are_refused(swapped: SwappedMount) -> None:
    swapped.start()
    again = swapped.command("swapon")
    assert again.returncode == 1
    assert "is in use as swap already" in again.stderr
    assert len(loopswap.loop_devices_of(swapped.file)) == 1
    assert swapped.command("swapoff").returncode == 0
    off = swapped.command("swapoff")
    assert off.returncode == 1
    assert "is not in use as swap" in off.stderr
    assert swapped.command("swapon").returncode == 0, "and it can be swapped to again"


def test_swapon_reserves_the_space_of_the_overflow_file(swapped: SwappedMount) -> None:
    swapped.start(swap=False)
    sparse = swapped.overflow.stat().st_blocks * 512
    assert swapped.command("swapon").returncode == 0
    assert sparse < 1 << 20
    assert swapped.overflow.stat().st_blocks * 512 >= 128 << 20


@pytest.mark.parametrize("tool", ["losetup", "mkswap", "swapon"])
def test_a_failed_step_leaves_nothing_behind(swapped: SwappedMount, tool: str) -> None:
    swapped.start(swap=False)
    tools = swapped.place.log.with_name("tools")
    tools.mkdir()
    fake_tool(tools, tool)
    done = subprocess.run(
        [*REAL, "swapon", os.fspath(swapped.place.mountpoint)],
        env=environment(PATH=f"{tools}:{os.environ['PATH']}"),
        check=False,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"tmemfs: {tool}: not today")
    assert len(done.stderr.splitlines()) == 1
    assert not loopswap.loop_devices_of(swapped.file)
    assert swapped.command("umount").returncode == 0
    assert swapped.mounted.process is not None
    swapped.mounted.process.wait(30)
    swapped.mounted.process = None


def test_swapon_refuses_a_mount_without_an_hswap_file(swapped: SwappedMount) -> None:
    swapped.mounted.start()
    done = swapped.command("swapon")
    assert done.returncode == 2
    assert "has no hswap file: mount it with --hswap SIZE" in done.stderr


def test_swapon_refuses_an_overflow_file_in_memory(swapped: SwappedMount) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        swapped.overflow = Path(memory) / "overflow"
        swapped.start(swap=False)
        done = swapped.command("swapon")
        assert done.returncode == 2
        assert "can be swapped out itself: give --hswap-overflow on a disk" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        swapped.end()


def test_swapon_refuses_an_overflow_file_without_enough_disk_space(swapped: SwappedMount) -> None:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is missing")
    image, disk = (swapped.place.log.with_name(name) for name in ("image", "disk"))
    with image.open("wb") as file:
        file.truncate(96 << 20)
    disk.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True, timeout=60)
    try:
        swapped.overflow = disk / "overflow"
        swapped.start("--pool", "56M", swap=False)
        free = shutil.disk_usage(disk).free
        (disk / "others").write_bytes(bytes(48 << 20))  # after the mount has looked
        done = swapped.command("swapon")
        assert done.returncode == 1
        assert "cannot get its disk space: No space left on device; give --hswap-overflow on a" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert shutil.disk_usage(disk).free > free - (49 << 20), "nothing was taken by trying"
        swapped.end()
    finally:
        subprocess.run(["umount", "-l", disk], check=True, timeout=60)
