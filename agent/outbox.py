"""Finished updates on disk until the coordinator has them: a trained update outlives this process, the broker and the link.

Per update two files, `{digest}.update` and `{digest}.json` (its Offer); the second appears last and goes first, so what is
listed is whole.  An update file alone is what a kill between the two left: without its Offer nobody can use it.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from protocol.blobs import digest, disk
from protocol.files import replacing, start_writing
from protocol.messages import Offer

logger = logging.getLogger(__name__)


class Outbox:
    """The folder of unacknowledged updates.  Raises Unavailable when the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._paths: dict[str, Path] = {}

    def load(self) -> list[Offer]:
        """Every update that is still owed, oldest first; a damaged entry is set aside and named in the log.  Call it once."""
        self._sweep()
        offers = []
        for path in sorted(self.folder.glob("*.json"), key=lambda p: p.stat().st_mtime):
            try:
                offer = msgspec.json.decode(path.read_bytes(), type=Offer)
                data = self._file(offer.blob.sha256)
                if data.stat().st_size != offer.blob.size:
                    raise ValueError("its size differs")
            except (msgspec.MsgspecError, OSError, ValueError) as error:
                logger.warning(
                    "outbox entry unusable", extra={"action": "outbox", "file": path.name, "error": str(error)}
                )
                with suppress(OSError):
                    path.rename(path.with_suffix(".broken"))
                continue
            self._paths[offer.blob.xfer] = data
            offers.append(offer)
        return offers

    def keep(self, file: Path, offer: Offer) -> Offer:
        """Take over a finished update file; the offer comes back with the blob's digest and size filled in.  Blocking.

        When the disk refuses, `file` is where it was and may be handed in again.
        """
        with disk(self.folder):
            with file.open("rb") as data:
                start_writing(data)  # the disk has as long as the digest takes
                sha256, size = digest(data)
                os.fsync(data.fileno())
            blob = msgspec.structs.replace(offer.blob, sha256=sha256, size=size)
            offer = msgspec.structs.replace(offer, blob=blob)
            target = self._file(sha256)
            file.replace(target)
            try:
                with replacing(target.with_suffix(".json")) as out:
                    out.write(msgspec.json.encode(offer))
            except OSError:
                target.replace(file)
                raise
        self._paths[blob.xfer] = target
        return offer

    def path(self, xfer: str) -> Path | None:
        """The file behind an offered update."""
        return self._paths.get(xfer)

    def forget(self, xfer: str) -> None:
        """The coordinator has it, or does not want it.  If the disk keeps it, it is offered again at the next start."""
        path = self._paths.pop(xfer, None)
        if path is not None:
            try:
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("an update cannot be deleted: %s", error, extra={"action": "disk"})

    def surplus(self, max_bytes: int) -> list[str]:
        """Transfers of the oldest updates beyond `max_bytes` in all; never the newest."""
        left, found = max_bytes, []
        for index, (xfer, path) in enumerate(reversed(self._paths.items())):
            with suppress(OSError):
                left -= path.stat().st_size
            if index and left < 0:
                found.append(xfer)
        return found[::-1]

    def _sweep(self) -> None:
        """Delete what a kill left half done; both files of a damaged entry stay for whoever wants to know."""
        for path in self.folder.glob("*.update"):
            if not any(path.with_suffix(suffix).exists() for suffix in (".json", ".broken")):
                with suppress(OSError):
                    path.unlink()
        for path in self.folder.glob(".*.part"):
            with suppress(OSError):
                path.unlink()

    def _file(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.update"
