"""One daemon per state folder: a lock that the kernel gives back whatever way the process ends, and that names its holder.

A lock of fcntl(2) belongs to the process: children do not inherit it, so a training child that outlives its agent keeps nobody
out, and the kernel says whose it is, so that nothing has to be written, which a full disk would refuse.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from protocol.errors import Unavailable

_FLOCK: Final = struct.Struct("@hhqqi4x")
"""struct flock of Linux: type, whence, start, length, holder."""


def hold(folder: Path, what: str) -> None:
    """Take a state folder for this process, until it ends; `what` says what we are: "agent".

    Raises Unavailable where another process has it, naming that, and where the folder cannot be used.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"{path} cannot be opened: {error.strerror}: see state_dir") from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        who = f"process {holder}" if holder else "which cannot be seen from here"
        raise Unavailable(
            f"another {what} ({who}) works in {folder}: stop it, or give this one a state_dir of its own"
        ) from error


def _holder(descriptor: int) -> int:
    """The process that has the lock; 0 if it has just let go, or lives in another namespace."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_, holder = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else int(holder)
