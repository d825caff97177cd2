"""What the coordinator must not forget, in one SQLite file: the journal of events, snapshots, rounds and versions.

    append(events)  one commit (WAL, synchronous=FULL) for everything that waited: only then is anything acknowledged
    snapshots       the core's whole state at places of the journal; a restart loads the newest and replays what came after,
                    and the earlier ones let past rounds be replayed (coordinator/replay.py); see coordinator/pieces.py
    rounds, versions, ended jobs   what people ask for later, written by idempotent actions

Measured on a common disk: one commit takes about 4 ms whatever it holds, so events are committed in groups.
Events and snapshots carry a crc32c, because SQLite does not notice a bit that the disk turned inside a row.  A row that makes
the core raise, or that cannot be read, is marked as poison and skipped by every later replay; for a snapshot that cannot be
read the one before it serves.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from coordinator import pieces
from coordinator.core.events import Happened
from coordinator.core.state import Contribution, JobDetail, RoundRecord
from coordinator.migrations import NEWEST, drop_copies
from coordinator.opening import DAMAGED, is_alone, open_database
from coordinator.past import Past, extended
from protocol import SOFTWARE
from protocol.crc import crc32c
from protocol.errors import BadConfig, Unavailable
from protocol.messages import Blob

SCHEMA_VERSION: Final = NEWEST
ROW_BYTES: Final = 40
"""About what a row costs beside its body."""
_VACUUM_PAGES: Final = 256
"""Given back at a time: what is moved for it needs room in the log, and there may be hardly any."""
_INDEX_BYTES: Final = 2**20
"""More than the index has that readers share."""
_PAGE_ROWS: Final = 1000
_PAGE_ROUNDS: Final = 4
"""A record of a thousand agents has a third of a megabyte, and is five times that as objects."""
_N_PASTS: Final = 4
"""Jobs whose past is held: those that run at once, and one that is looked at."""
_BUSY_MS: Final = 5000


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a job's global adapter.  `master` is the fp32 file, `model` what agents download.

    `updates`: what it was made of, as long as those files are kept.  `kept`: whether its own files are.
    """

    job: str
    version: int
    round: int
    master: str
    model: Blob
    dropped_ratio: float
    at: float
    updates: list[Contribution] = []
    kept: bool = True


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the journal."""

    seq: int
    at: float
    event: Happened


class Snapshot(NamedTuple):
    """The state after row `seq`, as the core of `software` encoded it."""

    seq: int
    at: float
    software: str
    state: bytes


class Frame(NamedTuple):
    """A snapshot's place and what it costs together with the journal from it to the next one."""

    seq: int
    at: float
    n_bytes: int


logger = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
_event = msgspec.msgpack.Decoder(Happened).decode
_record = msgspec.msgpack.Decoder(RoundRecord).decode
_blob = msgspec.msgpack.Decoder(Blob).decode
_updates = msgspec.msgpack.Decoder(list[Contribution]).decode
_detail = msgspec.msgpack.Decoder(JobDetail).decode


def _crc(number: float, body: bytes) -> int:
    return crc32c(struct.pack(">d", number), body)


class Store:
    """Opens (and creates, and upgrades) the database; `:memory:` keeps it in memory.  Not for two coordinators at once.

    Any thread may call it; writes take turns.  With `read_only` nothing on disk changes, also beside a running coordinator.
    Raises BadConfig for a file that is no database, is damaged or of a newer version, Unavailable when the disk refuses:
    nothing is half written then, and the next call may succeed.  Opening costs one read of the file.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = str(path)
        self._lock = threading.Lock()
        self._poison: set[int] = set()
        self._pasts: dict[str, Past] = {}
        with self._disk():
            self._db = open_database(self.path, read_only=read_only)

    def close(self) -> None:
        """Close the file; what was appended is durable already."""
        with self._lock:
            self._db.close()

    # ------------------------------------------------------------------------------------------------------ journal

    def append(self, events: Iterable[tuple[float, Happened]]) -> list[int]:
        """Make events durable in one commit and return their places.  Blocks for one fsync."""
        with self._disk(), self._transaction():
            return [self._insert(at, type(event).__name__, _encode(event)) for at, event in events]

    def _insert(self, at: float, kind: str, body: bytes) -> int:
        row = (at, kind, body, _crc(at, body))
        return self._db.execute("INSERT INTO journal (at, kind, body, crc) VALUES (?, ?, ?, ?)", row).lastrowid or 0

    def replay(self, after: int = 0, before: int = 2**62) -> Iterator[Entry]:
        """The journal between two places, both exclusive, without poison, in order."""
        query = "SELECT seq, at, body, crc FROM journal WHERE seq > ? AND seq < ? AND poison = 0 ORDER BY seq LIMIT ?"
        while rows := self._rows(query, after, before, _PAGE_ROWS):
            for seq, at, body, crc in rows:
                if seq not in self._poison and (event := self._read(seq, at, body, crc)) is not None:
                    yield Entry(seq=seq, at=at, event=event)
            after = rows[-1][0]

    def _read(self, seq: int, at: float, body: bytes, crc: int | None) -> Happened | None:
        try:
            if crc is not None and crc != _crc(at, body):
                raise msgspec.DecodeError("its checksum is wrong")
            event: Happened = _event(body)
            return event
        except msgspec.DecodeError as error:
            logger.error("a journal row is unreadable: %s", error, extra={"action": "poison", "seq": seq})
            self.poison(seq)
            return None

    def first_seq(self) -> int:
        """The oldest row that is kept; 0 for an empty journal."""
        return int(self._rows("SELECT COALESCE(MIN(seq), 0) FROM journal")[0][0])

    def last_at(self) -> float:
        """When the last journalled event happened (seconds since the epoch); 0 when nothing ever did."""
        newest = "SELECT MAX((SELECT COALESCE(MAX(at), 0) FROM journal), (SELECT COALESCE(MAX(at), 0) FROM snapshots))"
        return float(self._rows(newest)[0][0])

    def poison(self, seq: int) -> None:
        """Never replay this row: the core cannot take it.  A disk that refuses is no reason to stop: it is found again."""
        self._poison.add(seq)
        with suppress(Unavailable), self._disk():
            self._db.execute("UPDATE journal SET poison = 1 WHERE seq = ?", (seq,))

    # ---------------------------------------------------------------------------------------------------- snapshots

    def save_snapshot(self, seq: int, state: bytes) -> None:
        """Keep the state after row `seq`.  Cost: that of its hash, and of writing what no earlier one has."""
        at = "(SELECT COALESCE(MAX(at), 0) FROM journal WHERE seq <= ?)"
        last = "SELECT half FROM snapshots WHERE seq < ? ORDER BY seq DESC LIMIT 1"
        crc, found = _crc(seq, state), pieces.named(state)  # meanwhile others may write
        with self._disk(), self._transaction():
            before = self._db.execute(last, (seq,)).fetchone()
            half = 1 - before[0] if before else 0
            row = (seq, seq, SOFTWARE, crc, half, pieces.save(self._db, half, found))
            self._db.execute(f"INSERT OR REPLACE INTO snapshots VALUES (?, {at}, ?, ?, x'', ?, ?)", row)  # noqa: S608

    def snapshots(self, before: int = 2**62) -> Iterator[Snapshot]:
        """The snapshots at places below `before` whose bytes are those that were saved, newest first."""
        rows = self._rows("SELECT seq FROM snapshots WHERE seq < ? ORDER BY seq DESC", before)
        query = "SELECT at, software, crc, state, pieces FROM snapshots WHERE seq = ?"
        for (seq,) in rows:
            with self._disk():
                row = self._db.execute(query, (seq,)).fetchone()
                if row is None:
                    continue  # pruned meanwhile
                at, software, crc, state, listed = row
                state += pieces.load(self._db, listed)
            if crc is None or crc == _crc(seq, state):
                yield Snapshot(seq, at, software, state)
                continue
            logger.error("a snapshot is damaged", extra={"action": "snapshot_lost", "seq": seq})
            with suppress(Unavailable), self._disk():
                pieces.drop_damaged(self._db, listed)

    def load_snapshot(self) -> tuple[int, bytes] | None:
        """The newest readable snapshot and its place in the journal."""
        return next(((s.seq, s.state) for s in self.snapshots()), None)

    def has_snapshots(self) -> bool:
        """Whether any was ever saved, readable or not."""
        return bool(self._rows("SELECT 1 FROM snapshots LIMIT 1"))

    # ----------------------------------------------------------------------------------- rounds, versions, ended jobs

    def close_job(self, job: str, detail: JobDetail) -> None:
        """Write down what may still be asked of a job that ended; writing it again changes nothing."""
        brief = msgspec.structs.replace(detail, plan=detail.plan and detail.plan.packed())
        body = zlib.compress(_encode(brief), 1)
        with self._disk():
            self._db.execute("INSERT OR REPLACE INTO ended VALUES (?, ?, ?)", (job, _crc(0, body), body))

    def detail(self, job: str) -> JobDetail | None:
        """What was written down of a job that ended; None for another, and for one whose row is damaged."""
        for crc, body in self._rows("SELECT crc, detail FROM ended WHERE job = ?", job):
            if crc == _crc(0, body):
                brief: JobDetail = _detail(zlib.decompress(body))
                return msgspec.structs.replace(brief, plan=brief.plan and brief.plan.unpacked())
            logger.error("what was kept of job %s is damaged", job, extra={"action": "detail_lost", "job": job})
        return None

    def record(self, job: str, record: RoundRecord) -> None:
        """Write down a round's end; writing it again changes nothing."""
        with self._disk():
            self._db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?)",
                (job, record.round, record.attempt, record.purpose, _encode(record)),
            )

    def rounds(self, job: str, skip: int = 0, end: int = 2**62) -> Iterator[RoundRecord]:
        """Ended rounds of a job, failed attempts included, in order, from number `skip` to below `end`; a few in memory at a time."""
        query = "SELECT record FROM rounds WHERE job = ? ORDER BY round, attempt LIMIT ? OFFSET ?"
        while skip < end and (rows := self._rows(query, job, min(_PAGE_ROUNDS, end - skip), skip)):
            skip += len(rows)
            yield from (_record(row[0]) for row in rows)

    def round(self, job: str, number: int, attempt: int, purpose: str) -> RoundRecord | None:
        """How one attempt of a round ended; None if that is not written down."""
        query = "SELECT record FROM rounds WHERE job = ? AND round = ? AND attempt = ? AND purpose = ?"
        rows = self._rows(query, job, number, attempt, purpose)
        return _record(rows[0][0]) if rows else None

    def past(self, job: str) -> Past:
        """What the ended rounds of a job amount to.  Cost: reading those that ended since somebody last asked."""
        known = self._pasts.get(job, Past())
        found = extended(known, self.rounds(job, known.n_rounds))
        others = [(name, past) for name, past in self._pasts.items() if name != job]
        self._pasts = dict([*others[1 - _N_PASTS :], (job, found)])  # threads that meet here have each a true one
        return found

    def add_version(self, version: Version) -> None:
        """Write down a version; writing it again changes nothing."""
        v = version
        with self._disk():
            self._db.execute(
                "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    v.job,
                    v.version,
                    v.round,
                    v.master,
                    _encode(v.model),
                    v.dropped_ratio,
                    v.at,
                    _encode(v.updates),
                    v.kept,
                ),
            )

    def versions(self, job: str | None = None) -> list[Version]:
        """All versions of a job, oldest first, also those whose files are gone; of all jobs without one."""
        rows = self._rows("SELECT * FROM versions WHERE ? IS NULL OR job = ? ORDER BY job, version", job, job)
        return [
            Version(
                job=j,
                version=v,
                round=r,
                master=m,
                model=_blob(b),
                dropped_ratio=d,
                at=at,
                updates=_updates(u),
                kept=bool(k),
            )
            for j, v, r, m, b, d, at, u, k in rows
        ]

    # -------------------------------------------------------------------------------------------------------- pruning

    def frames(self) -> list[Frame]:
        """The snapshots' places and costs, oldest first: what goes with each.  Cost: one pass over all lengths."""
        journal = "SELECT COALESCE(SUM(LENGTH(body) + ?), 0) FROM journal WHERE seq > ? AND seq <= ?"
        with self._disk():
            rows = self._db.execute("SELECT seq, at, LENGTH(state), pieces FROM snapshots ORDER BY seq").fetchall()
            own = pieces.sizes(self._db, [listed for *_, listed in rows])
            ends = [*(row[0] for row in rows), 2**62][1:]
            between = [
                self._db.execute(journal, (ROW_BYTES, row[0], end)).fetchone()[0]
                for row, end in zip(rows, ends, strict=True)
            ]
        return [
            Frame(seq, at, n_whole + len(listed) + n_own + n_journal)
            for (seq, at, n_whole, listed), n_own, n_journal in zip(rows, own, between, strict=True)
        ]

    def forget(self, versions: Iterable[tuple[str, int]], updates: Iterable[tuple[str, int]], before_seq: int) -> int:
        """In one commit: these versions and updates are not kept any more, nor snapshots before a place and the journal up to it.

        Their files are still there: delete them afterwards.  Returns how many journal rows went.
        """
        with self._disk(), self._transaction():
            self._db.executemany(
                "UPDATE versions SET kept = 0, updates = x'90' WHERE job = ? AND version = ?", versions
            )
            self._db.executemany("UPDATE versions SET updates = x'90' WHERE job = ? AND version = ?", updates)
            self._db.execute("DELETE FROM snapshots WHERE seq < ?", (before_seq,))
            pieces.drop_unlisted(
                self._db, (row[0] for row in self._db.execute("SELECT pieces FROM snapshots").fetchall())
            )
            return self._db.execute("DELETE FROM journal WHERE seq <= ?", (before_seq,)).rowcount

    def shrink(self) -> None:
        """Give pages that are free back to the file system, a few at a time: the journal need not wait, and little room will do.

        A file that had to be opened alone is opened anew, so that others may read it again.
        """
        with self._disk():
            if is_alone(self._db) and shutil.disk_usage(Path(self.path).parent).free > _INDEX_BYTES:
                self._db.close()
                self._db = open_database(self.path)
        while True:
            with self._disk():
                free = int(self._db.execute("PRAGMA freelist_count").fetchone()[0])
                if free:  # by a script, because execute() stops after one page
                    self._db.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")
                self._db.execute("PRAGMA busy_timeout=0")  # who reads beside us need not hold up the journal
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._db.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
                is_incremental = self._db.execute("PRAGMA auto_vacuum").fetchone()[0] == 2
            if free <= _VACUUM_PAGES or not is_incremental:
                return

    def drop_copies(self) -> None:
        """Delete the copies of older formats that an upgrade left."""
        drop_copies(self.path)

    # ------------------------------------------------------------------------------------------------------- plumbing

    def _rows(self, query: str, *values: object) -> list[Any]:
        """All rows at once: a cursor that stays open would be in the way of the next checkpoint."""
        with self._disk():
            return self._db.execute(query, values).fetchall()

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
        except (sqlite3.OperationalError, OSError) as error:
            folder = Path(self.path).parent
            free = f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB free)" if folder.is_dir() else ""
            raise Unavailable(f"{self.path}: {error}{free}: make room or check the disk, then it goes on") from error
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise
            raise BadConfig(f"{self.path}: {error}: {DAMAGED}") from error
