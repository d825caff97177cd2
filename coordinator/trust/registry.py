"""Who may be an agent: tokens, enrolments and certificates, in one SQLite file of their own.

    enrolment   pending -> accepted -> revoked        pending -> rejected        rejected | revoked -> pending again, by a new token

Facts only; coordinator/trust/office.py decides.  Every change is one durable commit (WAL, synchronous=FULL) before anybody is
told.  A token's secret is not stored, its sha256 is.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from protocol.errors import IllegalMove, Unavailable
from protocol.files import give_to_folder

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS tokens (
  id TEXT PRIMARY KEY, secret_sha256 TEXT NOT NULL, agent TEXT NOT NULL, uses INTEGER NOT NULL, auto_accept INTEGER NOT NULL,
  made_at REAL NOT NULL, expires_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS uses (
  token TEXT NOT NULL, key TEXT NOT NULL, agent TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (token, key)
);
CREATE TABLE IF NOT EXISTS enrolments (
  agent TEXT PRIMARY KEY, state TEXT NOT NULL, key TEXT NOT NULL, csr TEXT NOT NULL, address TEXT NOT NULL, asked_at REAL NOT NULL,
  decided_at REAL NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS certificates (
  serial TEXT PRIMARY KEY, agent TEXT NOT NULL, key TEXT NOT NULL, pem TEXT NOT NULL, issued_at REAL NOT NULL,
  expires_at REAL NOT NULL, revoked_at REAL NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS certificates_by_agent ON certificates (agent, key);
"""


class Standing(StrEnum):
    """Where an enrolment stands."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    REVOKED = "revoked"


MOVES: Final[dict[Standing, frozenset[Standing]]] = {
    Standing.PENDING: frozenset({Standing.ACCEPTED, Standing.REJECTED}),
    Standing.ACCEPTED: frozenset({Standing.REVOKED}),
    Standing.REJECTED: frozenset({Standing.PENDING}),
    Standing.REVOKED: frozenset({Standing.PENDING}),
}


class JoinToken(NamedTuple):
    """A token as it is stored; instants are seconds since the epoch."""

    id: str
    secret_sha256: str
    agent: str
    uses: int
    auto_accept: bool
    made_at: float
    expires_at: float


class Use(NamedTuple):
    """Who used a token, with which key (its digest)."""

    token: str
    key: str
    agent: str
    at: float


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """One agent's enrolment.  `key` is the digest of the key that it asked with, `expires_at` the end of its newest certificate."""

    agent: str
    state: Standing
    key: str
    csr: str
    address: str
    asked_at: float
    decided_at: float = 0.0
    reason: str = ""
    expires_at: float = 0.0


# Works the type out, while there is one thread: two that do so at once end the process (msgspec 0.22).
msgspec.msgpack.Decoder(Enrolment)


class Certificate(NamedTuple):
    """One that was issued."""

    serial: int
    agent: str
    key: str
    pem: str
    issued_at: float
    expires_at: float
    revoked_at: float


class Registry:
    """Opens (and creates) the file.  Any thread may call it.  Raises Unavailable when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.RLock()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            give_to_folder(path)  # sqlite gives its other files to whom this one belongs
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise Unavailable(f"{path} cannot be opened: {error}: check the disk and the file's owner") from None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Everything in this block is one commit, and nothing else happens meanwhile; an error undoes it."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise Unavailable(f"{self._path}: {error}: make room or check the disk, then try again") from None

    # -------------------------------------------------------------------------------------------------------- tokens

    def add_token(self, token: JoinToken) -> None:
        """Remember a token."""
        self._db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?)", token)

    def token(self, name: str) -> JoinToken | None:
        """The token of this name."""
        row = self._row("SELECT * FROM tokens WHERE id = ?", name)
        return JoinToken(*row)._replace(auto_accept=bool(row[4])) if row else None

    def used_by(self, token: str, key: str) -> str:
        """As which agent this key used it; empty when it did not."""
        row = self._row("SELECT agent FROM uses WHERE token = ? AND key = ?", token, key)
        return str(row[0]) if row else ""

    def users(self, token: str) -> tuple[int, list[str]]:
        """How many keys used it, and the first three agents."""
        (n_uses,) = self._rows("SELECT COUNT(*) FROM uses WHERE token = ?", token)[0]
        first = self._rows("SELECT agent FROM uses WHERE token = ? ORDER BY at, rowid LIMIT 3", token)
        return int(n_uses), [str(agent) for (agent,) in first]

    def use(self, use: Use) -> None:
        """Remember that a token was used."""
        self._db.execute("INSERT INTO uses VALUES (?, ?, ?, ?)", use)

    # ---------------------------------------------------------------------------------------------------- enrolments

    def enrolment(self, agent: str) -> Enrolment | None:
        """One agent's."""
        row = self._row(f"{_ENROLMENTS} WHERE e.agent = ?", agent)
        return _enrolment(row) if row else None

    def enrolments(self) -> list[Enrolment]:
        """All, by name."""
        return [_enrolment(row) for row in self._rows(f"{_ENROLMENTS} ORDER BY e.agent")]

    def ask(self, agent: str, key: str, csr: str, address: str, now: float) -> None:
        """A new request, or one again after an end."""
        self._check_move(agent, Standing.PENDING)
        self._db.execute(
            "INSERT OR REPLACE INTO enrolments (agent, state, key, csr, address, asked_at) VALUES (?, 'pending', ?, ?, ?, ?)",
            (agent, key, csr, address, now),
        )

    def decide(self, agent: str, to: Standing, reason: str, now: float) -> None:
        """Move an enrolment on."""
        self._check_move(agent, to)
        self._db.execute(
            "UPDATE enrolments SET state = ?, reason = ?, decided_at = ? WHERE agent = ?", (to, reason, now, agent)
        )

    def _check_move(self, agent: str, to: Standing) -> None:
        known = self.enrolment(agent)
        if to not in (MOVES[known.state] if known else {Standing.PENDING}):
            raise IllegalMove(f"enrolment of {agent}: {known.state if known else 'unknown'} -> {to}")

    # -------------------------------------------------------------------------------------------------- certificates

    def add_certificate(self, issued: Certificate) -> None:
        """Remember what was issued."""
        self._db.execute("INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, ?)", (str(issued.serial), *issued[1:]))

    def certificate(self, serial: int) -> Certificate | None:
        """By its serial number."""
        row = self._row("SELECT * FROM certificates WHERE serial = ?", str(serial))
        return _certificate(row) if row else None

    def certificate_of(self, agent: str, key: str) -> Certificate | None:
        """The newest one for this agent's key that is not revoked."""
        row = self._row(
            "SELECT * FROM certificates WHERE agent = ? AND key = ? AND revoked_at = 0 ORDER BY issued_at DESC LIMIT 1",
            *(agent, key),
        )
        return _certificate(row) if row else None

    def newest_certificates(self, now: float) -> list[Certificate]:
        """The newest one of every accepted agent that has one that is valid, by name."""
        rows = self._rows(
            "SELECT c.*, MAX(c.issued_at) FROM certificates c JOIN enrolments e ON e.agent = c.agent "
            "WHERE e.state = 'accepted' AND c.revoked_at = 0 AND c.expires_at > ? GROUP BY c.agent ORDER BY c.agent",
            now,
        )
        return [_certificate(row[:-1]) for row in rows]

    def revoke_certificates(self, agent: str, now: float) -> None:
        """Revoke everything that was issued to an agent."""
        self._db.execute("UPDATE certificates SET revoked_at = ? WHERE agent = ? AND revoked_at = 0", (now, agent))

    def revoked(self) -> dict[int, float]:
        """Serial numbers of revoked certificates, with the instant."""
        return {
            int(serial): at
            for serial, at in self._rows("SELECT serial, revoked_at FROM certificates WHERE revoked_at > 0")
        }

    def _row(self, query: str, *values: str) -> tuple[Any, ...] | None:
        return next(iter(self._rows(query, *values)), None)

    def _rows(self, query: str, *values: str | float) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                raise Unavailable(f"{self._path}: {error}: check the disk, then try again") from None


_ENROLMENTS: Final = """
SELECT e.*, (SELECT COALESCE(MAX(c.expires_at), 0) FROM certificates c WHERE c.agent = e.agent AND c.revoked_at = 0)
FROM enrolments e"""


def _enrolment(row: tuple[Any, ...]) -> Enrolment:
    return msgspec.convert(dict(zip(Enrolment.__struct_fields__, row, strict=True)), Enrolment)


def _certificate(row: tuple[Any, ...]) -> Certificate:
    return Certificate(int(row[0]), *row[1:])
