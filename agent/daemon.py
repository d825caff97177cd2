"""The agent's shell: the only place where its core, the bus, the disk, the clock and the training child meet.

bus, child, timer -> inbox -> core -> actions -> world.  Nothing is journalled: what must survive is the outbox, and the
coordinator says everything else again at each birth.  torch lives in the child; this process stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from agent import child, intake, metrics, profiler, upkeep
from agent.answers import Answers
from agent.caps import Caps
from agent.config import AgentConfig
from agent.core import actions as act
from agent.core import events as ev
from agent.core.session import Session
from agent.door import Door
from agent.host import Host
from agent.outbox import Outbox
from agent.probe import PROBE, uplink_seconds
from agent.training import Training
from agent.watch import Watch, minute_of_day
from protocol import SOFTWARE
from protocol.blobs import Blobs
from protocol.bus import Bus, Connected, Disconnected, Received, Will, mqtt_bus
from protocol.credentials import Credentials
from protocol.daemon import Clock, OncePer, Timer, feed_watchdog, notify
from protocol.errors import BadMessage
from protocol.exchange import Exchange, Lost, Outcome, Pulled
from protocol.health import Health
from protocol.http_store import Carrier
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
    Report,
)
from protocol.metrics import Door as MetricsDoor
from protocol.outgoing import Outgoing
from protocol.sending import SendOffer, Uploads
from protocol.spool import Spool
from protocol.topics import Topics, UpLeaf
from protocol.transfer import MAX_WINDOW, Receiving

COORDINATOR = "coordinator"
PROBE_AGAIN_S = 3600.0

logger = logging.getLogger(__name__)


class Agent:
    """One edge server's agent.  `bus` is for tests; without it the configured broker is used."""

    def __init__(self, config: AgentConfig, bus: Bus | None = None) -> None:
        self.config = config
        self.folder = Path(config.state_dir)
        upkeep.open_folder(self.folder)
        self.outbox = Outbox(self.folder / "outbox")
        self.blobs = Blobs(self.folder / "blobs")
        self.clock = Clock()
        self.topics = Topics(config.fleet)
        self.outgoing = Outgoing(self.clock)
        self.core = Session(config.methods, self.outbox.load(), config.limits.max_global_rank)
        self.uploads = Uploads()
        self.link = profiler.Link()
        self.host, self.watch = Host(config.limits), Watch(config.device)
        self.caps = Caps(config.limits, minute_of_day())
        self.connected, self.n_connects = False, 0
        self.credentials = Credentials(self.folder / "welcomed", config.broker, config.agent)
        self.health, self.scraped = Health(), MetricsDoor(lambda: metrics.families(self))
        self.bus = bus or mqtt_bus(config.broker, config.agent, self._will)
        self.door = Door(config, self.bus, self.clock, lambda: self.tell(ev.RebirthAsked()))
        self.exchange = Exchange(
            bus=self.bus,
            spool=Spool(self.blobs, max_bytes=config.limits.max_model_bytes),
            receiving=Receiving(
                max_window=MAX_WINDOW, budget_bytes=config.limits.max_inflight_bytes, pace=self.caps.down
            ),
            clock=self.clock,
            say=lambda _peer, message: self._say("answer", message),
            chunk_topic=lambda _peer, xfer: self.topics.up_chunk(config.agent, xfer),
            blob_topic=self.topics.blob,
            source=self.outbox.path,
            outcome=self._model_ended,
            pace=self.caps.up,
            carrier=Carrier(config.limits.http_hosts),
        )
        self._inbox: asyncio.Queue[ev.Happened] = asyncio.Queue()
        self._timer = Timer(self.clock)
        self._progress_due, self._renewed = asyncio.Event(), asyncio.Event()
        self.training = Training(
            config,
            blobs=self.blobs,
            outbox=self.outbox,
            tell=self.tell,
            moved=self._progress_due.set,
            allowed_bytes=self._allowed_bytes,
            look=self.watch.energy,
        )
        if self.host.see(self.watch.look(None), self.clock()).level != "run":
            self._give_way()
        self.report = self._look_around()
        self._fetching_since = 0.0
        self._pulled_since: dict[str, float] = {}
        self._answers = Answers(self.topics, config.agent)
        self._complaints = OncePer()
        self.refused: Counter[str] = Counter()
        """Messages that were refused, by kind."""
        self._probed_at = -PROBE_AGAIN_S
        self._probing: asyncio.Task[None] | None = None

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
                "report": self._watch_resources(),
                "host": self._watch_host(),
                "exchange": self.exchange.run(),
                "health": self.health.watch(),
                "watchdog": feed_watchdog(self.health.ok),
                "metrics": self.scraped.serve(self.config.metrics),
                "identity": self.door.run(),
            }
            tasks = [group.create_task(work, name=name) for name, work in named.items()]
            notify(READY="1", STATUS="waiting for the broker")
            await stop.wait()
            await self._wind_down()
            for task in [*tasks, *filter(None, [self._probing])]:
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
                self.exchange.connected()  # behind it: with our birth the coordinator forgets what credit it had
            case act.Say(message=message):
                self._say("exec", message)
                extra = {"action": "share", "job": message.job, "round": message.round, "state": str(message.state)}
                logger.info("share moved", extra=extra | ({"reason": message.reason} if message.reason else {}))
                notify(STATUS=f"{message.job} round {message.round}: {message.state}")
            case act.FetchModel():
                self._fetch_model(wish)
            case act.DropModel(blob=blob):
                self.exchange.stop_pulling(COORDINATOR, blob.xfer)
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
                offer = msgspec.structs.replace(offer, blob=self.exchange.offer(offer.blob), by_store=True)
                self._offer(self.uploads.add(offer, self.clock()))
            case act.ForgetUpdate(xfer=xfer):
                self.uploads.done(xfer)
                self.exchange.sending.remove(xfer)
                self.outbox.forget(xfer)

    # ---------------------------------------------------------------------------------------------------------- model

    def _fetch_model(self, wish: act.FetchModel) -> None:
        if self.blobs.has(wish.sha256):
            self.tell(ev.ModelFetched(sha256=wish.sha256, n_bytes=0))
            return
        self._fetching_since = self.clock()
        size = wish.size if wish.size < wish.blob.size else None
        how = {"listen": wish.listen, "by_store": wish.by_store}
        self.exchange.pull(COORDINATOR, wish.blob, size=size, sha256=wish.sha256, **how)

    async def _model_ended(self, end: Outcome) -> None:
        match end:
            case Pulled(sha256=sha256, path=path):
                n_bytes = path.stat().st_size
                self.link.down(n_bytes, self.clock() - self._fetching_since)
                for old in list(self.blobs):
                    if old != sha256:
                        self.blobs.delete(old)
                self.tell(ev.ModelFetched(sha256=sha256, n_bytes=n_bytes))
            case Lost(sha256=sha256, reason=reason):
                self.tell(ev.ModelLost(sha256=sha256, reason=reason))

    # ------------------------------------------------------------------------------------------------------------ bus

    def _topic(self, leaf: UpLeaf) -> str:
        return self.topics.up(self.config.agent, leaf)

    def _presence(self, *, online: bool, reason: str = "") -> Presence:
        methods = self.config.methods if online else []
        return Presence(session=self.outgoing.session, online=online, reason=reason, software=SOFTWARE, methods=methods)

    def _will(self) -> Will:
        return self.outgoing.will(self._topic("state"), self._presence(online=False, reason="the connection was lost"))

    def _say(self, leaf: UpLeaf, body: Body) -> None:
        self.outgoing.say(self._topic(leaf), body)

    def _offer(self, dues: list[SendOffer]) -> None:
        """Say what is due; outside the hours of bulk nobody could be served, and the first minute within says it all."""
        for due in dues if self.caps.is_open else []:
            self._say("offer", due.offer)

    def _say_birth(self) -> None:
        self._answers.born(self.clock())
        self.outgoing.say(self._topic("state"), self._presence(online=True), retain=True)
        self.outgoing.say(self._topic("report"), self.report, retain=True)

    async def _read(self) -> None:
        while True:
            match await self.bus.next():
                case Connected(mqtt_version=version, max_packet_bytes=limit_bytes):
                    self.connected, self.exchange.max_packet_bytes = True, limit_bytes
                    self.n_connects += 1
                    self.credentials.taken()
                    logger.info("connected", extra={"action": "bus_up", "mqtt": version})
                    self.tell(ev.BusUp())  # says birth, and then offers the whole outbox anew
                    self._measure_uplink()
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
                    self.exchange.chunk(COORDINATOR, xfer, frame, heard=heard)
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
                    self.exchange.peer_reborn(COORDINATOR)  # the successor of a known one hears our birth
                self._answers.coordinator(online=body.online)
                self.tell(ev.CoordinatorSeen(session=body.session, online=body.online))
            case Grant():
                if body.xfer in self.core.outbox:
                    self._pulled_since.setdefault(body.xfer, self.clock())
                self.uploads.granted(body.xfer, self.clock())
                self.exchange.granted(COORDINATOR, body)
            case Placed():
                self.exchange.placed(COORDINATOR, body)
            case Done():
                self._uploaded(body.xfer)
                self.tell(ev.UpdateAccepted(xfer=body.xfer))
            case Refuse():
                self._refused(body)

    def _uploaded(self, xfer: str) -> None:
        began_at, offer = self._pulled_since.pop(xfer, None), self.core.outbox.get(xfer)
        if began_at is not None and offer is not None:
            self.link.up(offer.blob.size, self.clock() - began_at)

    def _refused(self, refuse: Refuse) -> None:
        if refuse.retry_after_s:
            self.uploads.postponed(refuse.xfer, refuse.retry_after_s, self.clock())
        elif refuse.xfer in self.core.outbox:
            self.tell(ev.UpdateDeclined(xfer=refuse.xfer, reason=refuse.reason))
        elif self.core.work and self.core.work.plan.model and self.core.work.plan.model.xfer == refuse.xfer:
            self.exchange.stop_pulling(COORDINATOR, refuse.xfer)
            self.tell(ev.ModelLost(sha256=self.core.wanted_model, reason=refuse.reason))

    # ----------------------------------------------------------------------------------------------------------- time

    def _due(self) -> list[float | None]:
        transfers = [self.exchange.wake_at, self.uploads.wake_at] if self.connected else []
        return [self.core.wake_at, *transfers]

    def _tick(self) -> None:
        now = self.clock()
        if (complaint := self._answers.complaint(now)) and self._complaints("unanswered", now) is not None:
            logger.warning("%s", complaint, extra={"action": "unanswered"})
        if self.connected:
            self.exchange.tick()
            self._offer(self.uploads.tick(now))
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

    # ------------------------------------------------------------------------------------------------------- the host

    def _look_around(self) -> Report:
        """What this server can give now.  Blocks for some milliseconds."""
        verdict = self.host.verdict
        report = profiler.profile(
            self.folder,
            self.link,
            limits=self.config.limits,
            device=self.config.device,
            child=self.training.supervisor.pid,
            paused=verdict.reason if verdict.level in {"pause", "stop"} else "",
        )
        return self.caps.applied(report)

    async def _allowed_bytes(self) -> int:
        free, own = await asyncio.to_thread(self.watch.memory, self.training.supervisor.pid)
        return 0 if own is None else max(1, self.config.limits.allowed_bytes(free, own))  # 0 would be "not known"

    async def _watch_resources(self) -> None:
        while True:
            await asyncio.sleep(self.config.report_s)
            await asyncio.to_thread(upkeep.tidy, self.folder, self.config.keep)
            self._keep_hours()
            await self._report_change()

    async def _report_change(self) -> None:
        report = await asyncio.to_thread(self._look_around)
        if profiler.changed(self.report, report):
            self.report = report
            self.outgoing.say(self._topic("report"), report, retain=True)

    async def _watch_host(self) -> None:
        """Look often while there is something that could give way, else as often as at everything."""
        idle_until = self.clock() + self.config.report_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.limits.yield_to.every_s):
                    await self._renewed.wait()
            is_renewed = self._renewed.is_set()
            self._renewed.clear()
            pid = self.training.supervisor.pid
            if self.core.work is None and pid is None and self.clock() < idle_until and not is_renewed:
                continue
            idle_until = self.clock() + self.config.report_s
            level = self.host.verdict.level
            sample = await asyncio.to_thread(self.watch.look, pid)
            if self.host.see(sample, self.clock()).level != level:
                self._give_way()
                await self._report_change()
            elif is_renewed:
                await self._report_change()

    def renew(self, config: AgentConfig) -> None:
        """Another configuration, which differs from the present one in agent.config.LIVE alone."""
        self.config = config
        self.training.renew(config)
        self.host.renew(config.limits)
        self._keep_hours()
        self._renewed.set()

    def _keep_hours(self) -> None:
        """Let bulk flow, or wait, as its hours begin and end."""
        if not self.caps.renew(self.config.limits, minute_of_day()):
            return
        text = self.caps.reason or "updates and models may move now"
        logger.info("%s", text, extra={"action": "transfer_hours"})
        notify(STATUS=text)
        if self.caps.is_open:
            self._offer(self.uploads.reset(self.clock()))

    def _give_way(self) -> None:
        level, reason = self.host.verdict
        extra = {"action": "yield", "level": level} | ({"reason": reason} if reason else {})
        logger.warning("the host needs the device" if reason else "the host leaves the device to training", extra=extra)
        self.tell(ev.HostSpoke(level=level, reason=reason))

    def _measure_uplink(self) -> None:
        """At most once an hour, and only while no update has told how fast the link is."""
        is_known = self.link.up_bytes_per_s > 0 or self.config.probe_bytes == 0
        if self.caps.is_open and not is_known and self.clock() - self._probed_at >= PROBE_AGAIN_S:
            self._probed_at = self.clock()
            self._probing = self._group.create_task(self._probe(), name="probe")

    async def _probe(self) -> None:
        await asyncio.sleep(random.uniform(0, self.config.probe_within_s))
        if self.link.up_bytes_per_s > 0:
            return
        n_bytes = min(self.config.probe_bytes, self.config.broker.chunk_bytes, self.exchange.max_chunk_bytes)
        seconds = await uplink_seconds(self.bus, self.topics.up_chunk(self.config.agent, PROBE), n_bytes)
        if seconds is not None and self.link.up_bytes_per_s == 0:
            self.link.up(n_bytes, seconds)
            await self._report_change()
