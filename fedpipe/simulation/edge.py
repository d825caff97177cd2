"""One edge server as agent/daemon.py runs it, without I/O: the real session, its durable outbox, a child that takes its time.

A crash keeps what is on disk: the outbox with every update that was finished, and the model that was fetched last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from agent.core import actions as act
from agent.core import events as ev
from agent.core.session import Session
from fedpipe.simulation.broker import TOPICS, Broker, Will
from fedpipe.simulation.child import Child, Traits
from fedpipe.simulation.clockwork import Clockwork, Life
from fedpipe.simulation.scenario import Faults
from fedpipe.simulation.transfers import Pull
from protocol import codec
from protocol.messages import (
    Allowance,
    Body,
    Cancel,
    CoordinatorState,
    Done,
    Offer,
    Plan,
    Presence,
    Rebirth,
    Refuse,
    Report,
)
from protocol.sending import SendOffer, Uploads
from protocol.topics import UpLeaf

if TYPE_CHECKING:
    from fedpipe.simulation.cloud import Cloud
    from fedpipe.simulation.witness import Witness

WIND_DOWN_S: Final = 30.0


class Edge:
    """One agent on one server, from restart to restart."""

    def __init__(self, traits: Traits, clockwork: Clockwork, broker: Broker, faults: Faults, witness: Witness) -> None:
        self.name, self.traits = traits.name, traits
        self.outbox: dict[str, Offer] = {}
        self.model = ""
        self.faults = faults
        self.running, self.reachable = False, True
        self.epoch = self.n_lives = self._trains_from = 0
        self.session = ""
        self.cloud: Cloud
        self._clockwork, self._broker, self._witness = clockwork, broker, witness
        self._chance = clockwork.chance("agents")
        self._life = Life()

    # ------------------------------------------------------------------------------------------------- start and end

    def start(self) -> None:
        """A new process over the same disk."""
        self.running, self._life = True, Life()
        self.n_lives += 1
        self.session, self._sent = f"{self._chance.getrandbits(64):016x}", 0
        self._offset_s = self._chance.uniform(-300, 300)
        self.core = Session(self.traits.methods, list(self.outbox.values()), max_global_rank=64)
        self._uploads = Uploads()
        self._inbox: deque[ev.Happened] = deque()
        self._handling = False
        self._rings_at = float("inf")
        self._pull: Pull | None = None
        self._paused = ""
        self._stopped: Callable[[], None] | None = None
        self.child = Child(self.traits, self._clockwork, self._life, self.faults, self._child_said)
        for offer in self.core.owed:
            self._perform(act.OfferUpdate(offer=offer))
        self._reach(0)

    def crash(self) -> None:
        """The process is gone."""
        self.running, self._life.alive = False, False
        self._broker.cut(self.name, notices_after_s=self._chance.choice([0.0, 0.0, 35.0]))
        self.cloud.doubt(self.name)

    def stop(self, then: Callable[[], None]) -> None:
        """A polite end: hand over what the child has, for a while, and say goodbye; `then` is called when it is down."""

        def down() -> None:
            self._say("state", Presence(session=self.session, online=False, reason="stopping"), retain=True)
            self._broker.part(self.name)
            self.running, self._life.alive, self.epoch = False, False, self.epoch + 1
            self.cloud.doubt(self.name)
            then()

        self._stopped = down
        self.tell(ev.StopAsked(reason="the agent is stopping"))
        self._clockwork.after(WIND_DOWN_S if self.child.is_busy else 0.1, self._life, down)

    def clock(self) -> float:
        """This server's own clock."""
        return self._clockwork.now + self._offset_s

    @property
    def is_idle(self) -> bool:
        """Whether it works on nothing and owes nothing."""
        return self.running and self.core.work is None and not self.outbox and self._broker.is_connected(self.name)

    # ---------------------------------------------------------------------------------------------- core and actions

    def tell(self, event: ev.Happened) -> None:
        """Hand in a fact; it is handled after those before it."""
        self._inbox.append(event)
        if self._handling:
            return
        self._handling = True
        while self._inbox:
            event = self._inbox.popleft()
            self._clockwork.note(self.name, event)
            wishes = self.core.handle(event, self.clock())
            self.core.check()
            for wish in wishes:
                self._perform(wish)
        self._handling = False
        self._arm()

    def _perform(self, wish: act.Wish) -> None:
        match wish:
            case act.SayBirth():
                self._say(
                    "state", Presence(session=self.session, online=True, methods=self.traits.methods), retain=True
                )
                self._say_report()
            case act.Say(message=message):
                self._say("exec", message)
            case act.FetchModel(blob=blob, sha256=sha256):
                self._fetch(blob.xfer, sha256)
            case act.DropModel():
                self._stop_pulling()
            case act.StartChild(plan=plan):
                self._trains_from = plan.version
                self.child.begin(wish, boot=self.n_lives)
            case act.StopChild(suspend=suspend):
                self.child.stop(suspend=suspend)
            case act.PauseChild():
                self.child.pause()
            case act.ResumeChild():
                self.child.resume()
            case act.ShrinkChild() | act.LetChildGo():
                pass
            case act.KillChild():
                self.child.kill()
            case act.OfferUpdate(offer=offer):
                self._offer(self._uploads.add(offer, self.clock()))
            case act.ForgetUpdate(xfer=xfer):
                self._uploads.done(xfer)
                self.outbox.pop(xfer, None)

    def _child_said(self, event: ev.Happened) -> None:
        if isinstance(event, ev.ChildFinished) and event.update is not None:
            self.outbox[event.update.blob.xfer] = event.update  # durable before anybody hears of it
            self._witness.trained(event.update, self._trains_from)
            if self._chance.random() < self.faults.bad_update_ratio:
                self.cloud.spoiled.add(event.update.blob.sha256)
            if self._chance.random() < self.faults.child_death_ratio / 4:
                self._clockwork.fault("agent crash before it heard of its update", self.name)
                self.crash()
                self._clockwork.after(20.0, self._clockwork.always, self._start_again)
                return
        self.tell(event)

    def _start_again(self) -> None:
        if not self.running:
            self.start()

    # ------------------------------------------------------------------------------------------------------ transfers

    def _fetch(self, xfer: str, sha256: str) -> None:
        self._stop_pulling()
        if self.model == sha256:
            self.tell(ev.ModelFetched(sha256=sha256, n_bytes=0))
            return

        def done() -> None:
            self.model = sha256
            self.tell(ev.ModelFetched(sha256=sha256, n_bytes=1000))

        def lost() -> None:
            self.tell(ev.ModelLost(sha256=sha256, reason="the coordinator sends nothing"))

        def refused() -> None:
            self.tell(ev.ModelLost(sha256=sha256, reason="superseded: this blob is not offered here any more"))

        self._pull = Pull(
            self._clockwork,
            self._life,
            self.traits.download_s,
            connection=lambda: self.cloud.connection_with(self.name),
            holds=lambda: self.cloud.serves(xfer),
            done=done,
            lost=lost,
            refused=refused,
        )
        self._pull.go()

    def _stop_pulling(self) -> None:
        if self._pull:
            self._pull.stop()
        self._pull = None

    def sends(self, xfer: str) -> bool:
        """Whether the file behind this offer is here; being asked is the sign that the coordinator pulls."""
        if self.running and xfer in self.outbox:
            self._uploads.granted(xfer, self.clock())
            return True
        return False

    def _offer(self, due: list[SendOffer]) -> None:
        for one in due:
            self._say("offer", one.offer)

    # ------------------------------------------------------------------------------------------------------------ bus

    def _reach(self, tries: int) -> None:
        self._clockwork.after(self._chance.uniform(0, min(60.0, 2.0**tries)), self._life, self._try, tries)

    def _try(self, tries: int) -> None:
        if self._broker.up and self.reachable:
            gone = Presence(session=self.session, online=False, reason="the connection was lost")
            self._broker.join(self, Will(TOPICS.up(self.name, "state"), self._encode(gone)))
        else:
            self._reach(tries + 1)

    def welcomed(self) -> None:
        """See Client."""
        self.epoch += 1
        self.cloud.doubt(self.name)
        self._offer(self._uploads.reset(self.clock()))
        self.tell(ev.BusUp())
        if self._pull:
            self._pull.nudge()

    def cut_off(self) -> None:
        """See Client."""
        self.epoch += 1
        self.cloud.doubt(self.name)
        if self.running:
            self.tell(ev.BusDown(reason="cut"))
            self._reach(0)

    def _encode(self, body: Body) -> bytes:
        self._sent += 1
        return codec.encode(body, session=self.session, seq=self._sent, now=self.clock())

    def _say(self, leaf: UpLeaf, body: Body, *, retain: bool = False) -> None:
        self._broker.publish(self.name, TOPICS.up(self.name, leaf), self._encode(body), retain=retain)

    def _say_report(self) -> None:
        allowance = Allowance(memory_bytes=self.traits.memory_bytes, paused=self._paused)
        self._say("report", Report(allowance=allowance), retain=True)

    def heard(self, topic: str, payload: bytes) -> None:
        """See Client."""
        if not payload:
            if topic == TOPICS.down(self.name, "plan"):
                self.tell(ev.NothingPlanned())
            return
        match codec.decode(payload).b:
            case Plan() as plan:
                self.tell(ev.PlanCame(plan=plan))
            case Cancel() as cancel:
                key = {"job": cancel.job, "round": cancel.round, "attempt": cancel.attempt}
                self.tell(ev.CancelCame(**key, reason=cancel.reason, keep=cancel.keep))  # type: ignore[arg-type]
            case Rebirth():
                self.tell(ev.RebirthAsked())
            case CoordinatorState(session=session, online=online):
                self.tell(ev.CoordinatorSeen(session=session, online=online))
            case Done(xfer=xfer):
                self._witness.may_be_forgotten(self.name, xfer)
                self.tell(ev.UpdateAccepted(xfer=xfer))
            case Refuse() as refuse:
                self._refused(refuse)

    def _refused(self, refuse: Refuse) -> None:
        if refuse.retry_after_s:
            self._uploads.postponed(refuse.xfer, refuse.retry_after_s, self.clock())
            self._arm()
        elif refuse.xfer in self.core.outbox:
            kind = refuse.reason.split(":")[0]
            is_spoiled = self.core.outbox[refuse.xfer].blob.sha256 in self.cloud.spoiled
            assert kind == "superseded" or is_spoiled, f"an honest update of {self.name} is refused: {refuse.reason}"
            self._clockwork.fault(f"update declined, {kind}", self.name)
            self.tell(ev.UpdateDeclined(xfer=refuse.xfer, reason=refuse.reason))

    # ----------------------------------------------------------------------------------------------------------- time

    def host_speaks(self, level: ev.Level) -> None:
        """The server's own services need the device, or do not any more."""
        self._paused = "" if level in {"run", "shrink"} else f"the host says {level}"
        self.tell(ev.HostSpoke(level=level, reason=self._paused))
        self._say_report()

    def _arm(self) -> None:
        """Come back when the core or an offer is due; without a connection no offer is."""
        offers_at = self._uploads.wake_at if self._broker.is_connected(self.name) else None
        due = [at for at in (self.core.wake_at, offers_at) if at is not None]
        at = min(due, default=float("inf")) - self._offset_s
        if at < self._rings_at:
            self._rings_at = max(at, self._clockwork.now + 1e-3)
            self._clockwork.at(self._rings_at, self._life, self._ring)

    def _ring(self) -> None:
        self._rings_at = float("inf")
        if self._broker.is_connected(self.name):
            self._offer(self._uploads.tick(self.clock()))
        if (at := self.core.wake_at) is not None and at <= self.clock():
            self.tell(ev.Tick())
        else:
            self._arm()
