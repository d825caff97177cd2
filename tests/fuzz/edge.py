"""Target: a script of a hostile coordinator, of the host and of a child that dies, for the agent's real session."""

from __future__ import annotations

from typing import Any

from agent.core import actions as act
from agent.core import events as ev
from agent.core.session import Session
from agent.core.work import SUSPENDED
from protocol.messages import (
    Base,
    Blob,
    Calibrated,
    Calibration,
    Evaluated,
    Level,
    Matrix,
    Offer,
    Plan,
    Surveyed,
)
from tests.fuzz.script import Script

T0 = 1_750_000_000.0
MODELS = [
    None,
    *(
        Blob(
            sha256=f"{n:064x}", size=500, levels=[Level(rank=r, size=100 * r, sha256=f"{n}{r:063x}") for r in (0, 4, 9)]
        )
        for n in (1, 2)
    ),
    Blob(sha256="9" * 64, size=2**40, levels=[]),
]
NEWS: list[ev.Happened] = [ev.RebirthAsked(), ev.BusUp(), ev.BusDown(reason="cut"), ev.NothingPlanned()]
TICK = ev.Tick()
XFERS = [f"{n:032x}" for n in range(8)]
SPOKEN: list[Any] = [
    ev.ChildBegan(phase="loading"),
    ev.ChildBegan(phase="training"),
    ev.ChildEvaluated(result=Evaluated(version=1, n_samples=1, n_tokens=9, loss=float("nan"))),
    ev.ChildSurveyed(
        result=Surveyed(base_sha256="b" * 64, matrices=[Matrix(name="q", d_out=8, d_in=8)], n_train=9, n_eval=1)
    ),
    ev.ChildCalibrated(result=Calibrated(device="cpu", probe_rank=1, scores=b"\0\0\0\0")),
]


class Server:
    """One server: the session, and what an observer of its wishes knows of its child and its outbox."""

    def __init__(self) -> None:
        self.session = Session(["qlora"], [], max_global_rank=8)
        self.now, self.tag, self.serial = T0, 0, 0
        self.busy: Plan | None = None
        self.told = self.suspends = False
        self.owed: dict[str, Offer] = {}
        self.wanted = [""]

    def feed(self, event: ev.Happened) -> None:
        """One event, and the laws that its wishes keep."""
        for wish in self.session.handle(event, self.now):
            match wish:
                case act.StartChild(plan=plan):
                    assert self.busy is None, "two runs of one child"
                    self.busy, self.told, self.suspends = plan, False, False
                case act.StopChild(suspend=suspend):
                    self.suspends = suspend
                    assert self.busy, "nothing runs"
                    assert not self.told, "told twice"
                    self.told = True
                case act.PauseChild() | act.ResumeChild() | act.ShrinkChild() | act.KillChild():
                    assert self.busy, "nothing runs"
                case act.FetchModel(sha256=sha256, size=size, blob=blob):
                    assert size <= blob.size
                    self.wanted.append(sha256)
                case act.OfferUpdate(offer=offer):
                    self.owed[offer.blob.xfer] = offer
                case act.ForgetUpdate(xfer=xfer):
                    settled = isinstance(event, ev.UpdateAccepted | ev.UpdateDeclined) and event.xfer == xfer
                    assert settled or xfer not in self.owed, "an update is lost"
                    self.owed.pop(xfer, None)
                case act.Say(message=message):
                    assert message.serial > self.serial
                    self.serial = message.serial
                case _:
                    pass
        self.session.check()
        assert set(self.session.outbox) == set(self.owed)

    def ended(self, n_samples: int, *, keeps: bool) -> None:
        """The child is through, with an update or without; told to suspend it may have kept what it trained."""
        plan, self.busy = self.busy, None
        assert plan is not None
        update = None
        if n_samples and plan.purpose == "train":
            self.tag += 1
            blob = Blob(sha256=f"{self.tag:032x}" + "0" * 32, size=9)
            update = Offer(
                job=plan.job,
                round=plan.round,
                attempt=plan.attempt,
                kind="lora",
                blob=blob,
                samples=n_samples,
                stopped=SUSPENDED if keeps and self.suspends else "",
            )
        self.feed(ev.ChildFinished(samples=n_samples, loss=1.0, train_s=1.0, stopped="", update=update))


def _plan(script: Script) -> Plan:
    train = script.pick(["train", "train", "survey", "evaluate"])
    return Plan(
        job=script.pick(["x", "y"]),
        round=script.pick([0, 1, 2, 2**53]),
        attempt=script.pick([0, 1, 2**53]),
        purpose=train,  # type: ignore[arg-type]
        method=script.pick(["qlora", "qlora", "qlora", "exotic", "../x"]),
        base=Base(source="/etc/passwd"),
        model=script.pick(MODELS),
        calibration=Calibration() if script.below(4) == 0 else None,
        issued_at=T0,
        stop_after_s=script.pick([0.0, 10.0, 100.0, 1e9]),
        ttl_s=script.pick([0.0, 20.0, 120.0, 1e9]),
    )


def session(data: bytes) -> None:
    """Plans, cancels, answers, crashes and silence in any order; then time and the child's ends bring everything to rest."""
    script, server = Script(data), Server()
    while script.more:
        match script.below(16):
            case 0 | 1 | 2:
                server.feed(ev.PlanCame(plan=_plan(script)))
            case 3:
                plan = _plan(script)
                key: dict[str, Any] = {"job": plan.job, "round": plan.round, "attempt": plan.attempt}
                server.feed(ev.CancelCame(**key, reason="x" * 2000, keep=script.below(2) == 1))
            case 4:
                server.feed(ev.UpdateAccepted(xfer=script.pick([*XFERS, *server.owed])))
            case 5:
                xfer = script.pick([*XFERS, *server.owed])
                server.feed(ev.UpdateDeclined(xfer=xfer, reason=script.pick(["superseded: x", "bad"])))
            case 6:
                server.feed(ev.CoordinatorSeen(session=script.pick("abc") * 16, online=bool(script.below(2))))
            case 7:
                server.feed(script.pick(NEWS))
            case 8 | 9:
                sha256 = server.wanted[-1 - script.below(min(3, len(server.wanted)))]
                lost = ev.ModelLost(sha256=sha256, reason="gone")
                server.feed(lost if script.below(4) == 0 else ev.ModelFetched(sha256=sha256, n_bytes=9))
            case 10 if server.busy:
                server.feed(script.pick(SPOKEN))
            case 11 if server.busy:
                server.ended(script.below(3), keeps=script.below(2) == 1)
            case 12 if server.busy:
                server.busy = None
                server.feed(ev.ChildFailed(reason="died"))
            case 13:
                server.feed(ev.HostSpoke(level=script.pick(["run", "shrink", "pause", "stop"]), reason="services"))
            case 14:
                server.now += script.pick([0.0, 1.0, 45.0, 1e6])
                server.feed(TICK)
            case 15 if script.below(8) == 7:
                server.feed(ev.StopAsked(reason="stopping"))
            case _:
                server.feed(TICK)
    for _ in range(16):
        if server.busy and server.told:
            server.busy = None
            server.feed(ev.ChildFailed(reason="killed"))
        elif (at := server.session.wake_at) is not None:
            server.now = max(server.now, at)
            server.feed(TICK)
        else:
            break
    assert server.session.work is None, "time alone ends every work"
    assert server.busy is None
