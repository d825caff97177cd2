"""A fleet of unlike servers: what text they hold, how much memory they have, what a step costs them."""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from agent import loading
from agent.bases import base_digest
from agent.batches import endless
from agent.data import DataConfig, Example, split
from agent.trainers import calibration, importance
from coordinator.core.choice import Choice
from coordinator.planner.cost import PROCESS_BYTES, CostModel, Setting, fit, shape_of
from fedpipe import corpus, pretrain
from protocol import memory
from protocol.messages import Bits, Calibrated, Calibration, Matrix, Point, Surveyed, Training

MAX_TOKENS: Final = 96
MAX_RANK: Final = 16
HELD_OUT_RATIO: Final = 0.1
N_SOURCES: Final = 6
N_PAIRS: Final = 1500
"""Per source."""
CONCENTRATION: Final = 0.5
"""Of the Dirichlet distribution that deals each source's text to the servers."""
N_MIXED, N_OWN = 192, 32
"""Held-out samples of the whole fleet and of each server."""
JITTER: Final = 0.1
"""A server's steps take up to this much more or less than expected, drawn for every round."""

T = TypeVar("T")


class Device(NamedTuple):
    """speed: how many times slower than this machine; memory: of the model's own, how many times the smallest server's."""

    speed: float
    memory: float
    up_bytes_per_s: float
    down_bytes_per_s: float


DEVICES: Final = {
    "large": Device(1.0, 8.0, 800e3, 4e6),
    "fast": Device(1.5, 4.0, 400e3, 2e6),
    "roomy": Device(2.0, 6.0, 800e3, 4e6),
    "small": Device(3.0, 1.0, 200e3, 1e6),
    "medium": Device(4.0, 3.0, 400e3, 2e6),
    "straggler": Device(8.0, 2.0, 200e3, 1e6),
}
"""Memory and speed differ by a factor of eight; beside the fleet's adapter "small" has room for a 4-bit base alone."""


class Machine(msgspec.Struct, frozen=True):
    """What was measured here, once: every server's costs are multiples of it."""

    base: str
    surveyed: Surveyed
    calibrated: Calibrated


class Server(NamedTuple):
    """One virtual server.  `calibrated` is what its agent would have measured: its own text, its own speed."""

    device: Device
    data: DataConfig
    surveyed: Surveyed
    calibrated: Calibrated
    cost: CostModel
    limit_bytes: int
    held_out: list[Example]

    def setting(self, choice: Choice, frozen: Mapping[str, int]) -> Setting:
        """The choice as the cost model wants it."""
        mean, longest = shape_of(self.calibrated, choice.batch, MAX_TOKENS)
        return Setting(
            bits=choice.bits,
            n_tokens_mean=mean,
            n_tokens_max=longest,
            ranks=choice.ranks,
            frozen=frozen,
            accumulation=choice.accumulation,
            checkpointing=choice.checkpointing,
            skip=min(map(memory.block, choice.ranks)),
        )

    def step_s(self, choice: Choice, frozen: Mapping[str, int]) -> float:
        """Seconds of one optimizer step, as expected."""
        return self.cost.predict(self.setting(choice, frozen))[0]

    def peak_bytes(self, choice: Choice, frozen: Mapping[str, int]) -> int:
        """What the share takes at its peak."""
        return int(self.cost.predict(self.setting(choice, frozen))[1])


class World(NamedTuple):
    """All servers with the base model and a held-out sample of everybody's text."""

    base: Path
    seed: int
    servers: dict[str, Server]
    mixed: list[Example]

    @property
    def matrices(self) -> list[Matrix]:
        """Of the base; the same for all."""
        return next(iter(self.servers.values())).surveyed.matrices

    @property
    def step_s(self) -> float:
        """The unit of time: a step of 8 samples on the fastest server, all matrices at rank 8, base as it is."""
        choice = Choice(ranks={m.name: 8 for m in self.matrices}, bits="none", n_steps=1, batch=8)
        return min(server.step_s(choice, {}) for server in self.servers.values())

    def jitter(self, agent: str, number: int) -> float:
        """How much slower than expected a server is in a round, drawn from (seed, agent, round): the same for all systems."""
        return 1 + random.Random(f"{self.seed}/{agent}/{number}").uniform(-JITTER, JITTER)


def load(folder: Path, seed: int, *, n_measurements: int = 3) -> World:
    """The fleet of one seed; made on the first call, afterwards read from `folder`.  Minutes for the first seed, then 15 s."""
    _deal(folder / "data" / str(seed), seed)
    machine = _kept(folder / "machine.json", Machine, lambda: _measure(folder / "data" / str(seed), n_measurements))
    base = Path(machine.base)
    smallest = smallest_bytes(machine)
    servers = {}
    for agent, device in DEVICES.items():
        data = DataConfig(path=str(folder / "data" / str(seed) / f"{agent}.jsonl"))
        parts = split.load(data, seed, HELD_OUT_RATIO)
        own = _kept(folder / "data" / str(seed) / f"{agent}.json", Calibrated, lambda p=parts: _look(base, machine, p))
        calibrated = msgspec.structs.replace(
            machine.calibrated,
            scores=own.scores,
            noise_scale=own.noise_scale,
            shapes=own.shapes,
            points=[
                msgspec.structs.replace(p, step_s=p.step_s * device.speed, peak_bytes=point_bytes(machine, p))
                for p in machine.calibrated.points
            ],
        )
        surveyed = msgspec.structs.replace(machine.surveyed, n_train=len(parts.train), n_eval=len(parts.held_out))
        servers[agent] = Server(
            device=device,
            data=data,
            surveyed=surveyed,
            calibrated=calibrated,
            cost=fit(surveyed, calibrated),
            limit_bytes=PROCESS_BYTES + int(device.memory * smallest),
            held_out=sorted(parts.held_out, key=attrgetter("key"))[:N_OWN],
        )
    everybody = [example for s in servers.values() for example in split.load(s.data, seed, HELD_OUT_RATIO).held_out]
    return World(base, seed, servers, sorted(everybody, key=attrgetter("key"))[:N_MIXED])


def smallest_bytes(machine: Machine) -> int:
    """Room for the model on the smallest server: one byte less than the 8-bit base takes at rank 1 beside the fleet's adapter."""
    return _model_bytes(machine, "int8", rank=1, n_tokens=MAX_TOKENS, frozen=MAX_RANK, checkpointing=True) - 1


def _model_bytes(
    machine: Machine, bits: Bits, *, rank: int, n_tokens: int, frozen: int, checkpointing: bool, skip: int = 0
) -> int:
    found, dims = machine.surveyed.matrices, machine.surveyed.dimensions
    assert dims is not None
    return memory.predicted_bytes(
        dims,
        found,
        {m.name: rank for m in found if memory.block(m.name) >= skip},
        frozen={m.name: frozen for m in found},
        bits=bits,
        compute=machine.calibrated.compute,
        n_tokens=n_tokens,
        checkpointing=checkpointing,
    )


def point_bytes(machine: Machine, point: Point) -> int:
    """The formula's peak of a point, on which all servers' cost models are fitted: so they give the formula back."""
    return PROCESS_BYTES + _model_bytes(
        machine,
        point.bits,
        rank=point.rank,
        n_tokens=max(round(point.n_tokens), point.max_tokens),
        frozen=point.frozen_rank,
        checkpointing=point.checkpointing,
        skip=point.skip,
    )


# -------------------------------------------------------------------------------------------------- text and figures


def _deal(folder: Path, seed: int) -> None:
    """Write every server's text: each source is dealt to the servers in shares that are drawn from a Dirichlet distribution."""
    if (folder / "whole").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    hands: dict[str, list[str]] = {agent: [] for agent in DEVICES}
    for pairs in corpus.shards(N_SOURCES, limit=N_PAIRS, seed=seed).values():
        cuts = np.cumsum(rng.dirichlet([CONCENTRATION] * len(DEVICES)))[:-1]
        lines = [json.dumps(pair._asdict()) + "\n" for pair in pairs]
        for hand, part in zip(hands.values(), np.split(np.array(lines), (cuts * len(lines)).astype(int)), strict=True):
            hand.extend(part.tolist())
    for agent, lines in hands.items():
        random.Random(seed).shuffle(lines)
        (folder / f"{agent}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "whole").touch()


def _ask(max_s: float = 60.0) -> Calibration:
    return Calibration(batches=[1, 2, 4, 8, 16, 32], n_batches=8, max_tokens=MAX_TOKENS, max_s=max_s)


def _measure(data: Path, n_measurements: int) -> Machine:
    """The micro-benchmark of this machine at all widths, several times over; of each point the fastest."""
    base, cpu = pretrain.base_model(), torch.device("cpu")
    parts = split.load(DataConfig(path=str(data / "large.jsonl")), 0, HELD_OUT_RATIO)
    surveyed = Surveyed(
        base_sha256=base_digest(base, None),
        matrices=loading.survey(base),
        n_train=len(parts.train),
        n_eval=len(parts.held_out),
        dimensions=loading.dimensions(base),
    )
    found: list[Calibrated] = []
    for _ in range(n_measurements):
        outcome = _drain(
            calibration.calibrate(
                _ask(20.0 * n_measurements),
                surveyed,
                parts,
                lambda bits: loading.load(base, bits, cpu),
                device=cpu,
                compute=loading.compute_type(base, cpu),
            )
        )
        if outcome.calibrated is None:
            raise SystemExit(f"this machine could not be measured: {outcome.why}")
        found.append(outcome.calibrated)
    fastest: dict[tuple[object, ...], Point] = {}
    for point in (point for one in found for point in one.points):
        key = (point.bits, point.batch, point.rank, point.skip, point.frozen_rank, point.checkpointing)
        fastest[key] = min(fastest.get(key, point), point, key=attrgetter("step_s"))
    return Machine(str(base), surveyed, msgspec.structs.replace(found[0], points=list(fastest.values())))


def _look(base: Path, machine: Machine, parts: split.Split) -> Calibrated:
    """What depends on a server's own text: scores, noise, shapes of batches."""
    loaded = loading.load(base, "none", torch.device("cpu"))
    training = Training(n_steps=1, batch=8, max_tokens=MAX_TOKENS)
    found = _drain(importance.score(loaded, endless(parts.train, loaded.tokenizer, training, 0), _ask()))
    assert found is not None
    return msgspec.structs.replace(
        machine.calibrated,
        scores=found.scores.astype("<f4").tobytes(),
        noise_scale=found.noise_scale,
        shapes=calibration.shapes_of(parts.train, loaded.tokenizer, _ask()),
    )


def _drain(running: Generator[object, bool, T]) -> T:
    try:
        while True:
            next(running)
    except StopIteration as end:
        result: T = end.value
        return result


def _kept(path: Path, kind: type[T], make: Any) -> T:
    """What is in the file, made and written first where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(make()))
        part.rename(path)
    return msgspec.json.decode(path.read_bytes(), type=kind)
