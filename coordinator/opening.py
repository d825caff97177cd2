"""How the database file is opened: whole, of today's format, and without room on the disk if need be.

A database with a write-ahead log has an index of that log in a file beside it, which readers share.  A full disk has no room
for one, although nothing is to be written yet; then the file is opened for us alone, with the index in memory.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Final

from coordinator import wal
from coordinator.migrations import NEWEST, found_version, upgrade
from protocol.errors import BadConfig, Unavailable

DAMAGED: Final = "restore it from a copy, or move the whole folder away to start afresh"

_CACHE_KIB: Final = 256
"""Of SQLite's pages; 2 MiB unless told.  What is written is soon not needed any more, and what is read is read once."""

logger = logging.getLogger(__name__)


def open_database(path: str, *, read_only: bool = False) -> sqlite3.Connection:
    """Open (and create, and upgrade) a database; `:memory:` is one.  Cost: one read of the file.

    With `read_only` nothing on disk changes, and all that is read is of one moment.  Raises BadConfig for a file that is
    damaged or of a newer version, sqlite3.DatabaseError for one that is none, sqlite3.OperationalError or OSError when the
    disk refuses.
    """
    _check_log(Path(f"{path}-wal"))
    if read_only:
        return _for_reading(path)
    try:
        return _for_writing(path)
    except sqlite3.OperationalError as error:
        if not Path(path).is_file() or not Path(path).stat().st_size:
            raise
        db = _for_writing(path, alone=True)
        text = "%s is opened for this process alone, until there is room: %s"
        logger.warning(text, path, error, extra={"action": "opened_alone"})
        return db


def is_alone(db: sqlite3.Connection) -> bool:
    """Whether nobody else can read the file while this connection is open."""
    return bool(db.execute("PRAGMA locking_mode").fetchone()[0] == "exclusive")


def _check_log(log: Path) -> None:
    """Refuse a write-ahead log that SQLite would silently take for a shorter one."""
    try:
        torn = wal.torn(log) and wal.torn(log)  # the first look may have met a coordinator that was just writing
    except OSError as error:
        raise Unavailable(f"{log} cannot be read: {error}: check the disk") from error
    if torn:
        raise BadConfig(
            f"{log} is damaged at byte {torn.offset}: {torn.n_commits} commits behind it, which were answered for, "
            f"cannot be read: restore the folder from a copy; or go on without them, after "
            f"`truncate --size {torn.offset} {log}`"
        )


def _for_writing(path: str, *, alone: bool = False) -> sqlite3.Connection:
    db = _connect(path)
    try:
        if alone:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
        found_version(db, path)
        fault = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if fault != "ok":
            raise BadConfig(f"{path} is damaged ({fault}): {DAMAGED}")
        incremental = db.execute("PRAGMA auto_vacuum").fetchone()[0] == 2
        if not incremental:
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        db.execute("PRAGMA secure_delete=FAST")  # zeros over what is deleted would need as much room in the log
        upgrade(db, path)
        if not incremental and path != ":memory:":
            with suppress(sqlite3.OperationalError):  # no room for it today: the file only does not shrink
                db.execute("VACUUM")
    except BaseException:
        db.close()
        raise
    return db


def _for_reading(path: str) -> sqlite3.Connection:
    """Without a log beside it nobody has the file open, and it is read as it lies there; an older format is read from a copy."""
    how = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
    db = _connect(f"{Path(path).absolute().as_uri()}?{how}")
    try:
        if found_version(db, path) < NEWEST:
            old, db = db, _connect(":memory:")
            old.backup(db)
            old.close()
            upgrade(db, ":memory:")
        db.execute("BEGIN")  # everything read is of one moment
    except BaseException:
        db.close()
        raise
    return db


def _connect(where: str) -> sqlite3.Connection:
    uri = where.startswith("file:")
    return sqlite3.connect(where, uri=uri, check_same_thread=False, isolation_level=None)
