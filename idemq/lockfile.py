"""Whether a process still lives, told by a file that it has locked.

The kernel unlocks the file when its process ends, however it ends, and keeps it locked while the process is
stopped. So a dead owner is known at once, and a living one is never taken for dead.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The locked files of this process: they are judged from here, never by trying their lock.
_held: dict[Path, int] = {}
#: Held from opening a file until it is registered, and over every fork: a child knows all that it inherits.
_gate = threading.Lock()


def _after_fork_in_child() -> None:
    # A child that kept its copies open would keep its parent alive in the eyes of others. Closing them does
    # not unlock, as an explicit unlock would.
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    _gate.release()


os.register_at_fork(before=_gate.acquire, after_in_parent=_gate.release, after_in_child=_after_fork_in_child)


class LockFile:
    """A new file that stays locked until `release`, or until this process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _gate:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _held[path] = descriptor

    def release(self) -> None:
        """Remove the file. Without effect the second time, and in a forked child."""
        with _gate:
            descriptor = _held.pop(self._path, None)
            if descriptor is not None:
                self._path.unlink(missing_ok=True)
                os.close(descriptor)


def is_dead(path: Path) -> bool:
    """Whether the process that made this `LockFile` is gone, or has released it."""
    with _gate:
        if path in _held:
            return False
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return True
        except OSError:
            return False  # somebody else's file, or no descriptor left: not known, so not dead
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


@contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Run the block in one process and thread at a time."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Not by closing alone: a child forked meanwhile has a copy, which would stay locked.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
