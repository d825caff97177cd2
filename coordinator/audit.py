"""Who did what: an append-only file of JSON lines, chained by SHA-256, written before it is done and before it is answered.

    {"n":7, "at":..., "actor":"token:ops", "action":"cancel", "what":"answers", "before": digest of line 6, "digest": of this one}
    {"n":8, "at":..., "actor":"token:ops", "action":"cancel", "of":7, "outcome":"200", ...}

Each act has two lines: that it was asked for, durable before anything is done, and how it came out, durable before the answer;
an act without its second line was broken off by a crash.  So nothing is done that is not in the file, and who cannot write
to the file is refused.

A digest is of the line's bytes before it, and those hold the digest of the line before: a line that is changed, taken out, put in
or moved breaks the chain at its number (Schneier and Kelsey, Secure Audit Logs, 1999, without their secret keys: whoever may
write the file can forge it from some line on to its end).  That is seen by comparing the head, `n:digest`, with one that was
kept elsewhere: in audit.head beside it, in the daemon's log, in /v1/health.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec

from protocol.blobs import disk
from protocol.errors import BadConfig, OutsideFault, Unavailable
from protocol.files import give_to_folder, replacing

LOCAL: Final = "local"
NOTHING: Final = "0" * 64
MAX_TEXT: Final = 500
MAX_LINE_BYTES: Final = 64 * 1024
_SEAL: Final = b',"digest":"%b"}'
_SEAL_BYTES: Final = len(_SEAL % NOTHING.encode())

logger = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line.  `of` is the number of the line whose outcome this is; 0: this one says that something was asked for."""

    n: int
    at: float
    actor: str
    action: str
    before: str
    what: str = ""
    address: str = ""
    of: int = 0
    outcome: str = ""


class Head(NamedTuple):
    """Number and digest of the last line; as text `n:digest`."""

    n: int = 0
    digest: str = NOTHING

    def __str__(self) -> str:
        return f"{self.n}:{self.digest}"


class Act:
    """Something under way; `outcome` may be set before it ends, and `what` made clearer."""

    def __init__(self, what: str) -> None:
        self.what, self.outcome = what, "done"


# --------------------------------------------------------------------------------------------------------- as text


def seal(entry: Entry) -> tuple[bytes, str]:
    """A line without its newline, and its digest."""
    body = msgspec.json.encode(entry)
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + _SEAL % digest.encode(), digest


_entry: Final = msgspec.json.Decoder(Entry)


def _opened(line: bytes) -> tuple[Entry, str]:
    """What a line says and its digest.  Raises ValueError when it is no line, or not as it was written."""
    try:
        body = line[:-_SEAL_BYTES] + b"}"
        entry = _entry.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ValueError("is not readable") from None
    digest = hashlib.sha256(body).hexdigest()
    if line[-_SEAL_BYTES:] != _SEAL % digest.encode():
        raise ValueError("was changed")
    return entry, digest


def verify(lines: Iterable[bytes], head: Head | None = None) -> Head:
    """The head of a whole log, as far as `head`, kept elsewhere, allows.  Raises BadConfig that names the first line at fault."""
    last, number = Head(), 0
    for number, line in enumerate(lines, 1):
        try:
            if len(line) > MAX_LINE_BYTES or not line.endswith(b"\n"):
                raise ValueError("is not whole")
            entry, digest = _opened(line[:-1])
        except ValueError as error:
            raise BadConfig(f"line {number} {error}") from None
        if entry.n > number:
            raise BadConfig(f"line {number} is missing: number {entry.n} stands in its place")
        if entry.n < number:
            raise BadConfig(f"line {number} is out of place: it has number {entry.n}")
        if entry.before != last.digest:
            raise BadConfig(f"line {number} does not follow line {number - 1} as it stands: one of them was changed")
        last = Head(number, digest)
        if head and head.n == number and head.digest != digest:
            raise BadConfig(f"line {number} was changed: its digest was {head.digest[:16]}... once")
    if head and head.n > number:
        raise BadConfig(f"line {number + 1} is missing: the log had {head.n} lines once and has {number}")
    return last


def parse_head(text: str) -> Head:
    """`n:digest`.  Raises BadConfig."""
    n, _, digest = text.strip().partition(":")
    if not (n.isascii() and n.isdigit()) or len(digest) != len(NOTHING):
        raise BadConfig(f"{text[:80]!r} is no head of an audit log: write it as number:digest")
    return Head(int(n), digest)


def read(path: Path) -> Iterator[Entry]:
    """The entries of a log, whether or not they hold together.  Raises BadConfig for a file that is none."""
    for number, line in enumerate(lines_of(path), 1):
        with suppress(ValueError):
            yield _opened(line.rstrip(b"\n"))[0]
            continue
        logger.warning("line %d cannot be read", number, extra={"action": "audit_line"})


def lines_of(path: Path) -> Iterator[bytes]:
    """Lines with their newlines, none longer than it may be.  Raises BadConfig."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                yield line
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror or error}") from None


def head_file(path: Path) -> Path:
    """Where the head of a log is kept beside it."""
    return path.with_suffix(".head")


# ------------------------------------------------------------------------------------------------------------- the log


class Audit:
    """One coordinator's log.  Any thread, and any process, may write.  Raises Unavailable when the disk refuses."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        self.head, self._end_bytes = Head(), -1
        known = Head()
        with suppress(OSError, BadConfig):
            known = parse_head(head_file(path).read_text(encoding="ascii"))
        with self._alone() as file:
            faults = self._catch_up(file, known)
            if known.n > self.head.n:
                faults.append(f"the log had {known.n} lines once ({known.digest[:16]}...)")
        self._repaired(faults)

    @contextmanager
    def _alone(self) -> Iterator[BinaryIO]:
        """The file, while nobody else writes to it: a command may run beside the daemon."""
        with self._lock, disk(self._path.parent):
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "r+b", buffering=0) as file:  # noqa: PTH123 - a descriptor, not a path
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.fstat(descriptor).st_size:
                    give_to_folder(self._path)
                yield file

    def _catch_up(self, file: BinaryIO, known: Head) -> list[str]:
        """Take what stands last for the head, where another has written since; what a crash left of a line is cut off."""
        end, faults = file.seek(0, os.SEEK_END), []
        if end <= self._end_bytes:
            return []
        file.seek(max(0, end - 2 * MAX_LINE_BYTES))
        tail = file.read()
        whole, torn = tail[: tail.rfind(b"\n") + 1], tail[tail.rfind(b"\n") + 1 :]
        if torn:
            file.truncate(end - len(torn))
            os.fsync(file.fileno())
            faults.append(f"{len(torn)} bytes of a line that a crash broke off were cut")
        last = whole[:-1].rpartition(b"\n")[2]
        if last:
            try:
                entry, digest = _opened(last)
                self.head = Head(entry.n, digest)
            except ValueError as error:
                self.head = Head(max(known.n, 1), hashlib.sha256(last).hexdigest())
                faults.append(f"the last line {error}")
        self._end_bytes = end - len(torn)
        return faults

    def _repaired(self, faults: Iterable[str]) -> None:
        for what in faults:
            logger.error("the audit log was not as it was left: %s", what, extra={"action": "audit_repaired"})
            with suppress(Unavailable):  # it is in the daemon's log
                self.append(LOCAL, "repair", what, outcome="done")

    def append(self, actor: str, action: str, what: str, *, address: str = "", of: int = 0, outcome: str = "") -> int:
        """Write a line, durable when this returns its number.  Blocks for some fsyncs."""
        with self._alone() as file:
            faults = self._catch_up(file, self.head)
            entry = Entry(
                n=self.head.n + 1,
                at=round(self._clock(), 3),
                actor=actor[:MAX_TEXT],
                action=action[:MAX_TEXT],
                what=what[:MAX_TEXT],
                address=address,
                of=of,
                outcome=outcome[:MAX_TEXT],
                before=self.head.digest,
            )
            line, digest = seal(entry)
            self._write(file, line + b"\n")
            self.head = Head(entry.n, digest)
            with suppress(OSError), replacing(head_file(self._path)) as beside:  # verify then knows one line less
                give_to_folder(Path(beside.name))
                beside.write(str(self.head).encode())
        extra = {"action": "audit", "n": entry.n, "actor": actor, "did": action, "what": entry.what, "digest": digest}
        logger.info("%s", entry.outcome or "asked", extra=extra)
        self._repaired(faults)
        return entry.n

    def _write(self, file: BinaryIO, line: bytes) -> None:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError("no room for a whole line")
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # the next line must begin where this one did
                file.truncate(end)
            raise
        self._end_bytes = end + len(line)

    @contextmanager
    def act(self, actor: str, action: str, what: str, address: str = "") -> Iterator[Act]:
        """Something is done in this block: two lines.  Raises Unavailable before it is begun."""
        of, doing = self.append(actor, action, what, address=address), Act(what)
        try:
            yield doing
        except Exception as error:
            fault = "refused" if isinstance(error, OutsideFault) else "failed"
            self.ended(of, actor, action, doing.what, f"{fault}: {error}")
            raise
        self.ended(of, actor, action, doing.what, doing.outcome)

    @asynccontextmanager
    async def doing(self, actor: str, action: str, what: str, address: str = "") -> AsyncIterator[Act]:
        """The same in the event loop, which does not wait for the disk."""
        act = self.act(actor, action, what, address)
        doing = await asyncio.to_thread(act.__enter__)
        try:
            yield doing
        except Exception as error:
            await asyncio.to_thread(act.__exit__, type(error), error, error.__traceback__)
            raise
        await asyncio.to_thread(act.__exit__, None, None, None)

    def ended(self, of: int, actor: str, action: str, what: str, outcome: str) -> None:
        """Write down how the act of line `of` came out, if the disk takes it."""
        try:
            self.append(actor, action, what, of=of, outcome=outcome)
        except Unavailable as error:  # it is done, and that it was asked for is written
            logger.error("the outcome of line %d is not written: %s", of, error, extra={"action": "audit_refused"})
