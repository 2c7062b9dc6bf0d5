"""The process of a mount: forked before anything is opened, heard over a pipe, then left alone."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path

from tmemcommon.logwriter import LogFile, LogWriter
from tmemcommon.texts import LogFormatter
from tmemfs import processmemory
from tmemfs.config import ConfigError, MountConfig
from tmemfs.statefiles import mount_name, state_directory

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_READY = b"\0ready"

Ready = Callable[[], None]


def default_log_file(mountpoint: Path) -> Path:
    """Choose where a mount in the background logs to."""
    directory = Path("/var/log/tmemfs") if os.geteuid() == 0 else state_directory()
    return directory / f"{mount_name(mountpoint)}.log"


def start_log(config: MountConfig) -> LogFile | None:
    """Send the log to its file; in the foreground without --log to stderr (None). Raises ConfigError."""
    path = config.log_file
    if path is None and not config.foreground:
        path = default_log_file(config.mountpoint)
    file = None
    if path is not None:
        try:
            if config.log_file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
            file = LogFile(path)
        except OSError as error:
            raise ConfigError(
                f"log file '{path}' cannot be written: {error.strerror}; give another with --log FILE"
            ) from None
    handler = file or LogWriter.to_stderr()
    handler.setFormatter(LogFormatter(_FORMAT))
    logging.basicConfig(level=logging.DEBUG if config.debug else logging.INFO, handlers=[handler], force=True)
    return file


def prepare_process(config: MountConfig) -> None:
    """Set what a file server needs: many descriptors, and modes that are not masked twice; memory that stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0)
    if config.hswap_bytes:
        processmemory.lock_process_memory()


def in_background(serve: Callable[[Ready], int]) -> str | None:
    """Run `serve` in a child that detaches from the terminal once it calls its argument.

    Returns None then, in the parent, and what went wrong (one line) if the child ended before. Whatever the
    child prints until then reaches the terminal.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _be_child(serve, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        report = pipe.read()
    if report == _READY:
        return None
    _, status = os.waitpid(pid, 0)
    if report:
        return report.decode(errors="surrogateescape")
    return f"the mount process ended unexpectedly ({_describe(status)}): look into its log"


def _be_child(serve: Callable[[Ready], int], write_end: int) -> None:
    """Run `serve` and end the process with its status; never return into the parent's code."""
    status = 1
    # What the caller has open is none of ours: the lock of a flock(1), for instance, would be held as long as we live.
    os.closerange(3, write_end)
    os.closerange(write_end + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    try:
        status = serve(lambda: _detach(write_end))
    except ConfigError as error:
        os.write(write_end, str(error).encode(errors="surrogateescape"))
        status = 2
    except BaseException:
        logging.getLogger(__name__).exception("the mount process failed")
    finally:
        logging.shutdown()
        os._exit(status)


def _detach(write_end: int) -> None:
    """Leave the terminal and tell the parent that the mount works."""
    os.setsid()
    # The mount must not keep another filesystem busy.
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(write_end, _READY)
    os.close(write_end)


def _describe(status: int) -> str:
    """Put a wait status into words."""
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"status {code}"
