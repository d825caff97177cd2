"""A production journal, run again: the real core over the recorded facts, from the nearest snapshot, on any machine.

What must come out is known: at every later snapshot the state, byte for byte; at every closed round its record; at every new
version the digests, and where a round's updates and the model before it are still kept, the fold itself.  Nothing here
writes to the folder that it reads, so it may belong to a running coordinator or be a copy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

from coordinator import folding
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.state import ENDED, FleetState, RoundRecord
from coordinator.store import Entry, Snapshot, Store, Version
from protocol import SOFTWARE
from protocol.blobs import Blobs
from protocol.errors import BadConfig, OutsideFault

Verdict = Literal["equal", "different", "unknown"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One fact and what the core made of it.  `phase`: the job's after it; `at` in seconds since the epoch."""

    seq: int
    at: float
    event: str
    agent: str = ""
    job: str = ""
    round: int | None = None
    phase: str = ""
    wishes: list[str] = []


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison with what was recorded; `detail` says with what, and in words what differs."""

    what: str
    verdict: Verdict
    detail: str = ""


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """A replay of the journal after row `since`: the story and what was compared."""

    since: int
    steps: list[Step]
    checks: list[Check]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return all(check.verdict != "different" for check in self.checks)


class _Replay:
    """The core on its way through the journal, with what was recorded beside it."""

    def __init__(self, store: Store, blobs: Path, allowed: Collection[str], only: tuple[str, int] | None) -> None:
        self._store, self._blobs, self._allowed, self._only = store, blobs, allowed, only
        self._snapshots = {s.seq: s for s in store.snapshots()}
        self.steps: list[Step] = []
        self.checks: list[Check] = []
        self._folds: dict[tuple[str, int], act.Aggregate] = {}

    def run(self, start: Snapshot | None) -> Replayed:
        """From one snapshot (or the beginning) to the end of the round that is wanted, or of the journal."""
        fleet = Fleet(decode_state(start.state)) if start else Fleet()
        since = start.seq if start else 0
        over = False
        for entry in self._store.replay(since):
            try:
                wishes = fleet.handle(entry.event, entry.at)
            except Exception as error:  # noqa: BLE001 - the live core met it too, marked it and left it out; here nothing is marked
                detail = f"{type(error).__name__}: {error}"
                self.checks.append(Check(what=f"row {entry.seq} is taken", verdict="different", detail=detail))
                break
            self._look(entry, fleet, wishes)
            over = over or self._is_over(wishes)
            recorded = self._snapshots.get(entry.seq)
            if recorded:
                self._compare_state(fleet, recorded)
            if over and (recorded or entry.seq > max(self._snapshots, default=0)):
                break
        return Replayed(since=since, steps=self.steps, checks=self.checks)

    def _look(self, entry: Entry, fleet: Fleet, wishes: list[act.Wish]) -> None:
        try:
            fleet.check()
        except AssertionError as error:
            self.checks.append(Check(what=f"invariants after row {entry.seq}", verdict="different", detail=str(error)))
        for wish in wishes:
            match wish:
                case act.Record(job=job, record=record) if self._wanted(job, record.round):
                    self._compare_record(job, record)
                case act.Aggregate():
                    self._folds[wish.job, wish.version] = wish
        if isinstance(entry.event, ev.Aggregated) and self._wanted(entry.event.job, entry.event.round):
            self._compare_version(entry.event)
        self._tell(entry, fleet.state, wishes)

    def _tell(self, entry: Entry, state: FleetState, wishes: list[act.Wish]) -> None:
        event = entry.event
        offer = getattr(event, "offer", None)
        job = getattr(offer or event, "job", "")
        about = state.jobs.get(job or (self._only[0] if self._only else ""))
        said = [_brief(w) for w in wishes if not self._only or getattr(w, "job", self._only[0]) == self._only[0]]
        if self._only and job not in {"", self._only[0]}:
            return
        if self._only and not self._in_round(about.round_number if about else -1, wishes):
            return
        self.steps.append(
            Step(
                seq=entry.seq,
                at=entry.at,
                event=type(event).__name__ + (f" {state_of}" if (state_of := getattr(event, "state", "")) else ""),
                agent=getattr(event, "agent", ""),
                job=job,
                round=getattr(offer or event, "round", None),
                phase=str(about.phase) if about else "",
                wishes=said,
            )
        )

    def _in_round(self, n_finished: int, wishes: list[act.Wish]) -> bool:
        """Whether the wanted round is under way, or was closed by this very fact."""
        assert self._only is not None
        closed = any(isinstance(w, act.Record) and (w.job, w.record.round) == self._only for w in wishes)
        return n_finished + 1 == self._only[1] or closed

    def _wanted(self, job: str, number: int) -> bool:
        return self._only is None or self._only == (job, number)

    def _is_over(self, wishes: list[act.Wish]) -> bool:
        closing = (w for w in wishes if isinstance(w, act.Record) and (w.job, w.record.round) == self._only)
        finished = any(isinstance(w, act.Finish) and self._only and w.job == self._only[0] for w in wishes)
        return finished or any(w.record.outcome in {"aggregated", "completed"} for w in closing)

    # ----------------------------------------------------------------------------------------------------- comparisons

    def _compare_state(self, fleet: Fleet, recorded: Snapshot) -> None:
        known = decode_state(recorded.state)  # by its fields: a newer program may have more of them
        same = encode_state(fleet.state) == encode_state(known)
        where = "" if same else _difference(msgspec.to_builtins(known), msgspec.to_builtins(fleet.state))
        self.checks.append(self._check(f"state after row {recorded.seq}", where))

    def _compare_record(self, job: str, record: RoundRecord) -> None:
        known = self._store.round(job, record.round, record.attempt, record.purpose)
        where = _difference(msgspec.to_builtins(known), msgspec.to_builtins(record))
        self.checks.append(self._check(f"record of {job} round {record.round}, attempt {record.attempt}", where))

    def _check(self, what: str, where: str) -> Check:
        """Another program may decide otherwise from the same facts: then a difference proves nothing."""
        if not where:
            return Check(what=what, verdict="equal")
        others = sorted({s.software or "an earlier version" for s in self._snapshots.values()} - {SOFTWARE})
        if others:
            return Check(
                what=what, verdict="unknown", detail=f"recorded by {', '.join(others)}, this is {SOFTWARE}: {where}"
            )
        return Check(what=what, verdict="different", detail=where)

    def _compare_version(self, event: ev.Aggregated) -> None:
        what = f"version {event.version} of {event.job}"
        recorded = next((v for v in self._store.versions(event.job) if v.version == event.version), None)
        if recorded is None:
            self.checks.append(
                Check(what=what, verdict="different", detail="it is in the journal and not in the table")
            )
            return
        same = (recorded.master, recorded.model.sha256) == (event.master, event.model.sha256)
        self.checks.append(Check(what=what, verdict=_verdict(same=same), detail=event.master[:16]))
        self.checks.append(self._fold_again(event, recorded, self._folds.get((event.job, event.version))))

    def _fold_again(self, event: ev.Aggregated, recorded: Version, wish: act.Aggregate | None) -> Check:
        """The round's updates, folded once more in a folder of our own."""
        what = f"fold of {event.job} round {event.round}"
        if wish is None:
            return Check(what=what, verdict="unknown", detail="it was asked for before this journal begins")
        files = [sha256 for sha256 in [wish.master, *(c.sha256 for c in wish.contributions)] if sha256]
        gone = sum(not (self._blobs / sha256).is_file() for sha256 in files)
        if gone:
            detail = f"{gone} of its {len(files)} files are not kept (see keep.update_rounds)"
            return Check(what=what, verdict="unknown", detail=detail)
        with tempfile.TemporaryDirectory(prefix="fedpipe-replay-") as scratch:
            blobs = Blobs(Path(scratch))
            for sha256 in set(files):
                blobs.path(sha256).symlink_to((self._blobs / sha256).absolute())
            try:
                done = folding.fold(wish, blobs, event.model.chunk, self._allowed)
            except (OutsideFault, OSError) as error:
                return Check(what=what, verdict="different", detail=str(error))
        same = (done.master, done.model.sha256) == (recorded.master, recorded.model.sha256)
        return Check(
            what=what, verdict=_verdict(same=same), detail=f"{len(wish.contributions)} updates, {done.master[:16]}"
        )


def _verdict(*, same: bool) -> Verdict:
    return "equal" if same else "different"


def _difference(recorded: object, found: object, at: str = "") -> str:
    """The first place at which two plain values differ; empty when they are equal."""
    parts: list[tuple[str, object, object]] = []
    match recorded, found:
        case dict(), dict() if list(recorded) == list(found):
            parts = [(f"{at}.{key}", value, found[key]) for key, value in recorded.items()]
        case list(), list() if len(recorded) == len(found):
            parts = [(f"{at}[{i}]", *pair) for i, pair in enumerate(zip(recorded, found, strict=True))]
        case _ if recorded != found or type(recorded) is dict:
            return f"{at.lstrip('.')}: {recorded!s:.60} was recorded, {found!s:.60} came out"
    return next((where for place, one, two in parts if (where := _difference(one, two, place))), "")


def _brief(wish: act.Wish) -> str:
    """A wish in a word or two."""
    name, who = type(wish).__name__, getattr(wish, "agent", "")
    match wish:
        case act.Announce(card=card):
            return f"{name} {card.phase}"
        case act.Record(record=record):
            return f"{name} {record.outcome}"
        case act.Decline(reason=reason):
            return f"{name} {who}: {reason}"
    return f"{name} {who}".rstrip()


# --------------------------------------------------------------------------------------------------------------- start


def replay(
    store: Store, blobs: Path, *, job: str = "", number: int | None = None, allowed: Collection[str] = ()
) -> Replayed:
    """Run a round again, or without one the whole journal that is kept, and compare.

    Cost: that of handling the events once more, and of a fold per round whose updates are kept.  Raises BadConfig for a job
    or a round that is not there any more, naming those that are.
    """
    places: list[tuple[Snapshot | None, FleetState]] = [(s, decode_state(s.state)) for s in store.snapshots()]
    if store.first_seq() == 1:
        places.append((None, FleetState()))
    if not places:
        raise BadConfig(f"{store.path}: there is nothing to run again: no snapshot and no beginning of the journal")
    if number is None:
        return _Replay(store, blobs, allowed, None).run(places[-1][0])
    name = job or _only_job(places[0][1], store)
    records = store.rounds(name)
    possible = sorted({r.round for r in records if any(_before(state, name, r.round) for _, state in places)})
    if number not in possible:
        told = (
            f"those of {name} that can be run again are {', '.join(map(str, possible))}" if possible else "none can be"
        )
        raise BadConfig(
            f"round {number} of {name!r} has not closed, or its journal is pruned (see keep.replay_rounds): {told}"
        )
    start = next(s for s, state in places if _before(state, name, number))
    return _Replay(store, blobs, allowed, (name, number)).run(start)


def _before(state: FleetState, job: str, number: int) -> bool:
    """Whether a state is from before a round of a job was opened."""
    found = state.jobs.get(job)
    if found is None:
        return True
    under_way = found.attempt or (found.round and found.round.number == number) or found.phase in ENDED
    return found.round_number < number and not (under_way and found.round_number + 1 == number)


def _only_job(state: FleetState, store: Store) -> str:
    submitted = (e.event.spec.job.name for e in store.replay() if isinstance(e.event, ev.JobSubmitted))
    names = sorted({*state.jobs, *submitted})
    if len(names) != 1:
        raise BadConfig(f"which job: {', '.join(names) or 'there is none'}? Name it with --job")
    return names[0]
