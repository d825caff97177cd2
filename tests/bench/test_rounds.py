"""The benchmark of rounds: its arithmetic, and one tiny fleet through the whole of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.rounds import own, report
from bench.rounds.fleet import RANK, Payload


@pytest.mark.parametrize("n_tensors", [2, 64, 448, 12_008])
def test_the_bytes_are_the_same_for_any_number_of_tensors(n_tensors: int) -> None:
    matrices = Payload(n_tensors=n_tensors).matrices
    assert len({m.name for m in matrices}) == len(matrices) == n_tensors // 2
    n_bytes = sum(4 * RANK * (m.d_in + m.d_out) for m in matrices)
    assert n_bytes == pytest.approx(8 * 2**20, rel=0.02)


def test_the_summary_compares_means_with_tls_against_tls() -> None:
    ours = {"rounds_s": [0.5, 2.0, 0.5], "fold_s": 0.1, "peak_over_payload": 2.0}
    found = {
        "bare.broadcast": {"rounds_s": [0.25, 0.25]},
        "fedpipe": ours,
        "fedpipe.tls": ours | {"rounds_s": [2.0], "peak_over_payload": 2.5},
        "in-turn.64-tensors": {"rounds_s": [2.0, 4.0]},
        "in-turn.448-tensors": {"rounds_s": [4.5, 4.5]},
        "nvflare": {"rounds_s": [6.0]},
        "flower": {"rounds_s": [20.0]},
    }
    told = report.summary(found)
    assert told["overhead_s"] == pytest.approx(0.75)
    assert told["overhead_tls_s"] is None  # no bare round with TLS to compare with
    assert (told["vs_flower"], told["vs_flower_tls"], told["vs_nvflare"]) == (20.0, None, 3.0)
    assert told["peak_over_payload"] == pytest.approx(2.5)
    assert told["tensors_448_ratio"] == pytest.approx(1.5)
    assert "nvflare" in report.table(found | {"summary": told})


@pytest.mark.e2e
def test_two_agents_in_one_process_do_rounds_that_carry_the_payload(tmp_path: Path) -> None:
    payload = Payload(n_bytes=2**18, n_tensors=8)
    found = asyncio.run(
        own.measured(tmp_path, payload, n_agents=2, n_rounds=1, method="noop-average", n_together=2, settle_s=0.0)
    )
    assert found.n_bytes == pytest.approx(payload.n_bytes, rel=0.01)
    assert len(found.rounds_s) == 1
    assert found.broker_bytes > 4 * payload.n_bytes  # up twice, and each through the broker in both directions
    phases = found.phases
    assert found.rounds_s[0] == pytest.approx(phases.down + phases.up + phases.fold + phases.plan, abs=1e-3)


@pytest.mark.e2e
def test_two_fleets_take_turns(tmp_path: Path) -> None:
    payloads = [Payload(n_bytes=2**18, n_tensors=n) for n in (8, 64)]
    how = {"n_agents": 1, "n_turns": 1, "n_rounds": 2, "method": "noop-average"}
    found = asyncio.run(own.in_turn(tmp_path, payloads, **how))  # type: ignore[arg-type]
    assert [len(rounds_s) for rounds_s in found] == [2, 2]
    assert all(seconds > 0 for rounds_s in found for seconds in rounds_s)
