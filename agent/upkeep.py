"""The agent's folder: in which format it is, and what in it grows old or large and goes by itself.

What is owed to the coordinator (outbox/) goes by size alone, the oldest first; what only saves time (downloads that were
broken off, a checkpoint, damaged entries that somebody may want to look at) by age; training.log is cut when it is long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from protocol import SOFTWARE
from protocol.blobs import disk
from protocol.errors import BadConfig
from protocol.files import replacing

logger = logging.getLogger(__name__)

STATE_VERSION: Final = 1
"""1: outbox of Offer and update, partial downloads of protocol/spool.py.  A folder without a version is one of these too."""
DAY_S: Final = 86_400.0


class KeepConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much may lie in the agent's folder."""

    outbox_bytes: Annotated[int, Meta(ge=1, le=2**50)] = 8 * 2**30
    """Finished updates that the coordinator has not taken; above this the oldest go, the newest never does."""
    days: Annotated[float, Meta(gt=0, le=36_500)] = 14.0
    """Broken-off downloads, a checkpoint and damaged entries that nobody touched for so long are deleted."""
    log_bytes: Annotated[int, Meta(ge=4096, le=2**40)] = 16 * 2**20
    """training.log becomes training.log.1 at this size; together they take at most about twice as much."""


class _Format(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    software: str = ""


def open_folder(folder: Path) -> None:
    """Create the agent's folder, or see that this software can read it.

    Raises BadConfig for a folder that a newer one wrote, Unavailable when the disk refuses.
    """
    path = folder / "format.json"
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            known = msgspec.json.decode(path.read_bytes(), type=_Format)
        except (FileNotFoundError, msgspec.MsgspecError):
            known = _Format(version=0)
        if known.version > STATE_VERSION:
            raise BadConfig(
                f"{folder} was written by {known.software or 'a newer fedpipe'} in format {known.version}, this one knows "
                f"{STATE_VERSION}: install that version again, or give this agent another state_dir"
            )
        sweep_parts(folder)
        wanted = _Format(version=STATE_VERSION, software=SOFTWARE)
        if known != wanted:
            with replacing(path) as file:
                file.write(msgspec.json.encode(wanted))


def sweep_parts(folder: Path) -> None:
    """Delete what a killed process was writing; only while nobody writes there."""
    for path in folder.glob(".*.part"):
        _delete(path)


def tidy(folder: Path, keep: KeepConfig) -> None:
    """Delete what is too old and cut what is too long.  Cheap enough for every minute; a disk that refuses is left alone."""
    oldest = time.time() - keep.days * DAY_S
    aging = [folder / "training.checkpoint", *(folder / "blobs" / "partial").glob("*"), *folder.glob("outbox/*.broken")]
    for path in aging:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                _delete(path)
                if path.suffix == ".broken":
                    _delete(path.with_suffix(".update"))
    log = folder / "training.log"
    with contextlib.suppress(OSError):
        if log.stat().st_size > keep.log_bytes:
            with contextlib.suppress(OSError):  # without room for a copy it is cut all the same
                shutil.copyfile(log, folder / "training.log.1")
            os.truncate(log, 0)  # the child holds it open to append


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be deleted: %s", path, error, extra={"action": "disk"})
