"""The comparison's clock and its arithmetic, on a made-up fleet: nothing is trained here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from agent.data import DataConfig
from bench.pipeline import running, summary
from bench.pipeline.running import Point, Result
from bench.pipeline.systems import EVERY, FEDPIPE, Round, baseline_choices
from bench.pipeline.world import DEVICES, Machine, Server, World, point_bytes, smallest_bytes
from coordinator.core.choice import Choice
from coordinator.planner.cost import PROCESS_BYTES, fit
from protocol import memory, messages
from protocol.adapters import Factors
from protocol.messages import Calibrated, Dimensions, Matrix, Shape, Surveyed

MATRICES = [
    Matrix(name=f"model.layers.{layer}.{part}", d_out=d_out, d_in=d_in)
    for layer in range(2)
    for part, d_out, d_in in [("self_attn.q_proj", 64, 64), ("mlp.up_proj", 128, 64), ("mlp.down_proj", 64, 128)]
]
DIMENSIONS = Dimensions(hidden=64, mlp=128, key_value=64, vocabulary=256, n_layers=2, n_other=20_000)
SURVEYED = Surveyed(base_sha256="0" * 64, matrices=MATRICES, n_train=500, n_eval=50, dimensions=DIMENSIONS)


def point(bits: messages.Bits, n_tokens: int, speed: float) -> messages.Point:
    made = messages.Point(
        bits=bits, batch=8, n_tokens=n_tokens, max_tokens=800, rank=4, step_s=1e-4 * n_tokens * speed, peak_bytes=1
    )
    unmeasured = Machine("", SURVEYED, Calibrated(device="cpu", probe_rank=1, scores=b""))
    return msgspec.structs.replace(made, peak_bytes=point_bytes(unmeasured, made))


def calibrated(speed: float) -> Calibrated:
    return Calibrated(
        device="cpu",
        probe_rank=1,
        scores=np.ones(len(MATRICES), "<f4").tobytes(),
        shapes=[Shape(batch=b, mean_tokens=50 * b, max_tokens=96 * b) for b in (1, 8)],
        points=[point(bits, n, speed) for bits in ("nf4", "int8", "none") for n in (60, 700)],
    )


@pytest.fixture(scope="module")
def world() -> World:
    smallest = smallest_bytes(Machine("", SURVEYED, calibrated(1.0)))
    servers = {}
    for agent, device in DEVICES.items():
        found = calibrated(device.speed)
        limit = PROCESS_BYTES + int(device.memory * smallest)
        servers[agent] = Server(device, DataConfig(path="x"), SURVEYED, found, fit(SURVEYED, found), limit, [])
    return World(Path(), 1, servers, [])


def test_baselines_differ_in_ranks_alone_and_fit_every_server(world: World) -> None:
    uniform, largest = (baseline_choices(world, EVERY[name]) for name in ("uniform LoRA", "HetLoRA"))
    assert len({next(iter(c.ranks.values())) for c in uniform.values()}) == 1
    assert len({next(iter(c.ranks.values())) for c in largest.values()}) > 1
    for choices in (uniform, largest):
        assert {(c.n_steps, c.batch * c.accumulation, len(c.ranks)) for c in choices.values()} == {
            (20, 8, len(MATRICES))
        }
        for agent, choice in choices.items():
            assert world.servers[agent].peak_bytes(choice, {}) <= world.servers[agent].limit_bytes
    assert uniform["small"].bits == "nf4"


def test_memory_is_the_formulas(world: World) -> None:
    choice = Choice(ranks={MATRICES[4].name: 8}, bits="int8", n_steps=1, batch=2)
    formula = memory.predicted_bytes(
        DIMENSIONS,
        MATRICES,
        choice.ranks,
        frozen={m.name: 16 for m in MATRICES},
        bits="int8",
        compute="fp32",
        n_tokens=2 * 96,
        checkpointing=False,
    )
    found = world.servers["fast"].peak_bytes(choice, {m.name: 16 for m in MATRICES})
    assert found - PROCESS_BYTES == pytest.approx(formula, rel=1e-3)


def test_a_round_waits_for_the_slowest_or_cuts_it_at_the_deadline(world: World) -> None:
    system = EVERY["uniform LoRA"]
    asked = Round(baseline_choices(world, system), None)
    waiting = running._shares(world, system, asked, "wait", {}, 1, 0)
    cut = running._shares(world, system, asked, "deadline", {}, 1, 0)
    assert {share.n_steps for share in waiting.values()} == {20}
    assert waiting["straggler"].end_s > 4 * waiting["large"].end_s
    assert 0 < cut["straggler"].n_steps < 20 == cut["large"].n_steps
    assert max(s.end_s for s in cut.values()) < max(s.end_s for s in waiting.values())
    planned = running._shares(world, FEDPIPE, Round(asked.choices, 1e-9), "deadline", {}, 1, 0)
    assert {(s.n_steps, s.up_bytes) for s in planned.values()} == {(0, 0)}


def test_bytes_are_those_of_the_published_methods(world: World) -> None:
    rng = np.random.default_rng(0)
    model = {
        m.name: Factors(rng.normal(size=(8, m.d_in)).astype("f4"), rng.normal(size=(m.d_out, 8)).astype("f4"))
        for m in MATRICES
    }
    choice = baseline_choices(world, EVERY["uniform LoRA"])["small"]
    rank = next(iter(choice.ranks.values()))
    both, b = sum(m.d_in + m.d_out for m in MATRICES), sum(m.d_out for m in MATRICES)
    assert running._up_bytes(world, EVERY["HetLoRA"], choice) == 2 * rank * both
    assert running._up_bytes(world, EVERY["FFA-LoRA"], choice) == 2 * rank * b
    assert running._down_bytes(EVERY["FlexLoRA"], model, choice, 7) == 2 * min(rank, 8) * both
    assert running._down_bytes(FEDPIPE, model, choice, 7) == 2 * 8 * both
    assert running._down_bytes(EVERY["FLoRA"], model, choice, 7) == 7


def result(system: str, seed: int, *points: tuple[float, int, float]) -> Result:
    rounds = [Point(n, t, up, loss, 75 if n else 0, 100 if n else 0) for n, (t, up, loss) in enumerate(points)]
    return Result(system, "wait", 1e-3, seed, 10.0, rounds, {})


def test_the_target_is_the_best_baselines_last_loss_of_the_seed() -> None:
    found = summary.report(
        [
            result("fedpipe", 1, (0, 0, 5.0), (2, 10, 3.0), (4, 20, 2.0)),
            result("HetLoRA", 1, (0, 0, 5.0), (4, 40, 2.9), (8, 80, 3.0)),
            result("FLoRA", 1, (0, 0, 5.0), (4, 40, 4.0), (8, 80, 3.5)),
            result("fedpipe", 2, (0, 0, 5.0), (2, 10, 3.9), (4, 20, 3.0)),
            result("HetLoRA", 2, (0, 0, 5.0), (4, 40, 4.0), (8, 80, 3.5)),
            result("FLoRA", 2, (0, 0, 5.0), (4, 40, 4.0), (8, 80, 3.1)),
        ]
    )
    assert [(t.baseline, t.loss, t.time_s) for t in found.targets] == [("HetLoRA", 3.0, 4), ("FLoRA", 3.1, 8)]
    assert found.summary.time_to_target_ratio == pytest.approx(2.0)
    assert found.summary.bytes_to_target_ratio == pytest.approx(4.0)
    assert found.summary.under_training_rate == pytest.approx(0.25)
    line = next(s for s in found.systems if s.system == "HetLoRA")
    assert (line.n_reached, line.time_ratio) == (1, None)
    assert "HetLoRA" in summary.table(found)
