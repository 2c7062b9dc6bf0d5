"""The lifecycle of one mount: checks, fork, serving, signals, the end.

The order of the end loses no data. The mount is unmounted while it is still served, so that the kernel can send the
dirty pages of its own. When the connection is over, no new dirty pages can come, and ours are written back. Then the
process ends. A second signal makes every request fail, but dirty pages are still written. A third one ends the process
at once.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator

import trio

from tmemcommon.commandline import EXIT_FAILED, EXIT_USAGE, say
from tmemcommon.logwriter import LogFile
from tmemcommon.sizes import ConfigError
from tmemfs.config import MountConfig
from tmemfs.guest import Guest
from tmemfs.kernel.kernelmount import abort, unmount
from tmemfs.kernel.mounttable import is_tmemfs, top_mount
from tmemfs.kernel.session import Session
from tmemfs.lifecycle.controlserver import ControlServer
from tmemfs.lifecycle.daemonize import Ready, prepare_process, run_in_background, start_log
from tmemfs.lifecycle.loopswap import SwapError, swap_devices_of, swap_off
from tmemfs.lifecycle.preflight import prepare

log = logging.getLogger(__name__)

_STUCK_SECONDS = 5.0  # the end waits no longer for threads that hang in the backing: they cannot be cancelled


def mount(config: MountConfig) -> int:
    """Mount and serve, in the foreground or in a child process; return the exit code."""
    if config.foreground:
        try:
            return _run(config, lambda: None)
        except ConfigError as error:
            say(str(error))
            return EXIT_USAGE
    error_line = run_in_background(lambda ready: _run(config, ready))
    if error_line is not None:
        say(error_line)
        return EXIT_USAGE
    return 0


def _run(config: MountConfig, ready: Ready) -> int:
    """Check, mount and serve until the end; return the exit code. Raises ConfigError when the mount fails."""
    source_fd = prepare(config)
    log_file = start_log(config)
    prepare_process(config)
    try:
        guest = Guest(config, source_fd)
    except (OSError, MemoryError) as error:
        raise ConfigError(f"cache and pool cannot be set up: {error}; give smaller --cache and --pool") from error
    try:
        guest.connect()
        return trio.run(_Mount(config, guest, log_file, ready).serve)
    finally:
        guest.close()


class _Mount:
    """One mount while it is served."""

    def __init__(self, config: MountConfig, guest: Guest, log_file: LogFile | None, ready: Ready) -> None:
        self._config = config
        self._ready = ready
        self._log_file = log_file
        self._guest = guest
        self._device = ""
        self._socket = ControlServer(guest.control)
        self._is_ready = False
        self._status = 0
        # Not trio's default limiter: all of its threads may hang in the backing.
        self._limiter = trio.CapacityLimiter(4)
        self._log_limiter = trio.CapacityLimiter(1)  # threads that wait for the log's disk must not delay the unmount

    async def serve(self) -> int:
        """Serve from mount to end; return the exit code."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            try:
                session = Session.open(self._guest.operations, self._config)
            except (OSError, RuntimeError) as error:
                raise _mount_error(self._config, error) from error
            self._note_device()
            try:
                await self._serve_session(session, signals)
            except Exception as error:
                if not self._is_ready:
                    raise ConfigError(f"the mount failed: {_first_cause(error)}; --debug -f shows more") from error
                log.exception("the mount ended with an error")
                self._status = EXIT_FAILED
            finally:
                self._detach()
        log.info("ended")
        return self._status

    async def _serve_session(self, session: Session, signals: AsyncIterator[int]) -> None:
        """Run guest and session until the connection is over and everything is written back."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._guest.run)
            await nursery.start(session.run)
            # Again: after a failed handshake the session has mounted a second time.
            self._note_device()
            await self._open_socket(nursery)
            await self._announce(session)
            nursery.start_soon(self._obey, signals, session, nursery)
            await session.ended.wait()
            await self._socket.stop()
            self._detach()
            self._device = ""  # the next mount may get this number while dirty pages are written back
            await self._finish()
            timer = threading.Timer(_STUCK_SECONDS, os._exit, (self._status,))
            timer.daemon = True
            timer.start()
            nursery.cancel_scope.cancel()

    async def _open_socket(self, nursery: trio.Nursery) -> None:
        """Listen for commands. If that fails, mount and control files work without it."""
        try:
            path = await nursery.start(self._socket.run, self._device)
        except OSError as error:
            log.warning("no control socket: %s; commands cannot reach this mount, use its control files", error)
        else:
            log.info("control socket %s", path)

    async def _announce(self, session: Session) -> None:
        """Report that the mount works and where it logs."""
        config = self._config
        mmap = "on" if session.shared_mmap else "off"
        log.info("%s on %s, pid %d, shared mmap %s", config.source, config.mountpoint, os.getpid(), mmap)
        where = f"log {self._log_file.path}" if self._log_file is not None else "log on stderr"
        say(f"{config.source} on {config.mountpoint}, pid {os.getpid()}, {where}")
        self._is_ready = True
        if self._log_file is not None:  # the log is complete when the mount is reported
            await trio.to_thread.run_sync(self._log_file.flush, limiter=self._log_limiter)
        self._ready()

    async def _obey(self, signals: AsyncIterator[int], session: Session, nursery: trio.Nursery) -> None:
        """Unmount at the first signal, abort at the second, exit at the third. SIGHUP only reopens the log."""
        received = 0
        async for number in signals:
            if number == signal.SIGHUP:
                nursery.start_soon(self._reopen_log)
                continue
            received += 1
            log.info("%s received", signal.Signals(number).name)
            if received == 1:
                nursery.start_soon(self._unmount)
            elif received == 2 and not self._is_swapped_to():
                nursery.start_soon(self._abort, session)
            elif received == 2:
                log.error(
                    "not aborting: pages swapped to this mount would be lost; a third signal does it all the same"
                )
            else:
                log.error("ending at once: dirty pages that are not written back are lost")
                logging.shutdown()
                os._exit(EXIT_FAILED)

    async def _reopen_log(self) -> None:
        """Reopen the log file after logrotate(8) renamed it; in a thread, because opening may reach a disk."""
        if self._log_file is None:
            return
        try:
            await trio.to_thread.run_sync(self._log_file.reopen, abandon_on_cancel=True, limiter=self._log_limiter)
        except OSError as error:
            log.warning("the log cannot be reopened: %s; continuing in the old file", error)
        else:
            log.info("SIGHUP received: the log is reopened")

    async def _unmount(self) -> None:
        """Unmount while still serving. If the mount is in use, detach it and serve its last users."""
        if not self._is_mounted():
            log.info("not unmounting %s: it is covered or already detached", self._config.mountpoint)
            return
        if self._is_swapped_to() and not await self._swap_off():
            return
        try:
            await self._unmount_in_thread(lazy=False)
        except OSError as error:
            if error.errno != errno.EBUSY:
                log.warning("unmounting failed (%s): detaching instead", error.strerror)
            try:
                await self._unmount_in_thread(lazy=True)
            except OSError:
                log.exception("detaching failed")
                return
            log.info("the mount is in use: detached, serving until its last user is gone")

    def _is_swapped_to(self) -> bool:
        """Return whether the kernel swaps to this mount."""
        return bool(self._config.hswap_bytes and swap_devices_of(self._config.hswap_file))

    async def _swap_off(self) -> bool:
        """End swapping to this mount; return whether that succeeded. If not, it must stay mounted."""
        log.info("the mount is in use as swap: swapping off first")
        try:
            await trio.to_thread.run_sync(
                swap_off, self._config.hswap_file, abandon_on_cancel=True, limiter=self._limiter
            )
        except SwapError as error:
            log.error("not unmounting: %s; run tmemfs swapoff %s", error, self._config.mountpoint)
            return False
        return True

    async def _unmount_in_thread(self, *, lazy: bool) -> None:
        """Unmount in a thread: meanwhile the kernel may send requests to this process."""
        await trio.to_thread.run_sync(
            lambda: unmount(self._config.mountpoint, lazy=lazy), abandon_on_cancel=True, limiter=self._limiter
        )

    async def _abort(self, session: Session) -> None:
        """Make all requests fail, present and future, and end."""
        log.warning("aborting the connection: all requests fail from now on")
        aborted = bool(self._device) and await trio.to_thread.run_sync(
            abort, self._device, abandon_on_cancel=True, limiter=self._limiter
        )
        await trio.to_thread.run_sync(self._detach, abandon_on_cancel=True, limiter=self._limiter)
        if not aborted:
            session.cut_off()  # fusectl is not mounted here

    async def _finish(self) -> None:
        """Write back the dirty pages."""
        try:
            with trio.CancelScope(shield=True):
                await self._guest.finish()
        except OSError as error:
            log.error("not everything is written to %s: %s", self._config.source, error)
            self._status = EXIT_FAILED
        except Exception:
            log.exception("writing back to %s failed", self._config.source)
            self._status = EXIT_FAILED

    def _note_device(self) -> None:
        """Note the device number of our mount: other mounts may cover it later."""
        entry = top_mount(self._config.mountpoint)
        self._device = entry.device if entry is not None and is_tmemfs(entry) else ""

    def _is_mounted(self) -> bool:
        """Return whether our mount is the uppermost at the mountpoint."""
        entry = top_mount(self._config.mountpoint)
        return entry is not None and entry.device == self._device

    def _detach(self) -> None:
        """Detach the mount if it is still there, so that no dead mount stays behind."""
        if not self._is_mounted():
            return
        try:
            unmount(self._config.mountpoint, lazy=True, force=True)
        except OSError:
            log.exception("detaching failed: run umount -l %s", self._config.mountpoint)


def _mount_error(config: MountConfig, error: Exception) -> ConfigError:
    """Return why the kernel or fusermount3 refused to mount, with the remedy."""
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    remedy = "check the mountpoint and the -o options"
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        remedy = "check your permissions (in a container: CAP_SYS_ADMIN and /dev/fuse)"
    return ConfigError(f"cannot mount on '{config.mountpoint}': {reason}; {remedy}")


def _first_cause(error: BaseException) -> str:
    """Return the text of the first error in an exception group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
