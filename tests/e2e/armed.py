"""A daemon with traps: when it comes to a point that is armed, processes die there, itself by default.

    python tests/e2e/armed.py TRAPS coordinator run --config ...

A trap is a file in the folder TRAPS, named after its point; it is removed as it springs, so each springs once, and the file
`sprung` there says which did, with the children that the process had.  Its lines are `SIGNAL WHOM`: `self`, `children`, or the
path of a file with a process id; an empty trap is `SIGKILL self`, and `RAISE` is a fault in the code itself.

The product has no hook for this.  Its own classes run, and their public seams are wrapped:

    coordinator   {Event}.inbox         not journalled yet, nobody was told
                  {Event}.committed     in the journal, the core has not seen it
                  {Event}.performed     every wish performed or begun, no word of it has left
                  {Event}.said          every word of it is at the broker
                  upload.3              the third chunk since the start is on disk
                  plan.begun, fold.begun, fold.written, fold.asked, fold.stored, version.added, snapshot.saved, export.torn
                  journal.torn, snapshot.torn    half a millisecond into the write
    agent         OFFERED.{round}       the plan has come
                  {STATE}.{round}       said, and at the broker
                  measured.{round}      said while PREPARING: what the survey found, how good the model is that came
                  kept.{round}          the update is in the outbox, the core has not heard of it
                  offered.{round}       the offer is at the broker
                  done                  the coordinator has the update, it is not forgotten yet
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

from protocol import codec
from protocol.bus import Bus, Happening, Received
from protocol.errors import BadMessage
from protocol.messages import Done, Envelope, ExecState, Execution, Offer, Plan

SENTINEL: Final = "armed/"
"""Not a topic: behind everything that was said, it tells that all of that is at the broker."""


SOON_S: Final = 0.0005


class Traps:
    """The armed points of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, point: str) -> None:
        """Spring the trap at this point, if there is one."""
        trap = self.folder / point
        try:
            lines = trap.read_text().splitlines() or ["SIGKILL self"]
            trap.unlink()
        except FileNotFoundError:
            return
        children = [child.pid for child in psutil.Process().children(recursive=True)]
        with (self.folder / "sprung").open("a") as log:
            log.write(" ".join([point, *map(str, children)]) + "\n")
        for line in lines:
            if line == "RAISE":
                raise RuntimeError(f"a trap at {point}")
            name, whom = line.split(maxsplit=1)
            pids = {"self": [os.getpid()], "children": children}
            for pid in pids[whom] if whom in pids else _broker(Path(whom)):
                os.kill(pid, signal.Signals[name])

    def soon(self, point: str) -> list[str]:
        """Spring the trap within the next call: most of it is the millisecond or more that the disk takes."""
        if (self.folder / point).exists():
            threading.Timer(SOON_S, self, [point]).start()
        return []


def _broker(pid_file: Path) -> list[int]:
    """The broker that wrote this file, if it lives: another trap may have been quicker."""
    with contextlib.suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
        process = psutil.Process(int(pid_file.read_text()))
        return [process.pid] if process.name() == "mosquitto" else []
    return []


class ArmedBus:
    """The real bus, told on both sides of which message goes through."""

    def __init__(self, bus: Bus, spring: Traps) -> None:
        self._bus, self._spring = bus, spring

    async def __aenter__(self) -> Self:
        await self._bus.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._bus.__aexit__(kind, error, trace)

    async def next(self) -> Happening:
        happening = await self._bus.next()
        if isinstance(happening, Received) and (envelope := _decoded(happening.payload)):
            match envelope.b:
                case Plan(round=number):
                    self._spring(f"OFFERED.{number}")
                case Done():
                    self._spring("done")
        return happening

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        if topic.startswith(SENTINEL):
            self._spring(topic.removeprefix(SENTINEL))
            return
        await self._bus.publish(topic, payload, qos=qos, retain=retain)
        if envelope := _decoded(payload):
            match envelope.b:
                case Execution(round=number, state=state) as said:
                    self._spring(f"{state}.{number}")
                    if state is ExecState.PREPARING and (said.surveyed or said.evaluated):
                        self._spring(f"measured.{number}")
                case Offer(round=number):
                    self._spring(f"offered.{number}")

    async def subscribe(self, *filters: str) -> None:
        await self._bus.subscribe(*filters)

    async def unsubscribe(self, *filters: str) -> None:
        await self._bus.unsubscribe(*filters)


def _decoded(payload: bytes) -> Envelope | None:
    """The message in a payload; chunks and cleared topics hold none."""
    try:
        return codec.decode(payload) if payload else None
    except BadMessage:
        return None


def arm_bus(daemon: Any, spring: Traps) -> None:
    """Give a daemon's module a bus that tells."""
    real = daemon.mqtt_bus
    daemon.mqtt_bus = lambda *arguments: ArmedBus(real(*arguments), spring)


def arm_agent(spring: Traps) -> Callable[[], int]:
    """Wrap what the agent's points are made of."""
    from agent import daemon
    from agent.__main__ import main
    from agent.outbox import Outbox

    keep = Outbox.keep

    def kept(self: Outbox, file: Path, offer: Offer) -> Offer:
        done = keep(self, file, offer)
        spring(f"kept.{done.round}")
        return done

    arm_bus(daemon, spring)
    Outbox.keep = kept  # type: ignore[method-assign]
    return main


def arm_coordinator(spring: Traps) -> Callable[[], int]:
    """Wrap what the coordinator's points are made of."""
    from coordinator import ahead, daemon, export, folding, service
    from coordinator.__main__ import main
    from coordinator.planner import automatic
    from coordinator.store import Store
    from protocol.pulling import Pulling

    _around(Store, "append", spring, _kinds("inbox"), _kinds("committed"))
    _around(Store, "add_version", spring, None, lambda *_: ["version.added"])
    _around(Store, "append", spring, lambda *_: spring.soon("journal.torn"), None)
    _around(Store, "save_snapshot", spring, lambda *_: spring.soon("snapshot.torn"), lambda *_: ["snapshot.saved"])
    _around(automatic, "plan", spring, lambda *_: ["plan.begun"], None)
    _around(ahead.Ahead, "take", spring, lambda *_: ["fold.asked"], None)  # it may have begun long before
    _around(folding, "fold", spring, lambda *_: ["fold.begun"], lambda *_: ["fold.stored"])
    _around(folding, "write_model", spring, None, lambda *_: ["fold.written"])
    _around(export, "write_tensors", spring, None, lambda *_: ["export.torn"])
    n_chunks = iter(range(1, 10**9))
    _around(Pulling, "chunk", spring, None, lambda *_: [f"upload.{next(n_chunks)}"])

    class Armed(daemon.Coordinator):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.watchers.add(self._performed)

        def _performed(self, events: list[Any], _wishes: list[Any]) -> None:
            kinds = sorted({type(event).__name__ for event in events})
            for kind in kinds:
                spring(f"{kind}.performed")
            for kind in kinds:
                self.outgoing.clear(f"{SENTINEL}{kind}.said")

    arm_bus(daemon, spring)
    service.Coordinator = Armed  # type: ignore[assignment,attr-defined]
    return main


Points = Callable[..., list[str]]


def _kinds(where: str) -> Points:
    """The points of a batch that is journalled: (store, events) -> one for each type in it."""
    return lambda _store, events: sorted({f"{type(event).__name__}.{where}" for _, event in events})


def _around(place: Any, name: str, spring: Traps, before: Points | None, after: Points | None) -> None:
    """Replace `place.name` by itself between two sets of points."""
    real = getattr(place, name)

    def armed(*arguments: Any, **named: Any) -> Any:
        for point in before(*arguments) if before else []:
            spring(point)
        result = real(*arguments, **named)
        for point in after(*arguments) if after else []:
            spring(point)
        return result

    setattr(place, name, armed)


if __name__ == "__main__":
    arm = {"coordinator": arm_coordinator, "agent": arm_agent}[sys.argv[2]]
    traps = Traps(Path(sys.argv[1]))
    sys.argv[:3] = [sys.argv[2]]
    sys.exit(arm(traps)())
