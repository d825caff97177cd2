"""Calibrations on disk: what was measured once about a base, a device and a text is not measured again.

    key      sha256 over everything that a measurement depends on; the caller lists it
    file     KEY.calibrated, msgpack; at most MAX_KEPT, the oldest go

A file that cannot be read is no calibration: it is measured anew and the file replaced.  Only whole results belong here; one
that lacks something for want of memory is kept too, and holds until there is clearly more memory than there was.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from protocol import files
from protocol.messages import Calibrated

logger = logging.getLogger(__name__)

MAX_KEPT: Final = 32
MORE_MEMORY: Final = 1.1
"""A limit this many times as high may change what fits."""


class _Kept(msgspec.Struct, frozen=True):
    measured_at: float
    short_at_bytes: int  # the memory limit under which something did not fit; 0: everything did
    calibrated: Calibrated


def key(parts: Mapping[str, object]) -> str:
    """Digest of what a calibration depends on: equal parts, equal key, whatever their order."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


class Calibrations:
    """The calibrations below `folder`, which need not exist yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, wanted: str, *, limit_bytes: int) -> Calibrated | None:
        """The calibration of this key, with seconds = 0 and a note from when it is; None if it must be measured."""
        path = self._path(wanted)
        try:
            kept = msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
            day = dt.datetime.fromtimestamp(kept.measured_at, dt.UTC).date()
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, OSError, OverflowError, ValueError) as error:
            logger.warning("%s is unreadable, measured anew: %s", path, error, extra={"action": "calibration_lost"})
            return None
        may_fit = not limit_bytes or limit_bytes > MORE_MEMORY * kept.short_at_bytes
        if kept.short_at_bytes and may_fit:
            return None
        notes = [f"measured on {day}", *kept.calibrated.notes][:16]
        return msgspec.structs.replace(kept.calibrated, seconds=0.0, notes=notes)

    def keep(self, found: str, calibrated: Calibrated, *, now: float, short_at_bytes: int = 0) -> None:
        """Remember a whole result; `short_at_bytes` is the memory limit if it kept something out.

        A disk that refuses costs measuring again, no more.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with files.replacing(self._path(found)) as file:
                file.write(msgspec.msgpack.encode(_Kept(now, short_at_bytes, calibrated)))
            by_age = sorted(self._folder.glob("*.calibrated"), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in by_age[MAX_KEPT:]:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("a calibration could not be kept: %s", error, extra={"action": "calibration_lost"})

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.calibrated"
