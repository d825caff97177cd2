"""The coordinator as coordinator/daemon.py runs it, without I/O: the real core behind a journal, snapshots and slow work.

A crash loses what the daemon loses, at the points where it matters: the inbox before its commit; the wishes of what is
committed; the rest of them between two; slow work, credit, and who was being pulled from.  The journal, the snapshot, blobs and
records stay.  The wall clock of the next start may stand anywhere; the daemon's own never goes back (protocol/daemon.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from coordinator import intake
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.state import ENDED
from fedpipe.simulation import planning
from fedpipe.simulation.broker import COORDINATOR, TOPICS, Broker, Will
from fedpipe.simulation.clockwork import Clockwork, Life
from fedpipe.simulation.disk import Disk, folded, served
from fedpipe.simulation.inbound import Inbound
from fedpipe.simulation.scenario import Faults
from fedpipe.simulation.witness import Witness
from protocol import codec
from protocol.daemon import OncePer
from protocol.errors import BadMessage
from protocol.messages import Body, CoordinatorState, Done, Offer, Rebirth, Refuse

if TYPE_CHECKING:
    from fedpipe.simulation.edge import Edge

HEARTBEAT_S: Final = 15.0
SILENT_BEATS: Final = 3
MAX_AGENTS: Final = 100_000
CRASH_POINTS: Final = (
    "idle",
    "before the commit",
    "after the commit",
    "after handling",
    "between two wishes",
    "before the snapshot",
)

_event = msgspec.msgpack.Decoder(ev.Happened)


class Cloud:
    """One coordinator on one disk, from restart to restart."""

    name = COORDINATOR

    def __init__(
        self,
        clockwork: Clockwork,
        broker: Broker,
        faults: Faults,
        witness: Witness,
        edges: Mapping[str, Edge],
        make_fleet: Callable[..., Fleet] = Fleet,
        *,
        keeps_journal: bool,
    ) -> None:
        self.disk = Disk()
        self.faults = faults
        self.running = False
        self.doomed = ""
        self.epoch = 0
        self.spoiled: set[str] = set()
        """Digests of updates that do not fit their plan."""
        self.clockwork, self._broker, self._witness, self.edges = clockwork, broker, witness, edges
        self._make_fleet, self._keeps_journal = make_fleet, keeps_journal
        self._chance = clockwork.chance("coordinator")
        self.life = Life()
        self._offset_s = 0.0

    # ------------------------------------------------------------------------------------------------- start and end

    def start(self, wall_step_s: float = 0.0) -> None:
        """Recover from disk, ask for everything under way, look for the broker."""
        self.running, self.doomed, self.life = True, "", Life()
        self._session, self._sent = f"{self._chance.getrandbits(64):016x}", 0
        self._offset_s = max(self.clockwork.now + wall_step_s, self.disk.last_at) - self.clockwork.now
        self._inbox: list[ev.Happened] = []
        self._taking = False
        self._rings_at = float("inf")
        self._inbound = Inbound(self)
        self._served: set[str] = set()
        self._slow: set[str] = set()
        self._settling: set[str] = set()
        """Of these the end waits in the inbox."""
        self._folding: dict[str, act.Aggregate] = {}
        self._doubted: dict[str, int] = {}
        self._intake = intake.Intake(TOPICS, MAX_AGENTS, lambda: self.fleet.state.agents)
        self._rebirths = OncePer(HEARTBEAT_S)
        self.fleet = self._recover()
        for wish in self.fleet.resume(self.clock()):
            self._perform(wish)
        for name in self.edges:
            self.doubt(name)
        self._moved()
        self.tell(ev.BusLost(since=self.disk.last_at))
        self._reach(0)

    def crash(self) -> None:
        """The process is gone."""
        self.clockwork.fault(f"coordinator crash {self.doomed or 'idle'}", COORDINATOR)
        self.running, self.life.alive = False, False
        self._witness.remembers(self.disk, self.fleet, self._make_fleet)
        self._broker.cut(COORDINATOR, notices_after_s=self._chance.choice([0.0, 30.0]))

    def _recover(self) -> Fleet:
        seq, state = self.disk.snapshot
        fleet = self._make_fleet(decode_state(state)) if state else self._make_fleet()
        for number, (at, body) in enumerate(self.disk.rows[seq - self.disk.n_forgotten :], seq + 1):
            event = _event.decode(body)
            wishes = fleet.handle(event, at)
            self._witness.handled(number, event, wishes, fleet)
            self.disk.records |= {_record(wish) for wish in wishes if isinstance(wish, act.Record)}
        self._witness.recovered(fleet)
        return fleet

    def clock(self) -> float:
        """The daemon's clock: seconds since the epoch that never go back."""
        return self.clockwork.now + self._offset_s

    def _dies(self, point: str) -> bool:
        if self.doomed == point:
            self.crash()
        return not self.running

    # ------------------------------------------------------------------------------------------------------ consumer

    def tell(self, event: ev.Happened) -> None:
        """Hand in a fact."""
        self._inbox.append(event)
        if not self._taking:
            self._taking = True
            self.clockwork.after(self._chance.uniform(0.001, 0.02), self.life, self._take)

    def _take(self) -> None:
        batch, self._inbox = self._inbox, []
        settled, self._settling = self._settling, set()
        if self._dies("before the commit"):
            return
        now, first = self.clock(), self.disk.n_rows + 1
        for event in batch:
            body = msgspec.msgpack.encode(event)
            self.clockwork.mark(body)
            self.disk.rows.append((now, body))
        self.disk.last_at = now
        if self._dies("after the commit"):
            return
        wishes: list[act.Wish] = []
        for seq, event in enumerate(batch, first):
            self.clockwork.note(COORDINATOR, event)
            found = self.fleet.handle(event, now)
            self._witness.handled(seq, event, found, self.fleet)
            if isinstance(event, ev.AgentLeft | ev.AgentJoined):
                self.doubt(event.agent)
            wishes += found
        self._slow -= settled
        if self._dies("after handling"):
            return
        self.disk.records |= {_record(wish) for wish in wishes if isinstance(wish, act.Record)}
        dies_at = self._chance.randrange(len(wishes)) if wishes and self.doomed == "between two wishes" else -1
        for number, wish in enumerate(wishes):
            if number == dies_at and self._dies("between two wishes"):
                return
            self._perform(wish)
        for event in batch:
            if isinstance(event, ev.Aggregated):
                self._forget_updates(event)
        if any(isinstance(wish, act.Record | act.Finish) for wish in wishes):
            if self._dies("before the snapshot"):
                return
            self.save()
        self._taking = False
        if self._inbox:
            event = self._inbox.pop()
            self.tell(event)
        self._moved()

    def save(self) -> None:
        """Write a snapshot; in a large world the rows before it go."""
        self.disk.snapshot = (self.disk.n_rows, encode_state(self.fleet.state))
        if not self._keeps_journal:
            self.disk.n_forgotten += len(self.disk.rows)
            self.disk.rows = []

    def _forget_updates(self, done: ev.Aggregated) -> None:
        wish = self._folding.get(done.job)
        if wish and (wish.round, wish.attempt) == (done.round, done.attempt):
            self.disk.blobs -= {c.sha256 for c in self._folding.pop(done.job).contributions}

    # --------------------------------------------------------------------------------------------------------- timer

    def _moved(self) -> None:
        """What is due may have changed; whatever is open must be due, or be worked on."""
        due = self.fleet.wake_at
        self._witness.waits(self.fleet, due, self._slow)
        if due is not None and due - self._offset_s < self._rings_at:
            self._rings_at = max(due - self._offset_s, self.clockwork.now)
            self.clockwork.at(self._rings_at, self.life, self._ring)

    def _ring(self) -> None:
        self._rings_at = float("inf")
        due = self.fleet.wake_at
        if self._taking or due is None:
            return
        if due <= self.clock():
            self.tell(ev.Tick())
        else:  # it was moved to later, or the two clocks round differently
            self._rings_at = max(due - self._offset_s, self.clockwork.now + 1e-3)
            self.clockwork.at(self._rings_at, self.life, self._ring)

    # ------------------------------------------------------------------------------------------------------- actions

    def _perform(self, wish: act.Wish) -> None:
        match wish:
            case act.Assign(agent=agent, plan=plan):
                self.say(TOPICS.down(agent, "plan"), plan, retain=True)
            case act.Withdraw(agent=agent, cancel=cancel):
                self._broker.publish(COORDINATOR, TOPICS.down(agent, "plan"), b"", retain=True)
                if cancel:
                    self.say(TOPICS.down(agent, "cmd"), cancel)
            case act.Announce(card=card):
                self.say(TOPICS.job(card.job), card, retain=True)
            case act.MakePlan():
                self._plan(wish)
            case act.Fetch():
                self._inbound.fetch(wish)
            case act.Acknowledge(agent=agent, xfer=xfer):
                self.say(TOPICS.down(agent, "grant"), Done(xfer=xfer))
            case act.Decline(agent=agent, xfer=xfer, reason=reason):
                self._inbound.stop(agent, xfer)
                self.say(TOPICS.down(agent, "grant"), Refuse(xfer=xfer, reason=reason[:2000]))
            case act.Aggregate():
                self._fold(wish)
            case act.Serve(blob=blob):
                self._served.add(blob.xfer)
            case act.Record() | act.Finish() | act.Restore():
                pass

    def spawn(self, name: str, delay_s: float, end: Callable[[], None]) -> None:
        """Begin slow work; the same asked for again is under way already."""
        if name not in self._slow:
            self._slow.add(name)
            self.clockwork.after(delay_s, self.life, self._ended, name, end)

    def _ended(self, name: str, end: Callable[[], None]) -> None:
        self._settling.add(name)
        end()

    def _plan(self, wish: act.MakePlan) -> None:
        name = f"plan/{wish.job}/{wish.round}/{wish.attempt}"
        if name not in self._slow:
            answer = planning.answer(wish, self.fleet.state, self.clockwork, self.faults)
            self.spawn(name, self._chance.choice([0.1, 1.0, 20.0]), lambda: self.tell(answer))

    def _fold(self, wish: act.Aggregate) -> None:
        self._folding[wish.job] = wish
        fails = self._chance.random() < self.faults.fold_failure_ratio
        name = f"fold/{wish.job}/{wish.round}/{wish.attempt}"
        self.spawn(name, self._chance.choice([1.0, 5.0, 60.0]), lambda: self.tell(self._folded(wish, fails=fails)))

    def _folded(self, wish: act.Aggregate, *, fails: bool) -> ev.Aggregated | ev.AggregateFailed:
        gone = [c for c in wish.contributions if c.sha256 not in self.disk.blobs]
        assert not gone, f"{gone[0]} is to be folded and is not on disk"
        if fails:
            self.clockwork.fault("fold failed", COORDINATOR)
            return ev.AggregateFailed(job=wish.job, round=wish.round, attempt=wish.attempt, reason="the disk is broken")
        master = folded(wish.master, wish.contributions)
        return ev.Aggregated(
            job=wish.job,
            round=wish.round,
            attempt=wish.attempt,
            version=wish.version,
            model=served(master),
            master=master,
        )

    def connection_with(self, agent: str) -> tuple[int, int] | None:
        """Which two connections lie between this coordinator and an agent, None when one is missing."""
        both = self.running and self._broker.is_connected(COORDINATOR) and self._broker.is_connected(agent)
        return (self.epoch, self.edges[agent].epoch) if both else None

    def serves(self, xfer: str) -> bool:
        """Whether it hands out this model."""
        return xfer in self._served

    # ----------------------------------------------------------------------------------------------------------- bus

    def _reach(self, tries: int) -> None:
        self.clockwork.after(self._chance.uniform(0, min(60.0, 2.0**tries)), self.life, self._try, tries)

    def _try(self, tries: int) -> None:
        if self._broker.up:
            self._broker.join(self, Will(TOPICS.coordinator_state(), self._encode(self._state(online=False))))
        else:
            self._reach(tries + 1)

    def welcomed(self) -> None:
        """See Client."""
        self.epoch += 1
        self.tell(ev.BusFound())
        self.say(TOPICS.coordinator_state(), self._state(online=True), retain=True)
        self._inbound.nudge()
        for wish in self.fleet.resume(self.clock()):
            self._perform(wish)
        for agent in self.fleet.state.agents.values():
            if not agent.task:
                self._broker.publish(COORDINATOR, TOPICS.down(agent.id, "plan"), b"", retain=True)

    def cut_off(self) -> None:
        """See Client."""
        self.epoch += 1
        if self.running:
            self.tell(ev.BusLost())
            self._reach(0)

    def _state(self, *, online: bool) -> CoordinatorState:
        return CoordinatorState(session=self._session, online=online)

    def _encode(self, body: Body) -> bytes:
        self._sent += 1
        return codec.encode(body, session=self._session, seq=self._sent, now=self.clock())

    def say(self, topic: str, body: Body, *, retain: bool = False) -> None:
        """Publish a message."""
        self._broker.publish(COORDINATOR, topic, self._encode(body), retain=retain)

    def heard(self, topic: str, payload: bytes) -> None:
        """See Client."""
        now = self.clock()
        try:
            word = self._intake.receive(topic, payload, now)
        except BadMessage as error:
            self.clockwork.faults[f"message refused, {error.kind}"] += 1
            if error.kind in intake.SAID_AGAIN:
                self._ask_for_birth(topic.split("/")[4], now)
            return
        if not isinstance(word, intake.Word):
            return
        agent, envelope = word
        match envelope.b:
            case Offer(blob=blob) if self._inbound.is_on_its_way(agent, blob):
                return
        event = intake.to_event(agent, envelope)
        if isinstance(event, ev.AgentJoined):
            self._inbound.nudge(agent)
        if event is not None:
            self.tell(event)

    # ------------------------------------------------------------------------------------------------------ presence

    def doubt(self, agent: str) -> None:
        """Look after a heartbeat whether what is known of this agent is so: who is silent has gone, who speaks is there."""
        if self.running and agent not in self._doubted:
            self._doubted[agent] = 0
            self.clockwork.after(HEARTBEAT_S, self.life, self._look, agent)

    def _look(self, agent: str) -> None:
        if self._broker.is_connected(COORDINATOR):
            known, edge = self.fleet.state.agents.get(agent), self.edges[agent]
            believed = known is not None and known.online
            if self._broker.is_connected(agent):
                if believed and known and known.session == edge.session:
                    del self._doubted[agent]
                    return
                self._doubted[agent] = 0
                self._ask_for_birth(agent, self.clock())
            elif not believed or known is None:
                del self._doubted[agent]
                return
            else:
                self._doubted[agent] += 1
                if self._doubted[agent] > SILENT_BEATS:
                    del self._doubted[agent]
                    self.tell(ev.AgentLeft(agent=agent, session=known.session, reason="silent: no heartbeat"))
                    return
        self.clockwork.after(HEARTBEAT_S, self.life, self._look, agent)

    def _ask_for_birth(self, agent: str, now: float) -> None:
        if self._rebirths(agent, now) is not None:
            self.say(TOPICS.down(agent, "cmd"), Rebirth())

    @property
    def is_done(self) -> bool:
        """Whether every job that it knows of has ended."""
        return self.running and all(job.phase in ENDED for job in self.fleet.state.jobs.values())


def _record(wish: act.Record) -> tuple[str, int, int]:
    return wish.job, wish.record.round, wish.record.attempt
