"""Who watches a world and knows nothing of the core's reasons: no update is lost, none counts twice, nothing waits for nothing.

Kept apart from the coordinator's state, over its crashes: which update was said to be stored, which fold took it, what every
fold was asked to be.  Each assertion that fails here is a fault of the product, or of the simulation.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.state import ENDED, Contribution, Phase
from fedpipe.simulation.disk import Disk, folded
from protocol.messages import Offer

_event = msgspec.msgpack.Decoder(ev.Happened)
Key = tuple[str, str, int]
"""Job, agent, round."""


class Witness:
    """One world's account.  The whole state is checked at every `check_every`th event."""

    def __init__(self, check_every: int) -> None:
        self.counted: dict[Key, str] = {}
        """Updates that are stored and that the coordinator has acknowledged."""
        self.folded: dict[Key, int] = {}
        """In which version each is."""
        self.ends: dict[str, tuple[str, str]] = {}
        self.n_events = 0
        self._check_every = check_every
        self._seq = 0
        self._asked: dict[tuple[str, int, int], list[Contribution]] = {}
        self._masters: dict[str, list[str]] = {}
        self._rounds: dict[str, set[int]] = {}
        self._trained_from: dict[str, int] = {}
        self._left: set[tuple[str, int]] = set()
        """Versions of jobs that were rolled back behind them."""
        self._let_go: set[tuple[Key, str]] = set()
        """Updates that were acknowledged, and lost their place when their job was rolled back."""
        self._known: set[tuple[str, str]] = set()
        self._expected: bytes | None = None

    # ------------------------------------------------------------------------------------------------------- events

    def handled(self, seq: int, event: ev.Happened, wishes: list[act.Wish], fleet: Fleet) -> None:
        """The core took in row `seq`, now or when the journal was replayed; each row counts once."""
        if seq <= self._seq:
            return
        assert seq == self._seq + 1, f"row {seq} after row {self._seq}"
        self._seq = seq
        self.n_events += 1
        for wish in wishes:
            if isinstance(wish, act.Acknowledge):
                self._acknowledged(event, wish)
            elif isinstance(wish, act.Aggregate):
                self._is_to_be_folded(wish)
            elif isinstance(wish, act.Finish):
                assert wish.job not in self.ends, f"{wish.job} ended twice"
                assert wish.reason or wish.phase == Phase.COMPLETED, (
                    f"{wish.job} ended as {wish.phase} without a reason"
                )
                self.ends[wish.job] = (wish.phase, wish.reason)
            elif isinstance(wish, act.Restore):
                self._restored(wish)
        if isinstance(event, ev.Aggregated):
            self._aggregated(event, fleet)
        if self.n_events % self._check_every == 0:
            fleet.check()

    def _acknowledged(self, event: ev.Happened, wish: act.Acknowledge) -> None:
        assert isinstance(event, ev.UpdateStored | ev.UpdateOffered), f"{type(event).__name__} acknowledges an update"
        offer = event.offer
        key = (offer.job, event.agent, offer.round)
        assert (wish.agent, wish.xfer) == (event.agent, offer.blob.xfer), "another update is acknowledged"
        if isinstance(event, ev.UpdateStored):
            known = self.counted.setdefault(key, offer.blob.sha256)
            assert known == offer.blob.sha256, f"two updates of {key} are acknowledged"
            self._known.add((event.agent, offer.blob.xfer))
        is_stored = self.counted.get(key) == offer.blob.sha256 or (key, offer.blob.sha256) in self._let_go
        assert is_stored, f"an update of {key} is acknowledged that was never stored"

    def _is_to_be_folded(self, wish: act.Aggregate) -> None:
        known = self._asked.get((wish.job, wish.round, wish.attempt))
        if known is not None:
            assert known == wish.contributions, f"the fold of {wish.job}, round {wish.round}, changed"
            return
        self._asked[wish.job, wish.round, wish.attempt] = wish.contributions
        for c in wish.contributions:
            key = (wish.job, c.agent, c.round)
            assert self.counted.get(key) == c.sha256, f"{key} is folded and was never acknowledged"
            assert key not in self.folded, f"{key} is folded twice"
            origin = wish.job, self._trained_from.pop(c.sha256)
            assert origin not in self._left, f"{key} is folded and was made from version {origin[1]}, which was left"

    def _aggregated(self, event: ev.Aggregated, fleet: Fleet) -> None:
        masters = self._masters.setdefault(event.job, [""])
        state = fleet.state.jobs[event.job]
        if event.version != len(masters) or state.version != event.version:
            return
        contributions = self._asked[event.job, event.round, event.attempt]
        masters.append(folded(masters[-1], contributions))
        assert masters[-1] == event.master, f"version {event.version} of {event.job} is not the fold of its updates"
        for c in contributions:
            self.folded[event.job, c.agent, c.round] = event.version
        self._rounds.setdefault(event.job, set()).add(event.round)

    def _restored(self, wish: act.Restore) -> None:
        masters = self._masters[wish.job]
        assert (wish.version, wish.master) == (len(masters), masters[wish.of]), f"{wish} is no version again"
        masters.append(wish.master)
        self._left |= {(wish.job, version) for version in range(wish.of + 1, wish.version)}
        let_go = {key for key in self.counted if key[0] == wish.job and key not in self.folded}
        self._let_go |= {(key, self.counted.pop(key)) for key in let_go}

    def master(self, job: str, version: int) -> str:
        """What a version of a job is made of."""
        return self._masters[job][version]

    def trained(self, update: Offer, version: int) -> None:
        """An agent made an update from a version of its job."""
        self._trained_from[update.blob.sha256] = version

    def may_be_forgotten(self, agent: str, xfer: str) -> None:
        """An agent was told that its update is safe."""
        assert (agent, xfer) in self._known, f"{agent} forgets an update that is not stored"

    # ------------------------------------------------------------------------------------------------ crash and waits

    def remembers(self, disk: Disk, fleet: Fleet, make_fleet: Callable[..., Fleet]) -> None:
        """The coordinator dies: what its next life must know is what every committed row makes of the state."""
        if self._seq < disk.n_rows:
            fleet = make_fleet(decode_state(encode_state(fleet.state)))
            for at, body in disk.rows[self._seq - disk.n_forgotten :]:
                fleet.handle(_event.decode(body), at)
        self._expected = encode_state(fleet.state)

    def recovered(self, fleet: Fleet) -> None:
        """Snapshot and journal were read."""
        assert self._expected in {None, encode_state(fleet.state)}, "the journal does not replay to the state before"
        fleet.check()

    def waits(self, fleet: Fleet, wake_at: float | None, slow: set[str]) -> None:
        """Whatever is open has an end in sight: an instant, or slow work that is under way."""
        for roll in fleet.roster.rolls.values():
            job = roll.job
            where = f"{job.spec.job.name}/{job.round_number + 1}/{job.attempt}"
            if job.phase is Phase.PLANNING:
                assert f"plan/{where}" in slow, f"{where} is being planned by nobody"
            elif job.phase is Phase.AGGREGATING:
                assert f"fold/{where}" in slow, f"{where} is being folded by nobody"
            elif job.phase is Phase.PAUSED:
                assert job.pause, f"{where} is paused by nobody"
            elif job.phase not in ENDED:
                is_due = wake_at is not None or fleet.state.deaf_since
                assert is_due, f"{where} is {job.phase} and wakes never"

    # --------------------------------------------------------------------------------------------------------- the end

    def replays(self, disk: Disk, fleet: Fleet, make_fleet: Callable[..., Fleet]) -> None:
        """The whole journal, from nothing, makes this state."""
        again = make_fleet()
        for at, body in disk.rows:
            again.handle(_event.decode(body), at)
        assert encode_state(again.state) == encode_state(fleet.state), "the whole journal does not replay to the state"

    def all_is_accounted_for(self, disk: Disk, fleet: Fleet) -> None:
        """Every acknowledged update is in exactly one version, or its job came to an end before the next fold."""
        for key in self.counted:
            job = fleet.state.jobs[key[0]]
            assert key in self.folded or job.phase is not Phase.COMPLETED, (
                f"{key} was acknowledged and is in no version"
            )
        for name, job in fleet.state.jobs.items():
            assert self.ends[name] == (job.phase, job.reason)
            assert job.master == self._masters.get(name, [""])[-1], f"{name} is not the fold of what was acknowledged"
            written = {number for one, number, _ in disk.records if one == name}
            n_rounds = len(self._rounds.get(name, set()))
            assert n_rounds == job.round_number, f"{name}: {n_rounds} folds in {job.round_number} rounds"
            assert set(range(1, n_rounds + 1)) <= written, f"{name}: {n_rounds} rounds, records of {sorted(written)}"
