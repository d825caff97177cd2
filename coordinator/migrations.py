"""The journal file's format from version to version: steps that only ever go forward, each in a transaction of its own.

    0 -> 1   journal, one snapshot, rounds, versions
    1 -> 2   many snapshots, checksums, and for each version what it was made of and whether its files are still kept
    2 -> 3   snapshots as lists of pieces that they share, and the details of ended jobs beside the state

The number is in the file (`user_version`).  It counts whatever an older program could not read any more: tables, and kinds of
events or shapes of the state in them.  A new file walks all steps; an old one is copied beside itself first, by SQLite's own
backup.  A crash between two steps leaves a file of the version in between, and the next start goes on there.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import Final

from protocol.errors import BadConfig
from protocol.files import sync_folder

logger = logging.getLogger(__name__)

STEPS: Final[tuple[tuple[str, ...], ...]] = (
    (
        """CREATE TABLE IF NOT EXISTS journal (
             seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL,
             poison INTEGER NOT NULL DEFAULT 0)""",
        """CREATE TABLE IF NOT EXISTS snapshot (
             id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, state BLOB NOT NULL)""",
        """CREATE TABLE IF NOT EXISTS rounds (
             job TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL, purpose TEXT NOT NULL,
             record BLOB NOT NULL, PRIMARY KEY (job, round, attempt, purpose))""",
        """CREATE TABLE IF NOT EXISTS versions (
             job TEXT NOT NULL, version INTEGER NOT NULL, round INTEGER NOT NULL, master TEXT NOT NULL,
             model BLOB NOT NULL, dropped_ratio REAL NOT NULL, at REAL NOT NULL, PRIMARY KEY (job, version))""",
    ),
    (
        "ALTER TABLE journal ADD COLUMN crc INTEGER",
        """CREATE TABLE snapshots (
             seq INTEGER PRIMARY KEY, at REAL NOT NULL, software TEXT NOT NULL, crc INTEGER, state BLOB NOT NULL)""",
        """INSERT INTO snapshots SELECT seq,
             COALESCE((SELECT MAX(at) FROM journal WHERE journal.seq <= snapshot.seq), 0), '', NULL, state FROM snapshot""",
        "DROP TABLE snapshot",
        "ALTER TABLE versions ADD COLUMN updates BLOB NOT NULL DEFAULT x'90'",
        "ALTER TABLE versions ADD COLUMN kept INTEGER NOT NULL DEFAULT 1",
    ),
    (
        """CREATE TABLE pieces (
             id INTEGER PRIMARY KEY, half INTEGER NOT NULL, sha256 BLOB NOT NULL, body BLOB NOT NULL, UNIQUE (half, sha256))""",
        "ALTER TABLE snapshots ADD COLUMN half INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE snapshots ADD COLUMN pieces BLOB NOT NULL DEFAULT x''",
        "CREATE TABLE ended (job TEXT PRIMARY KEY, crc INTEGER NOT NULL, detail BLOB NOT NULL)",
    ),
)
NEWEST: Final = len(STEPS)


def found_version(db: sqlite3.Connection, where: str) -> int:
    """The file's version; 0 for a new one.  Raises BadConfig for a file of a newer program."""
    found = int(db.execute("PRAGMA user_version").fetchone()[0])
    if found > NEWEST:
        raise BadConfig(
            f"{where} was written by a newer fedpipe (format {found}, this one reads up to {NEWEST}): install that version "
            f"again, or go back to the copy {where}.v{NEWEST} if there is one and give up what came after it"
        )
    return found


def upgrade(db: sqlite3.Connection, path: str) -> None:
    """Bring an open file to the newest version; a copy `PATH.vN` of an older one stays beside it until `drop_copies`.

    Raises BadConfig for a newer file, sqlite3.Error or OSError when the disk refuses: the file is then of its old version,
    or of one in between.
    """
    found = found_version(db, path)
    if 0 < found < NEWEST and path != ":memory:":
        _copy(db, Path(f"{path}.v{found}"))
    for version, step in enumerate(STEPS[found:], found + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in step:
                db.execute(statement)
            db.execute(f"PRAGMA user_version={version}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        if found and path != ":memory:":
            logger.warning("%s is now of format %d", path, version, extra={"action": "migrated", "was": found})


def _copy(db: sqlite3.Connection, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    copy = sqlite3.connect(part)
    try:
        db.backup(copy)
    finally:
        copy.close()
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    sync_folder(target.parent)


def drop_copies(path: str) -> None:
    """Delete the copies of older versions: a round has closed since, and going back would lose it."""
    for version in range(1, NEWEST):
        Path(f"{path}.v{version}").unlink(missing_ok=True)
