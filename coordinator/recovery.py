"""From the store back to the core: the newest snapshot that can be read, and the journal after it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import msgspec

from coordinator.core import actions as act
from coordinator.core.fleet import Fleet, decode_state
from coordinator.core.state import ENDED, FleetState
from coordinator.store import Store
from protocol.blobs import Blobs
from protocol.errors import BadConfig, Unavailable
from protocol.messages import TERMINAL, ExecState

logger = logging.getLogger(__name__)


class Recovered(NamedTuple):
    """The core after row `seq`; `owed` is what may not have been written down before a crash."""

    fleet: Fleet
    seq: int
    owed: list[act.Written]


def recover(store: Store, before: int = 2**62) -> Recovered:
    """The core as the journal's rows below `before` leave it.

    A row that the core cannot take is marked and left out: it must not stop every restart.  Raises BadConfig for a state of a
    newer program, and when no snapshot can be read and the journal does not reach back to its beginning.
    """
    while True:
        seq, fleet = _start(store, before)
        owed: list[act.Written] = []
        for entry in store.replay(seq, before):
            try:
                wishes = fleet.handle(entry.event, entry.at)
            except Exception:
                logger.exception("a journal row is poison", extra={"action": "poison", "seq": entry.seq})
                store.poison(entry.seq)
                break
            owed += [wish for wish in wishes if isinstance(wish, act.Written)]
            seq = entry.seq
        else:
            return Recovered(fleet, seq, owed)


def _start(store: Store, before: int) -> tuple[int, Fleet]:
    for saved in store.snapshots(before):
        try:
            return saved.seq, Fleet(decode_state(saved.state))
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            logger.error("a snapshot is unreadable: %s", error, extra={"action": "snapshot_lost", "seq": saved.seq})
    if store.has_snapshots() and store.first_seq() != 1:
        raise BadConfig(
            f"{store.path}: no snapshot can be read and the journal before them is pruned: restore it from a copy, or move "
            "the whole folder away to start afresh"
        )
    return 0, Fleet()


# ----------------------------------------------------------------------------------------------------- the files it needs


def references(state: FleetState) -> set[str]:
    """Digests of all files that the core may still ask for: each job's last version and the updates that are to be folded."""
    found: set[str] = set()
    for job in state.jobs.values():
        found |= {job.master} | ({job.model.sha256} if job.model else set())
        if job.phase in ENDED:
            continue
        shares = [*job.carried.values(), *(job.round.shares.values() if job.round else ())]
        wanted = [s for s in shares if s.state is ExecState.DONE or s.state not in TERMINAL]
        late = [*job.late, *(job.round.late if job.round else ())]
        found |= {s.offer.blob.sha256 for s in wanted if s.offer} | {c.sha256 for c in late}
    return found - {""}


def check_folder(folder: Path) -> Path:
    """Make the state folder if need be, and say where its journal is or will be.

    Raises Unavailable when the folder cannot be made, and BadConfig where a journal must have been lost, instead of starting
    afresh on what it described.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be made: {error.strerror}: see state_dir") from error
    journal, blobs = folder / "journal.sqlite", folder / "blobs"  # made in this order
    if not blobs.is_dir() or journal.with_name("journal.sqlite-wal").exists():
        return journal
    if journal.exists():
        what = "" if journal.stat().st_size else "is empty"
    else:
        what = "is gone, while files that it described are there" if any(f.is_file() for f in blobs.iterdir()) else ""
    if what:
        raise BadConfig(f"{journal} {what}: restore it from a copy, or move the whole folder away to start afresh")
    return journal


def check_files(state: FleetState, blobs: Blobs) -> None:
    """Raise BadConfig when a file is gone without which a job cannot go on; nothing is given up behind the operator's back."""
    for name, job in state.jobs.items():
        for sha256 in {job.master, job.model.sha256 if job.model else ""} - {""}:
            if job.phase not in ENDED and not blobs.has(sha256):
                raise BadConfig(
                    f"{blobs.path(sha256)} is gone: job {name!r} cannot go on without its version {job.version}: restore "
                    "the file from a copy of the folder (its name is its sha256)"
                )
