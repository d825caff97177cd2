"""The agent's shell: the only place where its core, the bus, the disk, the clock and the training child meet.

bus, child, timer -> inbox -> core -> actions -> world.  Nothing is journalled: what must survive is the outbox, and the
coordinator says everything else again at each birth.  torch lives in the child; this process stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from agent import child, intake, metrics, upkeep
from agent.answers import Answers
from agent.config import AgentConfig
from agent.core import actions as act
from agent.core import events as ev
from agent.core.session import Session
from agent.door import Door
from agent.outbox import Outbox
from agent.probe import Probe
from agent.resources import Resources
from agent.traffic import COORDINATOR, Traffic
from agent.training import Training
from protocol import SOFTWARE
from protocol.blobs import Blobs
from protocol.bus import Bus, Connected, Disconnected, Received, Will, mqtt_bus
from protocol.credentials import Credentials
from protocol.daemon import Clock, OncePer, Timer, feed_watchdog, notify
from protocol.errors import BadMessage
from protocol.health import Health
from protocol.messages import (
    Body,
    Cancel,
    CoordinatorState,
    Done,
    Grant,
    Placed,
    Plan,
    Presence,
    Rebirth,
    Refuse,
)
from protocol.metrics import Door as MetricsDoor
from protocol.outgoing import Outgoing, Saying
from protocol.topics import Topics, UpLeaf

logger = logging.getLogger(__name__)


class Agent:
    """One edge server's agent.  `bus` is for tests; without it the configured broker is used."""

    def __init__(self, config: AgentConfig, bus: Bus | None = None) -> None:
        self.config = config
        self.folder = Path(config.state_dir)
        upkeep.open_folder(self.folder)
        self.outbox = Outbox(self.folder / "outbox")
        blobs = Blobs(self.folder / "blobs")
        self.clock = Clock()
        self.topics = Topics(config.fleet)
        self.outgoing = Outgoing(self.clock)
        self.core = Session(config.methods, self.outbox.load(), config.limits.max_global_rank)
        self._inbox: asyncio.Queue[ev.Happened] = asyncio.Queue()
        self.resources = Resources(
            config,
            clock=self.clock,
            child=lambda: self.training.supervisor.pid,
            is_working=lambda: self.core.work is not None,
            tell=self.tell,
            reported=self._say_report,
            opened=lambda: self.traffic.offer_all(),  # noqa: PLW0108 - there is none yet
        )
        self.connected, self.n_connects = False, 0
        self.credentials = Credentials(self.folder / "welcomed", config.broker, config.agent)
        self.health, self.scraped = Health(), MetricsDoor(lambda: metrics.families(self))
        self.bus = bus or mqtt_bus(config.broker, config.agent, self._will)
        self.door = Door(config, self.bus, self.clock, lambda: self.tell(ev.RebirthAsked()))
        self.traffic = Traffic(
            config,
            bus=self.bus,
            topics=self.topics,
            blobs=blobs,
            outbox=self.outbox,
            link=self.resources.link,
            caps=self.resources.caps,
            clock=self.clock,
            say=self._say,
            tell=self.tell,
        )
        self._timer, self._progress_due = Timer(self.clock), asyncio.Event()
        self.training = Training(
            config,
            blobs=blobs,
            outbox=self.outbox,
            tell=self.tell,
            moved=self._progress_due.set,
            allowed_bytes=self.resources.allowed_bytes,
            look=self.resources.watch.energy,
            up_bytes_per_s=lambda: self.resources.caps.capped_up(self.resources.link.up_bytes_per_s),
        )
        up_probe = self.topics.up_probe(config.agent)
        self._probe = Probe(self.bus, up_probe, self.resources.link, self.clock, self.resources.report_change)
        self._answers = Answers(self.topics, config.agent)
        self._complaints = OncePer()
        self.refused: Counter[str] = Counter()
        """Messages that were refused, by kind."""

    # ------------------------------------------------------------------------------------------------------ lifecycle

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then hand over what the child has, and say goodbye."""
        logger.info("started", extra={"action": "started", "agent": self.config.agent, "owed": len(self.core.outbox)})
        async with self.bus, asyncio.TaskGroup() as group:
            self._group = group
            await self.bus.subscribe(*self.topics.agent_subscriptions(self.config.agent))
            named: dict[str, Coroutine[Any, Any, None]] = {
                "consume": self._consume(),
                "read": self._read(),
                "publish": self.outgoing.run(self.bus),
                "timer": self._timer.run(self._due, self._tick),
                "heartbeat": self._heartbeat(),
                "report": self.resources.watch_resources(),
                "host": self.resources.watch_host(),
                "probe": self._probe.run(),
                "exchange": self.traffic.exchange.run(),
                "health": self.health.watch(),
                "watchdog": feed_watchdog(self.health.ok),
                "metrics": self.scraped.serve(self.config.metrics),
                "identity": self.door.run(),
            }
            tasks = [group.create_task(work, name=name) for name, work in named.items()]
            notify(READY="1", STATUS="waiting for the broker")
            await stop.wait()
            await self._wind_down()
            for task in tasks:
                task.cancel()

    async def _wind_down(self) -> None:
        logger.info("stopping", extra={"action": "stopping"})
        self.tell(ev.StopAsked(reason="the agent is stopping"))
        await asyncio.sleep(0)
        await self.training.wind_down()
        await self.outgoing.goodbye(self.bus, self._topic("state"), self._presence(online=False, reason="stopping"))

    # ------------------------------------------------------------------------------------------------ core and actions

    def tell(self, event: ev.Happened) -> None:
        """Hand in a fact."""
        self._inbox.put_nowait(event)

    async def _consume(self) -> None:
        for offer in self.core.owed:
            self._perform(act.OfferUpdate(offer=offer))
        while True:
            event = await self._inbox.get()
            wishes = self.core.handle(event, self.clock())
            kinds = [type(wish).__name__ for wish in wishes]
            logger.debug("%s -> %s", type(event).__name__, kinds, extra={"action": "handled"})
            for wish in wishes:
                self._perform(wish)
            self._timer.moved()

    def _perform(self, wish: act.Wish) -> None:
        match wish:
            case act.SayBirth():
                self._say_birth()
            case act.Say(message=message):
                self._say("exec", message)
                extra = {"action": "share", "job": message.job, "round": message.round, "state": str(message.state)}
                logger.info("share moved", extra=extra | ({"reason": message.reason} if message.reason else {}))
                notify(STATUS=f"{message.job} round {message.round}: {message.state}")
            case act.FetchModel():
                self.traffic.fetch(wish)
            case act.DropModel(blob=blob):
                self.traffic.drop(blob.xfer)
            case act.StartChild():
                self.training.begin(wish, self._group)
            case act.StopChild(reason=reason, suspend=suspend):
                self.training.stop(reason, suspend=suspend)
            case act.PauseChild(reason=reason):
                self.training.order(child.Pause(reason=reason))
            case act.ResumeChild():
                self.training.order(child.Resume())
            case act.ShrinkChild():
                self.training.order(child.Shrink())
            case act.LetChildGo():
                self.training.supervisor.release()
            case act.KillChild():
                self._group.create_task(self.training.kill(), name="kill")
            case act.OfferUpdate(offer=offer):
                self.traffic.offer(offer)
            case act.ForgetUpdate(xfer=xfer):
                self.traffic.forget(xfer)

    # ------------------------------------------------------------------------------------------------------------ bus

    def _topic(self, leaf: UpLeaf) -> str:
        return self.topics.up(self.config.agent, leaf)

    def _presence(self, *, online: bool, reason: str = "") -> Presence:
        methods = self.config.methods if online else []
        return Presence(session=self.outgoing.session, online=online, reason=reason, software=SOFTWARE, methods=methods)

    def _will(self) -> Will:
        return self.outgoing.will(self._topic("state"), self._presence(online=False, reason="the connection was lost"))

    def _say(self, leaf: UpLeaf, body: Body) -> Saying:
        return self.outgoing.say(self._topic(leaf), body)

    def _say_birth(self) -> None:
        self._answers.born(self.clock())
        self.outgoing.say(self._topic("state"), self._presence(online=True), retain=True)
        self._say_report()
        self.traffic.born()

    def _say_report(self) -> None:
        self.outgoing.say(self._topic("report"), self.resources.report, retain=True)

    async def _read(self) -> None:
        while True:
            match await self.bus.next():
                case Connected(mqtt_version=version, max_packet_bytes=limit_bytes):
                    self.connected, self.traffic.exchange.max_packet_bytes = True, limit_bytes
                    self.n_connects += 1
                    self.credentials.taken()
                    logger.info("connected", extra={"action": "bus_up", "mqtt": version})
                    self.tell(ev.BusUp())  # says birth, and then offers the whole outbox anew
                    if self.resources.caps.is_open:
                        largest = min(self.config.broker.chunk_bytes, self.traffic.exchange.max_chunk_bytes)
                        self._probe.ask(min(self.config.probe_bytes, largest), self.config.probe_within_s)
                case Disconnected(reason, refusal):
                    self.connected = False
                    self._answers.gone()
                    logger.warning("no broker: %s", reason, extra={"action": "bus_down"})
                    notify(STATUS=f"no broker: {reason}")
                    self.credentials.refused(refusal, reason)
                    self.tell(ev.BusDown(reason=reason))
                case Received(topic, payload, _):
                    self._receive(topic, payload)

    def _receive(self, topic: str, payload: bytes) -> None:
        if topic != self.topics.coordinator_state():  # so it is for this agent, the clearing of a plan included
            self._answers.heard()
        if not payload and topic == self.topics.down(self.config.agent, "plan"):
            self.tell(ev.NothingPlanned())
        try:
            match intake.receive(self.topics, self.config.agent, topic, payload, self.door.open):
                case intake.Chunk(xfer, frame, heard):
                    self.traffic.exchange.pulling.chunk(COORDINATOR, xfer, frame, heard=heard)
                case None:
                    pass
                case body:
                    self._hear(body)
        except BadMessage as error:
            self.refused[error.kind] += 1
            held = self._complaints(f"bad {error.kind}", self.clock())
            if held is not None:
                extra = {"action": "bad_message", "kind": error.kind, "topic": topic[:120], "more": held}
                logger.warning("message ignored: %s", error, extra=extra)

    def _hear(self, body: Body) -> None:
        match body:
            case Plan():
                self.tell(ev.PlanCame(plan=body))
            case Cancel():
                key = {"job": body.job, "round": body.round, "attempt": body.attempt}
                self.tell(ev.CancelCame(**key, reason=body.reason, keep=body.keep))  # type: ignore[arg-type]
            case Rebirth():
                self.tell(ev.RebirthAsked())
            case CoordinatorState():
                if body.online and not self.core.coordinator:
                    self.traffic.exchange.peer_reborn(COORDINATOR)  # the successor of a known one hears our birth
                self._answers.coordinator(online=body.online)
                self.tell(ev.CoordinatorSeen(session=body.session, online=body.online))
            case Grant():
                self.traffic.granted(body)
            case Placed():
                self.traffic.exchange.pulling.placed(COORDINATOR, body)
            case Done():
                self.traffic.accepted(body.xfer)
                self.tell(ev.UpdateAccepted(xfer=body.xfer))
            case Refuse():
                self._refused(body)

    def _refused(self, refuse: Refuse) -> None:
        if refuse.retry_after_s:
            self.traffic.postponed(refuse.xfer, refuse.retry_after_s)
        elif refuse.xfer in self.core.outbox:
            self.tell(ev.UpdateDeclined(xfer=refuse.xfer, reason=refuse.reason))
        elif self.core.work and self.core.work.plan.model and self.core.work.plan.model.xfer == refuse.xfer:
            self.traffic.drop(refuse.xfer)
            self.tell(ev.ModelLost(sha256=self.core.wanted_model, reason=refuse.reason))

    # ----------------------------------------------------------------------------------------------------------- time

    def _due(self) -> list[float | None]:
        return [self.core.wake_at, self.traffic.wake_at if self.connected else None]

    def _tick(self) -> None:
        now = self.clock()
        if (complaint := self._answers.complaint(now)) and self._complaints("unanswered", now) is not None:
            logger.warning("%s", complaint, extra={"action": "unanswered"})
        if self.connected:
            self.traffic.tick()
        if (at := self.core.wake_at) is not None and at <= now and self._inbox.empty():
            self.tell(ev.Tick())

    async def _heartbeat(self) -> None:
        """Progress soon after it changed, but not too often; a bare sign of life otherwise."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.heartbeat_s):
                    await self._progress_due.wait()
            self._progress_due.clear()
            if self.connected:
                self.outgoing.say(self._topic("progress"), self.training.progress)
            await asyncio.sleep(self.config.progress_s)

    # -------------------------------------------------------------------------------------------------- configuration

    def renew(self, config: AgentConfig) -> None:
        """Another configuration, which differs from the present one in agent.config.LIVE alone."""
        self.config = config
        self.training.renew(config)
        self.resources.renew(config)
