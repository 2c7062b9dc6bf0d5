"""Untrusted text is printed on one line, without control characters."""

from __future__ import annotations

import io
import logging
import os

import click
import pytest
from rich.console import Console
from rich.text import Text

from tmemcommon.commandline import run, say
from tmemcommon.texts import LogFormatter, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/mnt/Fotos für Zoë/日本 1", "/mnt/Fotos für Zoë/日本 1"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("one\ntwo\r\tthree", "one\\ntwo\\r\\tthree"),
        ("\x9b31m\x7f\u2028", "\\x9b31m\\x7f\\u2028"),
        ("fdp\u202etxt", "fdp\\u202etxt"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("\ud800", "\\ud800"),
        ("[red]a[/]\\", "[red]a[/]\\"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.isprintable()
    shown.encode()


def test_a_shortened_text_keeps_both_ends() -> None:
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefghi", 8) == "abcd…ghi"
    assert [shortened("abc", most) for most in (1, 2)] == ["…", "a…"]


def test_an_error_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    say("'/mnt/\x1b[31m\nroot: done\udcff' is in use:\n  end what uses it")
    assert capsys.readouterr().err == "tmemfs: '/mnt/\\x1b[31m root: done\\xff' is in use: end what uses it\n"


def test_a_terminal_without_unicode_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, "ascii", write_through=True))
    monkeypatch.setattr("sys.argv", ["show"])

    @click.command
    def command() -> None:
        Console(width=80).print(Text("/mnt/日本"))

    with pytest.raises(SystemExit) as end:
        run(command, "show")
    assert (end.value.code, screen.getvalue()) == (0, b"/mnt/\\u65e5\\u672c\n")


def test_a_newline_in_a_name_starts_no_line_in_the_log() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("'%s' cannot be read", "a\n2026-01-01 INFO all is well\x1b[2J\udce9")
    try:
        raise ValueError("x")
    except ValueError:
        log.exception("failed")
    first, second, *traceback = stream.getvalue().splitlines()
    assert first == "WARNING 'a\\n2026-01-01 INFO all is well\\x1b[2J\\xe9' cannot be read"
    assert second == "ERROR failed"
    assert traceback[0].startswith("Traceback")
    stream.getvalue().encode()
