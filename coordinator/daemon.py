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

from coordinator import intake
from coordinator.config import CoordinatorConfig
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import plans
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.state import ENDED
from coordinator.presence import Presence
from coordinator.store import Store
from coordinator.traffic import Traffic
from coordinator.work import Work
from protocol import SOFTWARE
from protocol.blobs import Blobs
from protocol.bus import Bus, Connected, Disconnected, Received, Will, mqtt_bus
from protocol.daemon import Clock, OncePer, Timer, feed_watchdog, notify
from protocol.errors import BadMessage, Unavailable
from protocol.messages import CoordinatorState, Grant, Offer, Progress, Rebirth, Refuse
from protocol.outgoing import Outgoing
from protocol.topics import FromAgent, Topics

CLIENT_ID = "fedpipe-coordinator"
DISK_RETRY_S = 5.0
PARTIAL_KEPT_S = 7 * 86_400.0  # for unfinished uploads that nobody goes on with

logger = logging.getLogger(__name__)
Watcher = Callable[[list[ev.Happened], list[act.Wish]], None]


Posted = tuple[ev.Happened, asyncio.Future[None] | None]
"""A fact in the inbox, and who waits until it is journalled."""


class Coordinator:
    """One fleet's coordinator.  `bus` is for tests; without it the configured broker is used."""

    def __init__(self, config: CoordinatorConfig, bus: Bus | None = None) -> None:
        self.config = config
        self.folder = Path(config.state_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = Store(self.folder / "journal.sqlite")
        self.blobs = Blobs(self.folder / "blobs")
        self.blobs.sweep(PARTIAL_KEPT_S)
        self.clock = Clock(self.store.last_at())
        self.topics = Topics(config.fleet)
        self.outgoing = Outgoing(self.clock)
        self.work = Work(config, self.store, self.blobs, self.clock)
        self.presence = Presence(config.heartbeat_s)
        self.fleet, self._seq, self._owed = self._recover()
        self.connected = False
        self.bus_fault = "not connected yet"
        self.watchers: set[Watcher] = set()
        self.bus = bus or mqtt_bus(config.broker, f"{CLIENT_ID}-{config.fleet}", self._will)
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
        self._inbox: asyncio.Queue[Posted] = asyncio.Queue()
        self._taking = False
        self._timer = Timer(self.clock)
        self._folding: dict[str, act.Aggregate] = {}
        self._slow: dict[str, asyncio.Task[None]] = {}
        self._complaints = OncePer()
        self._rebirths = OncePer(config.heartbeat_s)
        self.n_bad_messages = 0

    # ------------------------------------------------------------------------------------------------------ lifecycle

    async def run(self, stop: asyncio.Event, *more: Coroutine[Any, Any, None]) -> None:
        """Work until `stop` is set; `more` (the web server) runs beside it."""
        extra = {"action": "started", "fleet": self.config.fleet, "session": self.outgoing.session}
        logger.info("started", extra=extra)
        async with self.bus, asyncio.TaskGroup() as group:
            self._group = group
            await self.bus.subscribe(*self.topics.coordinator_subscriptions())
            named: dict[str, Coroutine[Any, Any, None]] = {
                "consume": self._consume(),
                "read": self._read(),
                "publish": self.outgoing.run(self.bus),
                "timer": self._timer.run(self._due, self._tick),
                "silence": self._watch_silence(),
                "exchange": self.exchange.run(),
                "watchdog": feed_watchdog(lambda: True),
            }
            tasks = [group.create_task(work, name=name) for name, work in named.items()]
            tasks += [group.create_task(work) for work in more]
            notify(READY="1", STATUS="waiting for the broker")
            await stop.wait()
            logger.info("stopping", extra={"action": "stopping"})
            await self.outgoing.goodbye(self.bus, self.topics.coordinator_state(), self._state(online=False))
            for task in [*tasks, *self._slow.values()]:
                task.cancel()
        self.store.save_snapshot(self._seq, encode_state(self.fleet.state))
        self.store.close()

    def _recover(self, before: int = 2**62) -> tuple[Fleet, int, list[act.Record]]:
        """Snapshot + journal up to a row; also the records that may not have been written before a crash.

        A row that the core cannot take is marked and left out: it must not stop every restart.
        """
        while True:
            saved = self.store.load_snapshot()
            seq, fleet = (saved[0], Fleet(decode_state(saved[1]))) if saved else (0, Fleet())
            owed: list[act.Record] = []
            for entry in self.store.replay(seq, before):
                try:
                    wishes = fleet.handle(entry.event, entry.at)
                except Exception:
                    logger.exception("a journal row is poison", extra={"action": "poison", "seq": entry.seq})
                    self.store.poison(entry.seq)
                    break
                owed += [wish for wish in wishes if isinstance(wish, act.Record)]
                seq = entry.seq
            else:
                return fleet, seq, owed

    # ------------------------------------------------------------------------------------------------------- consumer

    async def post(self, event: ev.Happened) -> None:
        """Hand in a fact and wait until it is journalled and handled.  Raises Unavailable when the disk refuses it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((event, done))
        await done

    def tell(self, event: ev.Happened) -> None:
        """Hand in a fact."""
        self._inbox.put_nowait((event, None))

    async def _consume(self) -> None:
        for owed in self._owed:
            await self.work.record(owed.job, owed.record)
        for name, job in self.fleet.state.jobs.items():
            if job.phase in ENDED and not self._export_folder(name).exists():
                self._spawn(f"export/{name}", self.work.export(job, self._export_folder(name)))
        for wish in self.fleet.resume(self.clock()):
            self._perform(wish)
        for agent in self.fleet.state.agents.values():
            if agent.online:
                self.presence.expect(agent.id, self.clock())
        while True:
            batch = [await self._inbox.get()]
            while not self._inbox.empty():
                batch.append(self._inbox.get_nowait())
            self._taking = True
            await self._take(batch)
            self._taking = False
            self._timer.moved()

    async def _take(self, batch: list[Posted]) -> None:
        """Journal a batch in one commit, handle it, perform what follows."""
        now = self.clock()
        seqs = await self._journal(batch, now)
        wishes: list[act.Wish] = []
        for seq, (event, done) in zip(seqs, batch, strict=True):
            wishes += self._handle(seq, event, now)
            if done and not done.done():
                done.set_result(None)
        for wish in wishes:
            if isinstance(wish, act.Record):  # durable before a snapshot forgets that it was wished for
                await self.work.record(wish.job, wish.record)
        for wish in wishes:
            self._perform(wish)
        events = [event for event, _ in batch]
        for aggregated in (event for event in events if isinstance(event, ev.Aggregated)):
            self._forget_updates(aggregated)
        for watcher in list(self.watchers):
            watcher(events, wishes)
        if any(isinstance(wish, act.Record | act.Finish) for wish in wishes):
            await self._snapshot()

    async def _journal(self, batch: list[Posted], now: float) -> list[int]:
        """Make a batch durable, however long the disk refuses; who waits for an answer is told so and may come again."""
        while True:
            try:
                return await asyncio.to_thread(self.store.append, [(now, event) for event, _ in batch])
            except Unavailable as error:
                logger.error("%s", error, extra={"action": "journal_refused", "events": len(batch)})
                notify(STATUS=f"disk: {error}")
                for _, done in batch:
                    if done and not done.done():
                        done.set_exception(error)
                batch[:] = [(event, done) for event, done in batch if done is None]
                await asyncio.sleep(DISK_RETRY_S)

    async def _snapshot(self) -> None:
        try:
            await asyncio.to_thread(self.store.save_snapshot, self._seq, encode_state(self.fleet.state))
        except Unavailable as error:  # the journal holds everything; only the next restart takes longer
            logger.error("%s", error, extra={"action": "snapshot_refused"})

    def _handle(self, seq: int, event: ev.Happened, now: float) -> list[act.Wish]:
        """What the core wishes; an event that it cannot take is poison, and the core is made anew from those before."""
        try:
            wishes = self.fleet.handle(event, now)
        except Exception:
            logger.exception("the core refused an event", extra={"action": "poison", "event": type(event).__name__})
            self.store.poison(seq)
            self.fleet, self._seq, _ = self._recover(before=seq)
            return self.fleet.resume(now)
        self._seq = seq
        logger.debug("%s -> %s", type(event).__name__, [type(w).__name__ for w in wishes], extra={"action": "handled"})
        return wishes

    # -------------------------------------------------------------------------------------------------------- actions

    def _perform(self, wish: act.Wish) -> None:
        match wish:
            case act.Assign(agent=agent, plan=plan):
                self.outgoing.say(self.topics.down(agent, "plan"), plan, retain=True)
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
            case act.Serve(blob=blob):
                self.traffic.serve(blob)
            case act.Finish(job=job, phase=phase, reason=reason):
                logger.info("job ended", extra={"action": "job_ended", "job": job, "phase": phase, "reason": reason})
                self._spawn(f"export/{job}", self.work.export(self.fleet.state.jobs[job], self._export_folder(job)))

    def _export_folder(self, job: str) -> Path:
        return self.folder / "exports" / job

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start slow work; the same asked for again while it runs is under way already."""
        if name in self._slow:
            work.close()
            return
        self._slow[name] = self._group.create_task(work, name=name)
        self._slow[name].add_done_callback(lambda _: self._slow.pop(name, None))

    async def _plan(self, wish: act.MakePlan) -> None:
        self.tell(await self.work.plan(wish, self.fleet.state))

    async def _fold(self, wish: act.Aggregate) -> None:
        self._folding[wish.job] = wish
        self.tell(await self.work.fold(wish))

    def _forget_updates(self, done: ev.Aggregated) -> None:
        """Their aggregate is journalled: the updates of a round have done their duty."""
        wish = self._folding.get(done.job)
        if wish and (wish.round, wish.attempt) == (done.round, done.attempt):
            self.work.forget_updates(self._folding.pop(done.job))

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
                case Disconnected(reason):
                    self.connected, self.bus_fault = False, reason
                    logger.warning("no broker: %s", reason, extra={"action": "bus_down"})
                    notify(STATUS=f"no broker: {reason}")
                case Received(topic, payload, _):
                    self._receive(topic, payload)

    def _connected(self, welcome: Connected) -> None:
        self.connected, self.bus_fault = True, ""
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

    def _receive(self, topic: str, payload: bytes) -> None:
        try:
            place = self.topics.parse(topic)
            if not isinstance(place, FromAgent):
                return
            if place.leaf == "d":
                self.exchange.chunk(place.agent, place.xfer, payload)
            elif payload:
                self._hear(place, payload)
        except BadMessage as error:
            self.n_bad_messages += 1
            agent = "/".join(topic.split("/")[:5])  # it may invent any number of topics below its own
            held = self._complaints(agent, self.clock())
            if held is not None:
                extra = {"action": "bad_message", "topic": topic, "more": held}
                logger.warning("message ignored: %s", error, extra=extra)

    def _hear(self, place: FromAgent, payload: bytes) -> None:
        envelope, now = intake.decode(place.leaf, payload), self.clock()
        agent = place.agent
        match envelope.b:
            case Progress() as progress:
                self._heartbeat(agent, envelope.ses, progress, now)
                return
            case Grant() as grant:
                self.exchange.granted(agent, grant)
                return
            case Refuse(xfer=xfer, reason=reason):
                self.traffic.withdrawn(agent, xfer, reason)
                return
            case Offer(blob=blob) if self.traffic.is_fetching(agent, blob.xfer):
                return  # being pulled already; the journal need not hear of every repetition
        event = intake.to_event(agent, envelope)
        if isinstance(event, ev.AgentLeft):
            self.presence.left(agent)
        else:
            self.presence.heard(agent, now)
        if isinstance(event, ev.AgentJoined):
            self.exchange.peer_reborn(agent)
        if event is not None:
            self.tell(event)

    def _heartbeat(self, agent: str, session: str, progress: Progress, now: float) -> None:
        self.presence.heard(agent, now, progress)
        known = self.fleet.state.agents.get(agent)
        unknown = known is None or not known.online or known.session != session
        if unknown and self._rebirths(agent, now) is not None:
            self.outgoing.say(self.topics.down(agent, "cmd"), Rebirth())

    # ----------------------------------------------------------------------------------------------------------- time

    def _due(self) -> list[float | None]:
        core = None if self._taking or not self._inbox.empty() else self.fleet.wake_at  # else the consumer moves it
        return [core, self.exchange.wake_at if self.connected else None]

    def _tick(self) -> None:
        now = self.clock()
        if self.connected and (at := self.exchange.wake_at) is not None and at <= now:
            self.exchange.tick()
        if (at := self.fleet.wake_at) is not None and at <= now and not self._taking and self._inbox.empty():
            self.tell(ev.Tick())

    async def _watch_silence(self) -> None:
        while True:
            await asyncio.sleep(self.config.heartbeat_s)
            if not self.connected:
                continue  # nobody can be heard; the silence is ours
            for agent in self.presence.silent(self.clock()):
                self.presence.left(agent)
                known = self.fleet.state.agents.get(agent)
                if known and known.online:
                    self.tell(ev.AgentLeft(agent=agent, session=known.session, reason="silent: no heartbeat"))

    # -------------------------------------------------------------------------------------------------------- the web

    def status(self) -> str:
        """One line for people."""
        active = [s for s in self.fleet.state.jobs.values() if s.phase not in ENDED]
        online = sum(a.online for a in self.fleet.state.agents.values())
        jobs = "; ".join(f"{s.spec.job.name}: {plans.phase_text(s)}" for s in active) or "no active job"
        return f"{online} agents online; {jobs}" + ("" if self.connected else f"; no broker: {self.bus_fault}")
