"""Locks between processes that the kernel releases when their holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

# What file systems without flock answer; EBADF: some want a file open for writing.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class Lock:
    """A lock on an open file.

    Args:
        descriptor: The open file.
        held: False where the file system has no locks.
    """

    def __init__(self, descriptor: int, *, held: bool) -> None:
        self.descriptor = descriptor
        self.held = held
        self._owner = os.getpid()

    def is_on(self, file: Path) -> bool:
        """Whether `file` is still the file that is locked, not a new one under its name."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), file.stat())
        except OSError:
            return False

    def sign(self) -> None:
        """Write into the file who holds it, for those who wait."""
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def touch(self) -> None:
        """Remember in the file's time that it was used now."""
        with contextlib.suppress(OSError):
            # Not the kernel's own stamp, whose clock ticks only every few milliseconds.
            now = time.time_ns()
            os.utime(self.descriptor, ns=(now, now))

    def hand_over(self) -> None:
        """Leave it to a child that was forked: it is held until the child ends."""
        os.close(self.descriptor)
        self.descriptor = -1

    def take_over(self) -> None:
        """In a forked child: this process gives it back, not the one that took it."""
        self._owner = os.getpid()

    def release(self) -> None:
        """Give it back; in a forked child only close the copy that was inherited."""
        if self.descriptor < 0:
            return
        if self.held and os.getpid() == self._owner:
            # Children that were forked meanwhile hold copies: closing alone would not release it.
            with contextlib.suppress(OSError):
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)
        self.descriptor = -1


def take(file: Path, *, shared: bool = False, wait: bool = False) -> Lock:
    """Lock a file, which is made where it is missing.

    Raises:
        BlockingIOError: Another process holds it, and `wait` is false.
        OSError: The file can be neither made nor opened.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        descriptor = os.open(file, os.O_RDONLY)
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        if error.errno in NO_LOCKS:
            return Lock(descriptor, held=False)
        os.close(descriptor)
        raise
    except BaseException:  # Ctrl-C while waiting
        os.close(descriptor)
        raise
    return Lock(descriptor, held=True)


def holder(file: Path) -> str:
    """Who signed the lock last, as "1234 on host"; empty where nobody did."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
