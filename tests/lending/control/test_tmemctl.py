"""tmemctl as a person meets it: tables, verbs, and errors of one line."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from tests.conftest import run, wait_until
from tests.lending.conftest import MakeGuest
from tests.lending.fakeguest import Denied
from tests.lending.otheruser import OTHER_UID, as_other
from tests.lending.tmemd import Tmemd, one_line
from tmem.lending.control.tables import render
from tmem.lending.protocol.messages import MAX_TEXT, Row, guest_name
from tmemcommon.sizes import ram_bytes
from tmemfs import __version__


def fine(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


TOTALS = dict.fromkeys(("size_bytes", "ephemeral_bytes", "persistent_bytes", "promised_bytes", "reserved_bytes"), 0)
TOTALS |= {"guests": 0, "connected": 0}


def console_of(width: int, height: int = 24) -> Console:
    return Console(width=width, height=height, file=io.StringIO())


def shown_by(made: RenderableType, console: Console) -> str:
    console.print(made)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_list_shows_each_guest_and_the_sum(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    guest(name="/mnt/photos").join().ask_until(32)
    guest(name="/mnt/mail", persistent=16).join().ask_until(16, persistent=True)
    text = fine(tmemd.ctl("list"))
    photos, mail = (next(line for line in text.splitlines() if name in line) for name in ("/mnt/photos", "/mnt/mail"))
    assert re.search(r"connected\s+2M\s+-\s", photos)
    assert re.search(r"connected\s+1M\s+1M/1M\s", mail)
    assert text.index("/mnt/photos") < text.index("/mnt/mail"), "who holds most is first"
    assert "3M of 16M" in text
    rows = {row["name"]: row for row in json.loads(fine(tmemd.ctl("list", "--json")))}
    assert rows["/mnt/photos"]["ephemeral_bytes"] == 32 << 16
    assert rows["/mnt/mail"]["pid"] == os.getpid()


def test_a_narrow_terminal_shows_less_and_all_of_it() -> None:
    row = Row(7, "/mnt/photos", 0, 12345, "connected", *(1000, 64, 16), 1.0, 1000, 0, 500, 4.5, *[9000] * 7)
    shown = {}
    for width in (80, 200):
        shown[width] = shown_by(render([row] * 2, TOTALS, console := console_of(width), all_rows=True), console)
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown[width]
        assert re.search(r" 7 .*/mnt/photos .*connected +5M +1M/31.2M .*4.5s", shown[width])
    assert "weight" in shown[200]
    assert "no room for" not in shown[200]
    heads, left_out = shown[80].splitlines()[1], re.search("no room for (.*): tmemctl list --json", shown[80])
    assert left_out is not None
    names = left_out[1].split(", ")
    assert {"revoked", "taken"} <= set(names), "what is least of use goes first"
    assert set(names) | set(heads.split()) == set(shown[200].splitlines()[1].split())
    assert not set(names) & set(heads.split())


def test_more_guests_than_the_terminal_has_lines_are_counted() -> None:
    rows = [Row(n, f"/mnt/{n}", 0, n, "connected", 1000, n, 0, 1.0, 1000, 0, 0, 4.5, *[9000] * 7) for n in range(100)]
    console = console_of(200, 24)
    lines = shown_by(render(rows, TOTALS, console, all_rows=False), console).splitlines()
    seen = [line for line in lines if "/mnt/" in line]
    assert len(lines) < 24
    assert "/mnt/99" in seen[0], "who holds most is first"
    assert f"{100 - len(seen)} more guests, which hold less: tmemctl list" in lines


def test_what_a_strange_tmemd_says_is_shown_as_text() -> None:
    row = Row(7, "\x1b[2J[/]", 0, 12345, "[/]\x1b[31m", *(1000, 64, 16), 1.0, 1000, 0, 500, 4.5, *[9000] * 7)
    text = shown_by(render([row], TOTALS, console := console_of(200), all_rows=True), console)
    assert "\x1b" not in text
    assert "\\x1b[2J[/]" in text
    assert "[/]\\x1b[31m" in text


def test_list_is_a_table_also_without_guests(tmemd: Tmemd) -> None:
    tmemd.start("16M")
    assert "0 of 16M" in fine(tmemd.ctl("list"))
    assert json.loads(fine(tmemd.ctl("list", "--json"))) == []


def test_a_name_cannot_move_the_cursor_or_style_the_table(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    guest(name="/mnt/\x1b[2J[red]x[/red]\n\rend").join()
    text = fine(tmemd.ctl("list"))
    assert "\x1b" not in text
    assert "[red]x[/red]" in text
    assert len([line for line in text.splitlines() if "/mnt/" in line]) == 1


def test_a_guest_with_a_name_of_any_length_is_found_or_missed_in_one_line(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    path = "/mnt/" + "d" * 1000
    guest(name=guest_name(path)).join()
    fine(tmemd.ctl("set", path, "--weight", "2"))
    assert tmemd.rows()[0]["weight"] == 2
    for name in ("/mnt/" + "e" * MAX_TEXT, "/mnt/" + "e" * 4000, "/mnt/\udcff", "9" * 1000):
        line = one_line(tmemd.ctl("drain", name), 1)
        assert "there is no guest" in line
        assert line.endswith("tmemctl list shows them")


def test_limits_are_set_and_told(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one = guest(name="/mnt/a", persistent=32).join()
    one.ask_until(100)
    words = ("--weight", "2.5", "--cap", "4M", "--floor", "1M", "--persistent-cap", "512K")
    fine(tmemd.ctl("set", "/mnt/a", *words))
    (row,) = tmemd.rows()
    assert (row["weight"], row["cap_bytes"], row["floor_bytes"]) == (2.5, 4 << 20, 1 << 20)
    assert row["persistent_cap_bytes"] == 512 << 10
    wait_until(lambda: tmemd.rows()[0]["ephemeral_bytes"] <= 4 << 20, "what exceeds the cap is taken back")
    wait_until(lambda: one.populated_slabs() <= 64, "and is punched")
    one.settle()
    assert one.limits is not None
    assert (one.limits.cap, one.limits.persistent_cap) == (64, 8)
    fine(tmemd.ctl("set", str(one.number), "--floor", "0"))
    assert tmemd.rows()[0]["floor_bytes"] == 0


def test_freeze_stops_lending_and_thaw_resumes_it(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one, two = guest(name="/mnt/a").join(), guest(name="/mnt/b").join()
    fine(tmemd.ctl("freeze", "/mnt/a"))
    with pytest.raises(Denied, match="frozen"):
        one.ask(1)
    assert one.limits is not None
    assert one.limits.frozen
    assert two.ask(1)
    fine(tmemd.ctl("freeze"))
    with pytest.raises(Denied, match="frozen"):
        two.ask(1)
    fine(tmemd.ctl("thaw"))
    assert one.ask(1)
    assert two.ask(1)


def test_revoke_and_drain_take_back(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one = guest(name="/mnt/a").join()
    one.ask_until(100)
    fine(tmemd.ctl("revoke", "/mnt/a", "1M"))
    wait_until(lambda: one.populated_slabs() == 84, "1 MiB is taken back")
    fine(tmemd.ctl("drain", "/mnt/a"))
    wait_until(lambda: one.populated_slabs() == 0, "all is taken back")
    with pytest.raises(Denied, match="drained"):
        one.ask(1)
    fine(tmemd.ctl("thaw", os.path.relpath("/mnt/a")))
    assert one.ask(1)
    wait_until(lambda: "Drain(guest='/mnt/a')" in tmemd.log_text(), "the log says so")


def test_a_persistent_slab_is_asked_for_and_not_taken(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one = guest(name="/mnt/a", persistent=32).join()
    one.ask_until(20, persistent=True)
    fine(tmemd.ctl("revoke", "/mnt/a", "512K", "--persistent"))
    fine(tmemd.ctl("drain", "/mnt/a"))
    assert one.populated_slabs() == 20
    assert one.answer_revoke() == 8
    wait_until(lambda: one.populated_slabs() == 12, "what it gave is punched")


def test_resize_goes_both_ways(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    one = guest().join()
    one.ask_until(256)
    assert "the size is 4M" in fine(tmemd.ctl("resize", "4M"))
    wait_until(lambda: one.populated_slabs() <= 64, "the guest fits again")
    two = guest().join()
    fine(tmemd.ctl("resize", "32M"))
    two.ask_until(256)
    assert tmemd.totals()["size_bytes"] == 32 << 20


def test_stats_are_names_and_numbers(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    guest().join().ask_until(10)
    counters = json.loads(fine(tmemd.ctl("stats", "--json")))
    assert counters["ephemeral_bytes"] == 10 << 16
    assert counters["lent_slabs"] == 10
    assert counters["cut_off_malformed"] == 0
    lines = dict(line.split() for line in fine(tmemd.ctl("stats")).splitlines())
    assert lines.keys() == counters.keys()
    assert lines["ephemeral_bytes"] == str(10 << 16)


def test_watch_looks_again(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    guest(name="/mnt/a").join()
    shown = fine(tmemd.ctl("watch", "--interval", "100ms", "--count", "3"))
    assert shown.count("/mnt/a") == 3, "a pipe gets each look"


# -- errors ----------------------------------------------------------------------------------------------------------


def test_without_tmemd_the_socket_is_named_and_how_to_start_one(tmemd: Tmemd) -> None:
    for word in ("list", "stats", "watch"):
        line = one_line(tmemd.ctl(word))
        assert f"'{tmemd.socket}'" in line
        assert "tmemd --size" in line


BAD_INPUT = (
    (("set", "/mnt/none", "--weight", "2"), 1, "/mnt/none"),
    (("set", "99", "--weight", "2"), 1, "99"),
    (("drain", "/mnt/none"), 1, "tmemctl list"),
    (("set", "/mnt/a"), 2, "--weight"),
    (("freeze", ""), 2, "no guest is named"),
    (("set", "/mnt/a", "--weight", "0"), 2, "weight"),
    (("set", "/mnt/a", "--weight", "nan"), 2, "weight"),
    (("set", "/mnt/a", "--weight", "lots"), 2, "weight"),
    (("set", "/mnt/a", "--cap", "12Q"), 2, "--cap"),
    (("set", "/mnt/a", "--floor", "2M", "--cap", "1M"), 1, "floor"),
    (("set", "/mnt/a", "--floor", "64M"), 1, "floor"),
    (("revoke", "/mnt/a", "nothing"), 2, "nothing"),
    (("revoke", "/mnt/a"), 2, "SIZE"),
    (("resize", "0"), 2, "zero"),
    (("resize", "1000T"), 2, "1000T"),
    (("resize", "1T"), 2, "more than all RAM: give at most"),
    (("set", "/mnt/a", "--cap", "0"), 1, "tmemctl drain"),
    (("explode",), 2, "explode"),
)


def test_bad_input_is_one_line(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M")
    guest(name="/mnt/a").join()
    for words, code, hint in BAD_INPUT:
        assert hint in one_line(tmemd.ctl(*words), code)
    assert tmemd.totals()["size_bytes"] == 16 << 20
    assert tmemd.rows()[0]["cap_bytes"] == 256 << 16


def test_every_size_that_is_too_large_is_refused_with_the_same_code(tmemd: Tmemd) -> None:
    tmemd.start("16M")
    too_large = f"{2 * ram_bytes() >> 20}M"
    for size in (too_large, "1T", "1000T"):
        assert "give at most" in one_line(tmemd.ctl("resize", size), 2)
    assert tmemd.totals()["size_bytes"] == 16 << 20


@pytest.mark.root
def test_guests_of_others_are_invisible_and_untouchable(tmemd: Tmemd, guest: MakeGuest) -> None:
    tmemd.start("16M", "--mode", "0666")
    guest(name="/mnt/roots").join().ask_until(4)

    def other() -> None:
        assert tmemd.rows() == []
        mine = guest(name="/mnt/mine").join()
        mine.ask_until(2)
        assert [row["name"] for row in tmemd.rows()] == ["/mnt/mine"]
        for words in (
            ("set", "/mnt/roots", "--weight", "2"),
            ("set", "/mnt/mine", "--weight", "2"),
            ("freeze",),
            ("thaw",),
            ("drain", "/mnt/roots"),
            ("revoke", "/mnt/roots", "64K"),
            ("resize", "1M"),
        ):
            assert "root" in one_line(tmemd.ctl(*words), 1)

    as_other(other)
    held = {row["name"]: row["ephemeral_bytes"] for row in tmemd.rows()}
    assert held["/mnt/roots"] == 4 << 16


@pytest.mark.root
def test_the_mode_of_the_socket_decides_who_may_connect(tmemd: Tmemd) -> None:
    tmemd.start("16M", "--mode", "0600")
    as_other(lambda: print(one_line(tmemd.ctl("list"))))
    tmemd.stop()
    tmemd.start("16M", "--mode", "0660", "--group", str(OTHER_UID))
    fine(tmemd.ctl("list"))  # imports what shows a table
    as_other(lambda: print(fine(tmemd.ctl("list"))))


def test_the_commands_are_installed_and_show_help() -> None:
    for name in ("tmemd", "tmemctl"):
        program = Path(sys.executable).with_name(name)
        if not program.exists():
            pytest.skip(f"{name} is not installed beside this Python: run make setup")
        assert "Usage: " + name in fine(run(program, "--help"))
        assert fine(run(program, "--version")) == f"{name}, version {__version__}\n"


def test_help_names_every_verb(tmemd: Tmemd) -> None:
    text = fine(tmemd.ctl("--help"))
    for verb in ("list", "set", "freeze", "thaw", "revoke", "drain", "evict", "resize", "stats", "watch"):
        assert f"\n  {verb} " in text
