"""What may go: versions, updates and old journal beyond what is kept; never anything that is needed to go on.

First by count, as [keep] says: the newest versions of each job and its best by held-out loss, the updates of the last rounds,
the journal back to the last round ends, as far as `keep.replay_bytes` and the disk allow.  Then by size: while all that is
left is more than the folder may have, the oldest piece goes, the best versions last.  Needed, whatever the size: what the core
refers to (coordinator/recovery.py), the newest version of every job, whatever the core has not yet heard of, and the two newest
snapshots with the journal behind them.

`choose` decides over values; `prune` carries it out.  It forgets in the database first and deletes files afterwards: a crash
in between leaves files that nothing refers to, and those are swept at the next start.
"""

from __future__ import annotations

import logging
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple

from coordinator.config import Keep
from coordinator.core.state import ENDED, FleetState
from coordinator.recovery import references
from coordinator.store import Frame, Store, Version
from protocol.blobs import Blobs

MIN_FRAMES: Final = 2
"""The newest snapshot, and the one before it for the case that it cannot be read."""
ORPHAN_AGE_S: Final = 3600.0
"""While the coordinator runs, a file that nothing refers to may be of a fact under way; older ones are not."""

logger = logging.getLogger(__name__)
Key = tuple[str, int]
"""(job, version)"""


class Need(NamedTuple):
    """What the core needs at this moment: files by digest, each job's version that it knows, and which jobs have not ended."""

    digests: set[str]
    settled: dict[str, int]
    running: set[str]


class Inventory(NamedTuple):
    """What there is: versions that are kept, sizes of files by digest, snapshots oldest first, all other bytes."""

    versions: list[Version]
    sizes: Mapping[str, int]
    best: dict[str, int]
    frames: list[Frame]
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return self.other_bytes + sum(f.n_bytes for f in self.frames) + sum(self.sizes.values())


class Cut(NamedTuple):
    """What goes: versions, updates (of a version), and snapshots before a place with the journal up to it (0: none)."""

    versions: set[Key]
    updates: set[Key]
    before_seq: int


class Pruned(NamedTuple):
    """What went."""

    n_versions: int
    n_update_files: int
    n_events: int
    n_files: int
    n_bytes: int


def need_of(state: FleetState, under_way: Iterable[str] = ()) -> Need:
    """What a state needs, beside digests of files that are being pulled or judged."""
    jobs = state.jobs
    running = {name for name, job in jobs.items() if job.phase not in ENDED}
    return Need(references(state) | set(under_way), {name: job.version for name, job in jobs.items()}, running)


# --------------------------------------------------------------------------------------------------------------- choose


def _files(version: Version) -> set[str]:
    return {version.master, version.model.sha256}


def choose(there: Inventory, keep: Keep, need: Need, max_bytes: int, history_bytes: int | None = None) -> Cut:
    """What goes so that the counts hold and, as far as that is possible, the total is at most `max_bytes`.  Pure.

    `history_bytes`: what snapshots and journal may have, where it is less than [keep] allows.
    """
    allowed_bytes = keep.replay_bytes if history_bytes is None else min(keep.replay_bytes, history_bytes)
    may_go = {v.job: need.settled.get(v.job, 0) for v in there.versions}
    newest = {v.job: v.version for v in there.versions}  # they are in order
    loose = {(v.job, v.version) for v in there.versions if v.version <= may_go[v.job]}
    pinned = {key for v in there.versions if (key := (v.job, v.version)) not in loose or newest[v.job] == v.version}
    pinned |= {(v.job, v.version) for v in there.versions if _files(v) & need.digests}
    versions, updates = _by_count(there, keep, need, loose, pinned)
    cut = Cut(versions, updates | versions, _oldest_kept(there.frames, keep.replay_rounds, allowed_bytes))
    return _by_size(there, need, cut, loose, pinned, max_bytes)


def _by_count(there: Inventory, keep: Keep, need: Need, loose: set[Key], pinned: set[Key]) -> tuple[set[Key], set[Key]]:
    versions: set[Key] = set()
    updates: set[Key] = set()
    for job in {v.job for v in there.versions}:
        mine = [(v.job, v.version) for v in there.versions if v.job == job]
        n_kept = keep.versions if job in need.running else keep.ended_versions
        versions |= {k for k in mine[:-n_kept] if k not in pinned and there.best.get(job) != k[1]}
        updates |= {k for k in mine[: len(mine) - keep.update_rounds] if k in loose}
    return versions, updates


def _oldest_kept(frames: list[Frame], n_kept: int, max_bytes: int) -> int:
    """The place of the oldest snapshot that may stay; 0 where all may."""
    sums = list(accumulate(frame.n_bytes for frame in reversed(frames)))
    n_stay = max(MIN_FRAMES, min(n_kept, bisect_right(sums, max_bytes)))
    return frames[-n_stay].seq if n_stay < len(frames) else 0


def _by_size(there: Inventory, need: Need, cut: Cut, loose: set[Key], pinned: set[Key], max_bytes: int) -> Cut:
    uses = Counter(dict.fromkeys(need.digests, 1))
    for v in there.versions:
        uses.update(_kept_files(v, cut))
    frames = [f for f in there.frames if f.seq >= cut.before_seq]
    total = there.other_bytes + sum(f.n_bytes for f in frames) + sum(there.sizes.get(d, 0) for d in uses)

    def drop(digests: Iterable[str]) -> int:
        gone = 0
        for digest in digests:
            uses[digest] -= 1
            gone += 0 if uses[digest] else there.sizes.get(digest, 0)
        return gone

    versions, updates, before_seq = set(cut.versions), set(cut.updates), cut.before_seq
    pieces = _pieces(there, Cut(versions, updates, before_seq), loose, pinned, frames)
    for _, _, kind, piece in sorted(pieces, key=lambda p: p[:3]):
        if total <= max_bytes:
            break
        if isinstance(piece, Frame):
            total -= piece.n_bytes
            before_seq = frames[frames.index(piece) + 1].seq
            continue
        key = (piece.job, piece.version)
        if kind == "updates":
            total -= drop({c.sha256 for c in piece.updates})
        else:
            total -= drop(_files(piece) | ({c.sha256 for c in piece.updates} if key not in updates else set()))
            versions.add(key)
        updates.add(key)
    return Cut(versions, updates, before_seq)


def _kept_files(version: Version, cut: Cut) -> set[str]:
    """The files that this version still stands for after a cut."""
    key = (version.job, version.version)
    files = set() if key in cut.versions else _files(version)
    return files | (set() if key in cut.updates else {c.sha256 for c in version.updates})


def _pieces(
    there: Inventory, cut: Cut, loose: set[Key], pinned: set[Key], frames: list[Frame]
) -> Iterable[tuple[bool, float, str, Version | Frame]]:
    """What could still go: (is a best version, when it was made, what it is, itself)."""
    for v in there.versions:
        key = (v.job, v.version)
        if v.updates and key in loose and key not in cut.updates:
            yield False, v.at, "updates", v
        if key not in pinned and key not in cut.versions:
            yield there.best.get(v.job) == v.version, v.at, "version", v
    yield from ((False, f.at, "frame", f) for f in frames[:-MIN_FRAMES])


# ---------------------------------------------------------------------------------------------------------------- prune


def prune(store: Store, blobs: Blobs, keep: Keep, need: Need, deficit_bytes: int = 0, tight_bytes: int = 0) -> Pruned:
    """Choose and delete.  With `deficit_bytes` so much more goes than the counts ask for, if there is so much.  Blocking.

    With `tight_bytes` so much of snapshots and journal goes, as far as nobody needs it to go on.  Raises Unavailable or
    OSError when the disk refuses; what was not deleted is deleted the next time.
    """
    there = take_inventory(store, blobs)
    max_bytes = keep.max_bytes or there.total_bytes
    history_bytes = sum(frame.n_bytes for frame in there.frames) - tight_bytes
    cut = choose(there, keep, need, min(max_bytes, there.total_bytes - deficit_bytes), history_bytes)
    n_events = 0
    n_update_files = len({c.sha256 for v in there.versions if (v.job, v.version) in cut.updates for c in v.updates})
    if cut.versions or n_update_files or cut.before_seq:
        n_events = store.forget(cut.versions, cut.updates, cut.before_seq)
    used = need.digests.union(*(_kept_files(v, cut) for v in there.versions))
    former = {d for v in there.versions for d in _files(v) | {c.sha256 for c in v.updates}}
    n_files, n_bytes = delete(blobs, (former & there.sizes.keys()) - used)
    more_files, more_bytes = sweep(blobs, used | former, ORPHAN_AGE_S)
    store.shrink()  # also what the last time found no room to be moved
    n_bytes += more_bytes
    return Pruned(len(cut.versions), n_update_files, n_events, n_files + more_files, n_bytes)


def take_inventory(store: Store, blobs: Blobs) -> Inventory:
    """What there is.  Cost: one look at each file of the folder and at each row's length."""
    versions = [v for v in store.versions() if v.kept]
    sizes = {sha256: size for sha256 in blobs if (size := _size(blobs.path(sha256))) is not None}
    frames = store.frames()
    # os.walk, because folders may vanish meanwhile: exports are renamed into place
    everything = (Path(folder, name) for folder, _, names in os.walk(blobs.folder.parent) for name in names)
    total = sum(size for path in everything if (size := _size(path)) is not None)
    best = {job: best for job in {v.job for v in versions} if (best := _best(store, job, versions)) is not None}
    other = total - sum(f.n_bytes for f in frames) - sum(sizes.values())
    return Inventory(versions, sizes, best, frames, max(0, other))


def _best(store: Store, job: str, versions: list[Version]) -> int | None:
    past = store.past(job)
    losses = {v.version: past.loss(v.version) for v in versions if v.job == job}
    measured = {version: loss for version, loss in losses.items() if loss is not None}
    return min(measured, key=lambda version: (measured[version], -version), default=None)


def _size(path: Path) -> int | None:
    """Bytes of a plain file; None for one that is gone or is none."""
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else None
    return None


def sweep(blobs: Blobs, used: set[str], older_than_s: float = 0.0) -> tuple[int, int]:
    """Delete files that nothing refers to: how many, of how many bytes."""
    oldest = time.time() - older_than_s
    unused = [sha256 for sha256 in blobs if sha256 not in used]
    return delete(blobs, unused, lambda path: not older_than_s or path.stat().st_mtime < oldest)


def delete(blobs: Blobs, digests: Iterable[str], may: Callable[[Path], bool] = lambda _: True) -> tuple[int, int]:
    """Delete these files, where they are there and `may` lets them go: how many, of how many bytes."""
    n_files = n_bytes = 0
    for sha256 in digests:
        path = blobs.path(sha256)
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            if may(path):
                path.unlink()
                n_files, n_bytes = n_files + 1, n_bytes + size
    return n_files, n_bytes


def used_files(store: Store, need: Need) -> set[str]:
    """Digests of all files that the core or a kept version stands for."""
    return need.digests.union(*(_kept_files(v, Cut(set(), set(), 0)) for v in store.versions() if v.kept))
