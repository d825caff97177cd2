"""Was every promise kept?  Read from what a fleet left behind: its journal, its blobs and its logs.

journal   replayed through the real core: every accepted update is in exactly one aggregate, or there is a reason why not
blobs     every aggregate is folded again from the updates that the journal names: the same bytes
logs      no trace of an exception, no event that the core could not take
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from coordinator import folding
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import Fleet as Core
from coordinator.core.state import ENDED
from coordinator.store import Store
from protocol.blobs import Blobs

FAULTS: Final = re.compile(r"Traceback \(most recent|never retrieved|action=(?:crashed|poison|task_crashed|garbled)\b")
CHUNK_BYTES: Final = 4096


class Books(NamedTuple):
    """What the journal says of updates, and what is wrong with it."""

    accepted: int
    late: int
    declined: int
    left_over: int
    """Accepted, but their job ended, or they were too late, before they could be folded."""
    folded_again: int
    broken: list[str]


def audit(state_dir: Path) -> Books:
    """Read the books of a stopped coordinator.  Cost: one replay and one fold per version."""
    store, blobs, core = Store(state_dir / "journal.sqlite"), Blobs(state_dir / "blobs"), Core()
    broken: list[str] = []
    declined = 0
    stored: dict[tuple[str, str, int], str] = {}
    folds: dict[tuple[str, int], act.Aggregate] = {}
    made: dict[tuple[str, int], str] = {}
    for entry in store.replay():
        wishes = core.handle(entry.event, entry.at)
        core.check()
        declined += sum(isinstance(wish, act.Decline) for wish in wishes)
        folds |= {(wish.job, wish.version): wish for wish in wishes if isinstance(wish, act.Aggregate)}
        match entry.event:
            case ev.UpdateStored(agent=agent, offer=offer) if any(isinstance(w, act.Acknowledge) for w in wishes):
                first = stored.setdefault((offer.job, agent, offer.round), offer.blob.sha256)
                if first != offer.blob.sha256:
                    broken.append(f"{offer.job}: two updates of {agent} for round {offer.round} were accepted")
            case ev.Aggregated(job=job, version=version, master=master):
                made[job, version] = master
    store.close()
    counted = Counter((c.sha256, job, c.agent, c.round) for (job, v) in made for c in folds[job, v].contributions)
    broken += [
        f"{job}: the update of {a} for round {r} was counted {n} times"
        for (_, job, a, r), n in counted.items()
        if n > 1
    ]
    left = [key for key, sha256 in stored.items() if (sha256, *key) not in counted]
    broken += [
        f"{job}: an accepted update of {agent} for round {number} was lost"
        for job, agent, number in left
        if not _may_be_left(core, job, number)
    ]
    n_again, otherwise = _folded_again(folds, made, blobs)
    late = sum(c.round < folds[job, v].round for (job, v) in made for c in folds[job, v].contributions)
    return Books(len(stored), late, declined, len(left), n_again, broken + otherwise)


def _may_be_left(core: Core, job: str, number: int) -> bool:
    """An update is left over when its job ended without folding its round, or before another fold could take it late."""
    state = core.state.jobs[job]
    return state.phase in ENDED and number + state.spec.round.max_staleness > state.round_number


def _folded_again(
    folds: Mapping[tuple[str, int], act.Aggregate], made: Mapping[tuple[str, int], str], blobs: Blobs
) -> tuple[int, list[str]]:
    """How many versions could be folded again, their updates being there still, and which came out otherwise."""
    n, broken = 0, []
    for (job, version), master in made.items():
        fold = folds[job, version]
        if all(blobs.has(sha256) for sha256 in [fold.master or master, *(c.sha256 for c in fold.contributions)]):
            n += 1
            if (found := folding.fold(fold, blobs, CHUNK_BYTES).master) != master:
                broken.append(f"{job}: version {version} folded again is {found[:12]}, not {master[:12]}")
    return n, broken


def read_logs(logs: Mapping[str, str]) -> list[str]:
    """Lines that no fault from outside may bring about."""
    return [
        f"{name}: {line.strip()[:200]}"
        for name, text in logs.items()
        for line in text.splitlines()
        if FAULTS.search(line)
    ]


class Growth:
    """Memory and open files of every daemon, by process: what it had once it was settled, and its most since."""

    def __init__(self, settled_s: float = 30.0, max_bytes: int = 48 * 2**20, max_files: int = 24) -> None:
        self._settled_s, self._max_bytes, self._max_files = settled_s, max_bytes, max_files
        self._first: dict[tuple[str, int], tuple[int, int]] = {}
        self._last: dict[tuple[str, int], tuple[int, int]] = {}
        self.max_rss_bytes: dict[str, int] = {}

    def sample(self, name: str, pid: int, age_s: float, rss_bytes: int, n_files: int) -> None:
        """One look at a daemon."""
        self.max_rss_bytes[name] = max(self.max_rss_bytes.get(name, 0), rss_bytes)
        if age_s >= self._settled_s:
            self._first.setdefault((name, pid), (rss_bytes, n_files))
            self._last[name, pid] = (rss_bytes, n_files)

    def broken(self) -> list[str]:
        """Daemons that grew."""
        found = []
        for (name, pid), (rss_bytes, n_files) in self._last.items():
            more_bytes, more_files = rss_bytes - self._first[name, pid][0], n_files - self._first[name, pid][1]
            if more_bytes > self._max_bytes or more_files > self._max_files:
                found.append(f"{name} ({pid}) grew by {more_bytes / 2**20:.0f} MiB and {more_files} open files")
        return found
