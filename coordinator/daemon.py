"""The coordinator's shell: the only place where the core, the bus, the disk, the clock and the network meet.

One inbox, one consumer, no locks:   bus, timer, web, slow work -> inbox -> journal (one commit) -> core -> actions -> world

The consumer never waits for the network: an action is put into a queue or spawned, and slow work comes back as an event.  A
restart loads the snapshot, replays the journal with the actions thrown away, and asks for everything under way again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from coordinator.activity import fleet_text
from coordinator.audit import Audit
from coordinator.config import CoordinatorConfig
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import encode_state
from coordinator.core.state import ENDED
from coordinator.disk import Disk
from coordinator.hearing import Hearing
from coordinator.inbox import Inbox, Posted
from coordinator.intake import Intake
from coordinator.lineage import exported_digest
from coordinator.metrics import Meter
from coordinator.presence import Presence
from coordinator.pruning import need_of
from coordinator.recovery import check_files, check_folder, recover
from coordinator.store import Store
from coordinator.traffic import Traffic
from coordinator.trust import open_trust
from coordinator.upkeep import Upkeep
from coordinator.work import Work
from protocol import SOFTWARE
from protocol.blobs import Blobs
from protocol.bus import Bus, Connected, Disconnected, Received, Will, mqtt_bus
from protocol.credentials import Credentials
from protocol.daemon import Clock, Timer, feed_watchdog, notify
from protocol.errors import Unavailable
from protocol.health import Health
from protocol.messages import CoordinatorState
from protocol.outgoing import Outgoing
from protocol.topics import Topics

CLIENT_ID = "fedpipe-coordinator"
DISK_RETRY_S = 5.0
SNAPSHOT_EVENTS = 50_000
"""After so many a snapshot is made although no round has ended: else the journal of an idle fleet would only grow."""

logger = logging.getLogger(__name__)
Watcher = Callable[[list[ev.Happened], list[act.Wish]], None]


class Coordinator:
    """One fleet's coordinator.  `bus` is for tests; without it the configured broker is used."""

    def __init__(self, config: CoordinatorConfig, bus: Bus | None = None) -> None:
        self.config = config
        self.folder = Path(config.state_dir)
        self.store = Store(check_folder(self.folder))
        self.disk = Disk(self.folder, config.keep.min_free_bytes, lambda: notify(STATUS=self.status()))
        self.inbox = Inbox(self.store, self.disk)
        self.tell = self.inbox.tell
        self.blobs = Blobs(self.folder / "blobs")
        self.clock = Clock(self.store.last_at())
        self.audit = Audit(self.folder / "audit.log", self.clock)
        self.topics = Topics(config.fleet)
        self.trust = open_trust(config, self.audit)
        self.outgoing = Outgoing(self.clock, self.trust.seal if self.trust else None)
        self.work = Work(config, self.store, self.blobs, self.clock, self.disk)
        self.presence = Presence(config.heartbeat_s)
        self.fleet, self._seq, self._owed = recover(self.store)
        check_files(self.fleet.state, self.blobs)
        self.connected, self.bus_fault, self.token = False, "not connected yet", ""
        self.watchers: set[Watcher] = set()
        broker = self.trust.broker if self.trust else config.broker
        self.credentials = Credentials(self.folder / "welcomed", broker, config.fleet)
        self.bus = bus or mqtt_bus(broker, f"{CLIENT_ID}-{config.fleet}", self._will)
        self.traffic = Traffic(
            config,
            bus=self.bus,
            blobs=self.blobs,
            clock=self.clock,
            outgoing=self.outgoing,
            topics=self.topics,
            work=self.work,
            tell=self.tell,
            spawn=self._spawn,
        )
        self.exchange = self.traffic.exchange
        self.upkeep = Upkeep(
            self.store,
            self.blobs,
            config.keep,
            self.disk,
            need=lambda: need_of(self.fleet.state, self.traffic.under_way()),
            clock=self.clock,
            spawn=self._spawn,
        )
        self.upkeep.sweep()
        self.meter, self.health = Meter(), Health(self.disk.refusal)
        self._timer = Timer(self.clock)
        self._snapshot_owed, self._saved_seq = False, 0
        self._slow: dict[str, asyncio.Task[None]] = {}
        self.intake = Intake(self.topics, config.max_agents, lambda: self.fleet.state.agents)
        self.hearing = Hearing(self)

    # ------------------------------------------------------------------------------------------------------ lifecycle

    async def run(self, stop: asyncio.Event, *more: Coroutine[Any, Any, None]) -> None:
        """Work until `stop` is set; `more` (the web server) runs beside it."""
        extra = {"action": "started", "fleet": self.config.fleet, "session": self.outgoing.session}
        logger.info("started", extra=extra)
        async with self.bus, self.work.ahead, asyncio.TaskGroup() as group:
            self._group = group
            await self.bus.subscribe(*self.topics.coordinator_subscriptions())
            self.tell(ev.BusLost(since=self.store.last_at()))
            named: dict[str, Coroutine[Any, Any, None]] = {
                "consume": self._consume(),
                "read": self._read(),
                "publish": self.outgoing.run(self.bus),
                "timer": self._timer.run(self._due, self._tick),
                "silence": self.hearing.watch_silence(),
                "disk": self.upkeep.watch(),
                "exchange": self.exchange.run(),
                "health": self.health.watch(),
                "watchdog": feed_watchdog(self.health.ok),
            }
            if self.traffic.bucket:
                named["bucket"] = self.traffic.bucket.keep()
            if self.trust:
                named["trust"] = self.trust.keep(self)
            tasks = [group.create_task(work, name=name) for name, work in named.items()]
            tasks += [group.create_task(work) for work in more]
            notify(READY="1", STATUS="waiting for the broker")
            await stop.wait()
            logger.info("stopping", extra={"action": "stopping"})
            await self.outgoing.goodbye(self.bus, self.topics.coordinator_state(), self._state(online=False))
            for task in [*tasks, *self._slow.values()]:
                task.cancel()
        if not self.health.is_busy:  # else it might forget a record that was wished for and is not written
            await self._snapshot()
        self.store.close()

    # ------------------------------------------------------------------------------------------------------- consumer

    async def post(self, event: ev.Happened) -> None:
        """Hand in a fact and wait until it is journalled and handled.  Raises Unavailable when the disk refuses it."""
        await self.inbox.post(event)

    async def _consume(self) -> None:
        for owed in self._owed:
            await self.work.write_down(owed)
        for name, job in self.fleet.state.jobs.items():
            if job.phase in ENDED and exported_digest(self._export_folder(name)) != job.master:
                self._export(name)
        self.upkeep.prune()
        for wish in self.fleet.resume(self.clock()):
            self._perform(wish)
        for agent in self.fleet.state.agents.values():
            if agent.online:
                self.presence.expect(agent.id, self.clock())
        while True:
            batch = await self.inbox.wait()
            with self.health.busy():
                await self._take(batch)
            self._timer.moved()

    async def _take(self, batch: list[Posted]) -> None:
        """Journal a batch in one commit, handle it, perform what follows."""
        now = self.clock()
        seqs = await self.inbox.journal(batch, now, DISK_RETRY_S)
        wishes: list[act.Wish] = []
        for seq, (event, done) in zip(seqs, batch, strict=True):
            wishes += self._handle(seq, event, now)
            if done and not done.done():
                done.set_result(None)
        for wish in wishes:
            if isinstance(wish, act.Written):
                await self.work.write_down(wish)
        events = [event for event, _ in batch]
        judged = [event for event in events if isinstance(event, ev.UpdateStored | ev.UpdateSpoiled)]
        for event in judged:
            self.traffic.settled(event)
        for wish in wishes:
            self._perform(wish)
        self.upkeep.drop_declined(judged, wishes)
        self.meter.took(events, wishes, self.fleet.state)
        for watcher in list(self.watchers):
            watcher(events, wishes)
        if any(isinstance(wish, act.Record | act.Finish) for wish in wishes):
            await self._snapshot()
            self.upkeep.round_closed()
            self.traffic.keep_only(job.model for job in self.fleet.state.jobs.values() if job.phase not in ENDED)
        elif self._snapshot_owed or self._seq >= self._saved_seq + SNAPSHOT_EVENTS:
            await self._snapshot()
            self.upkeep.prune()

    async def _snapshot(self) -> None:
        try:
            await asyncio.to_thread(self.store.save_snapshot, self._seq, encode_state(self.fleet.state))
        except Unavailable as error:  # the journal holds everything; only the next restart takes longer
            if not self._snapshot_owed:
                logger.error("%s", error, extra={"action": "snapshot_refused"})
            self._snapshot_owed = True
        else:
            self._snapshot_owed, self._saved_seq = False, self._seq

    def _handle(self, seq: int, event: ev.Happened, now: float) -> list[act.Wish]:
        """What the core wishes; an event that it cannot take is poison, and the core is made anew from those before."""
        try:
            wishes = self.fleet.handle(event, now)
        except Exception:
            logger.exception("the core refused an event", extra={"action": "poison", "event": type(event).__name__})
            self.store.poison(seq)
            self.fleet, self._seq, _ = recover(self.store, before=seq)
            return self.fleet.resume(now)
        self._seq = seq
        logger.debug("%s -> %s", type(event).__name__, [type(w).__name__ for w in wishes], extra={"action": "handled"})
        return wishes

    # -------------------------------------------------------------------------------------------------------- actions

    def _perform(self, wish: act.Wish) -> None:
        match wish:
            case act.Assign(agent=agent, plan=plan):
                self.outgoing.say(self.topics.down(agent, "plan"), self.traffic.serve_to(agent, plan), retain=True)
            case act.Withdraw(agent=agent, cancel=cancel):
                self.outgoing.clear(self.topics.down(agent, "plan"))
                if cancel:
                    self.outgoing.say(self.topics.down(agent, "cmd"), cancel)
            case act.Announce(card=card):
                self.outgoing.say(self.topics.job(card.job), card, retain=True)
                extra = {"action": "job", "job": card.job, "phase": card.phase, "reason": card.reason}
                logger.info("job moved", extra=extra)
            case act.MakePlan():
                self._spawn(f"plan/{wish.job}/{wish.round}/{wish.attempt}", self._plan(wish))
            case act.Fetch():
                self.traffic.fetch(wish)
            case act.Acknowledge(agent=agent, xfer=xfer):
                self.traffic.acknowledge(agent, xfer)
            case act.Decline(agent=agent, xfer=xfer, reason=reason):
                self.traffic.decline(agent, xfer, reason)
            case act.Aggregate():
                self._spawn(f"fold/{wish.job}/{wish.round}/{wish.attempt}", self._fold(wish))
            case act.AggregateAhead(fold=fold):
                self.work.fold_ahead(fold, self.traffic.unchecked)
            case act.Serve(blob=blob):
                self.traffic.serve(blob)
            case act.Finish(job=job, phase=phase, reason=reason, cause=cause):
                ended = {"action": "job_ended", "job": job, "phase": phase, "cause": cause, "reason": reason}
                logger.info("job ended", extra=ended)
                self.work.ahead.give_up(job)
                self._export(job)
            case act.Restore(job=job) if self.fleet.state.jobs[job].phase in ENDED:
                self._export(job)

    def _export(self, job: str) -> None:
        self._spawn(f"export/{job}", self.work.export(self.fleet.state.jobs[job], self._export_folder(job)))

    def is_folding(self, job: str) -> bool:
        """Whether a version of this job is being made; one that has ended may still be at it."""
        return any(name.startswith(f"fold/{job}/") for name in self._slow)

    def _export_folder(self, job: str) -> Path:
        return self.folder / "exports" / job

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start slow work; the same asked for again while it runs is under way already."""
        if (running := self._slow.get(name)) and not running.done():  # one that is done is told so a moment later
            work.close()
            return
        try:
            self._slow[name] = task = self._group.create_task(work, name=name)
        except RuntimeError:  # the daemon is ending: what it is told now it will be told again
            work.close()
            return
        task.add_done_callback(lambda done: self._slow.pop(name) if self._slow.get(name) is done else None)

    async def _plan(self, wish: act.MakePlan) -> None:
        await self.inbox.settle(await self.work.plan(wish, self.fleet.state))

    async def _fold(self, wish: act.Aggregate) -> None:
        await self.inbox.settle(await self.work.fold(wish))

    # ------------------------------------------------------------------------------------------------------------ bus

    def _state(self, *, online: bool) -> CoordinatorState:
        return CoordinatorState(session=self.outgoing.session, online=online, software=SOFTWARE)

    def _will(self) -> Will:
        return self.outgoing.will(self.topics.coordinator_state(), self._state(online=False))

    async def _read(self) -> None:
        while True:
            match await self.bus.next():
                case Connected() as welcome:
                    self._connected(welcome)
                case Disconnected(reason, refusal):
                    if self.connected:
                        self.tell(ev.BusLost())
                    self.connected, self.bus_fault = False, reason
                    logger.warning("no broker: %s", reason, extra={"action": "bus_down"})
                    notify(STATUS=f"no broker: {reason}")
                    self.credentials.refused(refusal, reason)
                case Received(topic, payload, retained):
                    self.hearing.receive(topic, payload, retained=retained)

    def _connected(self, welcome: Connected) -> None:
        self.connected, self.bus_fault = True, ""
        self.tell(ev.BusFound())
        self.meter.n_connects += 1
        self.credentials.taken()
        self.exchange.max_packet_bytes = welcome.max_packet_bytes
        logger.info(
            "connected", extra={"action": "bus_up", "mqtt": welcome.mqtt_version, "broker": self.config.broker.url}
        )
        notify(STATUS=f"{len(self.fleet.state.agents)} agents known")
        self.outgoing.say(self.topics.coordinator_state(), self._state(online=True), retain=True)
        self.exchange.connected()
        for wish in self.fleet.resume(self.clock()):
            self._perform(wish)
        for agent in self.fleet.state.agents.values():
            if not agent.task:  # what was withdrawn while there was no broker is retained there still
                self.outgoing.clear(self.topics.down(agent.id, "plan"))

    def remind(self, agent: str) -> bool:
        """Say to an agent again what it should be at; not while facts wait that may change that."""
        if self.health.is_busy or not self.inbox.empty():
            return False
        wishes = self.fleet.remind(agent, self.clock())
        for wish in wishes:
            self._perform(wish)
        return bool(wishes)

    def connect_anew(self) -> None:
        """Leave the broker and come back: whatever was under way between us is said again."""
        self._spawn("reconnect", self.bus.reconnect())

    # ----------------------------------------------------------------------------------------------------------- time

    def _due(self) -> list[float | None]:
        is_moving = self.health.is_busy or not self.inbox.empty()  # then the consumer will say when
        core = None if is_moving else self.fleet.wake_at
        return [core, self.exchange.pulling.wake_at if self.connected else None]

    def _tick(self) -> None:
        now = self.clock()
        if self.connected and (at := self.exchange.pulling.wake_at) is not None and at <= now:
            self.exchange.pulling.tick()
        if (at := self.fleet.wake_at) is not None and at <= now and not self.health.is_busy and self.inbox.empty():
            self.tell(ev.Tick())

    # -------------------------------------------------------------------------------------------------------- the web

    def status(self) -> str:
        """One line for people."""
        bus = "" if self.connected else f"; no broker: {self.bus_fault}"
        store = self.exchange.way.fault
        return (
            fleet_text(self.fleet.state)
            + bus
            + (f"; disk: {self.disk.reason}" if self.disk.reason else "")
            + (f"; bulk by the broker: {store}" if store else "")
        )
