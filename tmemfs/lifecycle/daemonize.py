"""Start the process of a mount: fork, log, resource limits, detach from the terminal.

The fork comes before anything is opened. A pipe tells the parent that the mount works, or why it does not.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable
from pathlib import Path

from tmemcommon.logwriter import LogFile, LogWriter
from tmemcommon.sizes import ConfigError
from tmemcommon.texts import LogFormatter
from tmemfs import processmemory
from tmemfs.config import MountConfig
from tmemfs.statefiles import mount_name, state_directory

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_READY = b"\0ready"

Ready = Callable[[], None]


def default_log_file(mountpoint: Path) -> Path:
    """Return the log file of a mount in the background."""
    directory = Path("/var/log/tmemfs") if os.geteuid() == 0 else state_directory()
    return directory / f"{mount_name(mountpoint)}.log"


def start_log(config: MountConfig) -> LogFile | None:
    """Start the log; return its file, or None if it goes to stderr (--foreground without --log). Raises ConfigError."""
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
    """Raise the limit of descriptors, clear the umask (the kernel applies the caller's), lock memory for an hswap."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0)
    if config.hswap_bytes:
        processmemory.lock_process_memory()


def run_in_background(serve: Callable[[Ready], int]) -> str | None:
    """Run `serve` in a child process, which detaches from the terminal when `serve` calls its argument.

    The parent returns None then, or an error of one line if the child ended before. What the child prints until then
    reaches the terminal.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _run_child(serve, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        report = pipe.read()
    if report == _READY:
        return None
    _, status = os.waitpid(pid, 0)
    if report:
        return report.decode(errors="surrogateescape")
    return f"the mount process ended unexpectedly ({_describe(status)}): see its log"


def _run_child(serve: Callable[[Ready], int], write_end: int) -> None:
    """Run `serve` and exit with its status. It never returns into the parent's code."""
    status = 1
    # Inherited descriptors would stay open as long as the mount: the lock of a flock(1), for instance.
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
    """Detach from the terminal and tell the parent that the mount works."""
    os.setsid()
    os.chdir("/")  # so that no other filesystem is kept busy
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(write_end, _READY)
    os.close(write_end)


def _describe(status: int) -> str:
    """Describe a wait status."""
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"status {code}"
