"""Shared by all commands: option types with units, and errors as one line and an exit code."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from tmemcommon.sizes import ConfigError, parse_duration, parse_size
from tmemcommon.texts import printable

EXIT_FAILED = 1
EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """A correct command failed; the message is one line."""

    exit_code = EXIT_FAILED


class Text(click.ParamType[Any]):
    """An option type whose parser raises ConfigError."""

    def __init__(self, name: str, parse: Callable[[str], object]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse text; return a default as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ConfigError as error:
            where = f"{param.opts[0]}: " if param is not None and param.opts[0].startswith("-") else ""
            raise ConfigError(f"{where}{error}") from None


SIZE = Text("SIZE", parse_size)
DURATION = Text("DURATION", parse_duration)


def say(message: str, program: str = "tmemfs") -> None:
    """Print one line to stderr."""
    print(f"{program}: {printable(' '.join(message.split()))}", file=sys.stderr, flush=True)


def run(command: click.Command, program: str) -> NoReturn:
    """Run a command and exit. An error is one line on stderr; a usage error has exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack characters of a name
    try:
        code = command.main(prog_name=program, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = EXIT_USAGE
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command_path = context.command_path if context is not None else program
        say(f"{error.format_message()}: see {command_path} --help".replace(".: see", ": see"), program)
        code = EXIT_USAGE
    except ConfigError as error:
        say(str(error), program)
        code = EXIT_USAGE
    except CommandError as error:
        say(str(error), program)
        code = error.exit_code
    except OSError as error:
        say(f"{error.filename or 'error'}: {error.strerror or error}", program)
        code = EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        code = _EXIT_INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)
