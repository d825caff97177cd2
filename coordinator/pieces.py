"""A snapshot cut into pieces, so that what did not change since an earlier one is in the file once.

Nearly all of a large state is what agents measured when they were surveyed, what was planned for them, and jobs that ended:
the same bytes in one snapshot after the other.  So a state is cut where such a part begins or ends, and a piece is stored by
its content.  The places of the cuts are found by the names of fields in the encoded bytes.  Nothing but economy hangs on them:
the pieces in order are always the whole, wherever it was cut.

A bit that turns in a shared piece would spoil every snapshot that has it, and the one before could not serve for the newest.
So there are two stores of pieces, and neighbours in time never use the same one.

Measured (bench/snapshots.py; 3,000 agents, 224 matrices, 64 scores each): see docs/reliability.md.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

Piece: TypeAlias = tuple[bytes, memoryview]
"""(sha256, bytes)"""
_FIELDS: Final = ("jobs", "spec", "surveyed", "n_train", "calibrated", "uncalibrated", "ranks", "bits")
"""Before each begins something else than what came before it; see core/state.py."""
_BORDERS: Final = [re.compile(re.escape(bytes([0xA0 | len(name)]) + name.encode())) for name in _FIELDS]
"""As MessagePack has them: a short string's head holds its length.  One by one: for any of them it would take twice as long."""
LARGE_BYTES: Final = 2048
"""Whatever lies between two borders and has so much stands alone; smaller neighbours go together."""
MAX_BYTES: Final = 64 * 2**10
"""Of one piece: where a part of something long changes, the rest stays."""


def cut(state: bytes) -> Iterator[memoryview]:
    """The pieces of an encoded state; joined they are the whole.  Cost: a pass in C per field, and a step per border."""
    data = memoryview(state)
    start = at = 0
    for border in [*sorted(found.start() for field in _BORDERS for found in field.finditer(data)), len(data)]:
        if border - at >= LARGE_BYTES:
            if at > start:
                yield data[start:at]
            yield from (data[i : min(i + MAX_BYTES, border)] for i in range(at, border, MAX_BYTES))
            start = border
        elif border - start >= MAX_BYTES:
            yield data[start:border]
            start = border
        at = border
    if at > start:
        yield data[start:at]


def named(state: bytes) -> list[Piece]:
    """The pieces with their digests."""
    return [(hashlib.sha256(piece).digest(), piece) for piece in cut(state)]


def save(db: sqlite3.Connection, half: int, found: Iterable[Piece]) -> bytes:
    """Store what is not there yet, in one of the two stores; the list of pieces.  Call it in a transaction."""
    ids = array("q")
    query = "SELECT id FROM pieces WHERE half = ? AND sha256 = ?"
    for sha256, piece in found:
        known = db.execute(query, (half, sha256)).fetchone()
        ids.append(known[0] if known else _insert(db, half, sha256, piece))
    return ids.tobytes()


def _insert(db: sqlite3.Connection, half: int, sha256: bytes, body: memoryview) -> int:
    return db.execute("INSERT INTO pieces (half, sha256, body) VALUES (?, ?, ?)", (half, sha256, body)).lastrowid or 0


def load(db: sqlite3.Connection, listed: bytes) -> bytes:
    """The whole again; pieces that are gone are missing in it, which its checksum tells."""
    rows = (db.execute("SELECT body FROM pieces WHERE id = ?", (piece,)).fetchone() for piece in _ids(listed))
    return b"".join(row[0] for row in rows if row)


def drop_damaged(db: sqlite3.Connection, listed: bytes) -> None:
    """Delete pieces that are not what was stored, or later snapshots would be made of them."""
    for piece in _ids(listed):
        row = db.execute("SELECT sha256, body FROM pieces WHERE id = ?", (piece,)).fetchone()
        if row and hashlib.sha256(row[1]).digest() != row[0]:
            db.execute("DELETE FROM pieces WHERE id = ?", (piece,))


def drop_unlisted(db: sqlite3.Connection, lists: Iterable[bytes]) -> None:
    """Delete the pieces that no list has.  Cost: one pass over keys."""
    listed = set().union(*map(_ids, lists))
    gone = [(row[0],) for row in db.execute("SELECT id FROM pieces") if row[0] not in listed]
    db.executemany("DELETE FROM pieces WHERE id = ?", gone)


def sizes(db: sqlite3.Connection, lists: Iterable[bytes]) -> list[int]:
    """For lists from old to new: bytes of the pieces that no later one has, which go with the list."""
    of = dict(db.execute("SELECT id, LENGTH(body) FROM pieces"))
    later: set[int] = set()
    found = []
    for listed in reversed(list(lists)):
        own = set(_ids(listed)) - later
        later |= own
        found.append(sum(of.get(piece, 0) for piece in own))
    return found[::-1]


def _ids(listed: bytes) -> array[int]:
    ids = array("q")
    ids.frombytes(listed)
    return ids
