"""What the coordinator must not forget, in one SQLite file: the journal of events, the snapshot, rounds and versions.

    append(events)  one commit (WAL, synchronous=FULL) for everything that waited: only then is anything acknowledged
    snapshot        the core's whole state at one place of the journal; a restart loads it and replays what came after
    rounds, versions  what people ask for later, written by idempotent actions

Measured on a common disk: one commit takes about 4 ms whatever it holds, so events are committed in groups.
A row that makes the core raise, or that cannot be read, is marked as poison and skipped by every later replay.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from coordinator.core.events import Happened
from coordinator.core.state import RoundRecord
from protocol.errors import BadConfig, Unavailable
from protocol.messages import Blob

SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS journal (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL, poison INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
  job TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, purpose TEXT NOT NULL, record BLOB NOT NULL,
  PRIMARY KEY (job, round, attempt, purpose)
);
CREATE TABLE IF NOT EXISTS versions (
  job TEXT NOT NULL, version INTEGER NOT NULL, round INTEGER NOT NULL, master TEXT NOT NULL, model BLOB NOT NULL,
  dropped_ratio REAL NOT NULL, at REAL NOT NULL, PRIMARY KEY (job, version)
);
"""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One stored version of a job's global adapter.  `master` is the fp32 file, `model` what agents download."""

    job: str
    version: int
    round: int
    master: str
    model: Blob
    dropped_ratio: float
    at: float


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the journal."""

    seq: int
    at: float
    event: Happened


logger = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
_event = msgspec.msgpack.Decoder(Happened).decode
_record = msgspec.msgpack.Decoder(RoundRecord).decode
_blob = msgspec.msgpack.Decoder(Blob).decode


class Store:
    """Opens (and creates) the database; `:memory:` keeps it in memory.  Not for concurrent use by two coordinators.

    Any thread may call it; writes take turns.  Raises BadConfig for a file that is no database or one of a newer version,
    Unavailable when the disk refuses: nothing is half written then, and the next call may succeed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._lock = threading.Lock()
        with self._disk():
            self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if found > SCHEMA_VERSION:
            raise BadConfig(f"{self.path} was written by a newer fedpipe (format {found}): install that version again")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the file; what was appended is durable already."""
        with self._lock:
            self._db.close()

    # ------------------------------------------------------------------------------------------------------ journal

    def append(self, events: Iterable[tuple[float, Happened]]) -> list[int]:
        """Make events durable in one commit and return their places.  Blocks for one fsync."""
        with self._disk(), self._transaction():
            return [
                int(
                    self._db.execute(
                        "INSERT INTO journal (at, kind, body) VALUES (?, ?, ?)",
                        (at, type(event).__name__, _encode(event)),
                    ).lastrowid
                    or 0
                )
                for at, event in events
            ]

    def replay(self, after: int = 0, before: int = 2**62) -> Iterator[Entry]:
        """The journal between two places, both exclusive, without poison, in order."""
        rows = self._db.execute(
            "SELECT seq, at, body FROM journal WHERE seq > ? AND seq < ? AND poison = 0 ORDER BY seq", (after, before)
        )
        for seq, at, body in rows:
            try:
                event = _event(body)
            except msgspec.DecodeError as error:
                logger.error("a journal row is unreadable: %s", error, extra={"action": "poison", "seq": seq})
                self.poison(seq)
                continue
            yield Entry(seq=seq, at=at, event=event)

    def last_at(self) -> float:
        """When the last journalled event happened (seconds since the epoch); 0 for an empty journal."""
        return float(self._db.execute("SELECT COALESCE(MAX(at), 0) FROM journal").fetchone()[0])

    def poison(self, seq: int) -> None:
        """Never replay this row: the core cannot take it."""
        with self._disk():
            self._db.execute("UPDATE journal SET poison = 1 WHERE seq = ?", (seq,))

    def save_snapshot(self, seq: int, state: bytes) -> None:
        """Replace the snapshot by the state after row `seq`."""
        with self._disk():
            self._db.execute("INSERT OR REPLACE INTO snapshot (id, seq, state) VALUES (1, ?, ?)", (seq, state))

    def load_snapshot(self) -> tuple[int, bytes] | None:
        """The last snapshot and its place in the journal."""
        row = self._db.execute("SELECT seq, state FROM snapshot").fetchone()
        return (int(row[0]), bytes(row[1])) if row else None

    # ----------------------------------------------------------------------------------------------- rounds, versions

    def record(self, job: str, record: RoundRecord) -> None:
        """Write down a round's end; writing it again changes nothing."""
        with self._disk():
            self._db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?)",
                (job, record.round, record.attempt, record.purpose, _encode(record)),
            )

    def rounds(self, job: str) -> list[RoundRecord]:
        """All ended rounds of a job, failed attempts included, in order."""
        rows = self._db.execute("SELECT record FROM rounds WHERE job = ? ORDER BY round, attempt", (job,))
        return [_record(row[0]) for row in rows]

    def add_version(self, version: Version) -> None:
        """Write down a version; writing it again changes nothing."""
        v = version
        with self._disk():
            self._db.execute(
                "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (v.job, v.version, v.round, v.master, _encode(v.model), v.dropped_ratio, v.at),
            )

    def versions(self, job: str) -> list[Version]:
        """All stored versions of a job, oldest first."""
        rows = self._db.execute("SELECT * FROM versions WHERE job = ? ORDER BY version", (job,))
        return [
            Version(job=j, version=v, round=r, master=m, model=_blob(b), dropped_ratio=d, at=at)
            for j, v, r, m, b, d, at in rows
        ]

    # ------------------------------------------------------------------------------------------------------- plumbing

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # on a full disk SQLite may have rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.OperationalError as error:
            folder = Path(self.path).parent
            free = f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB free)" if folder.is_dir() else ""
            raise Unavailable(f"{self.path}: {error}{free}: make room or check the disk, then it goes on") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise BadConfig(f"{self.path}: {error}: restore it from a copy, or move it away to start afresh") from error
