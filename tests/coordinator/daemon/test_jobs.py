"""A job on the whole coordinator, from the first survey to the exported adapter."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.core import events as ev
from coordinator.core.state import Phase
from protocol.messages import Cancel
from protocol.models import read_model
from tests.coordinator.daemon.peer import MATRICES, PATIENCE_S
from tests.coordinator.daemon.stage import GOOD, PHASES, Stage, job_spec, undisturbed


async def test_a_job_from_the_first_survey_to_the_exported_adapter(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb", "ccc")
    await stage.submit(job_spec(3))
    job = await stage.ended()
    assert (job.phase, job.version, job.reason) == (Phase.COMPLETED, 2, "")
    assert stage.outcomes() == GOOD
    records = list(stage.coordinator.store.rounds("j"))
    assert [sorted(r.shares) for r in records] == [["a", "bb", "ccc"]] * 3
    assert [r.shares["bb"].samples for r in records] == [6, 6, 0]
    assert [found.loss for r in records if (found := r.shares["bb"].evaluated)] == pytest.approx([3.2, 2.7, 2.2])
    assert all(len(p.accepted) == 2 and not p.refused and not p.offers for p in stage.peers.values())

    found = load_file(stage.export() / "adapter_model.safetensors")
    master = read_model(stage.coordinator.blobs.path(stage.masters()[-1]), max_bytes=2**30)
    assert {m.name for m in MATRICES} == set(master)
    for name, factors in master.items():
        assert np.array_equal(found[f"base_model.model.{name}.lora_A.weight"][: factors.rank], factors.a)
        assert np.array_equal(found[f"base_model.model.{name}.lora_B.weight"][:, : factors.rank], factors.b)
    config = json.loads((stage.export() / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == max(factors.rank for factors in master.values())
    told = json.loads((stage.export() / "fedpipe.json").read_text())["rounds"]
    assert [entry["loss"] for entry in told] == pytest.approx([2.7, 2.2])

    versions = stage.coordinator.store.versions("j")
    assert stage.coordinator.exchange.n_sent_bytes == sum(v.model.size for v in versions), "one copy for all three"
    left = set(stage.coordinator.blobs)
    models = {v.model.sha256 for v in versions}
    assert left == models | set(stage.masters()), "updates are deleted once their aggregate is journalled"
    assert [t for t in stage.broker.retained if t.endswith("/plan")] == []


async def test_the_first_version_is_the_weighted_sum_of_what_was_trained(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(lambda _: stage.job().version == 1)
    master = read_model(stage.coordinator.blobs.path(stage.masters()[0]), max_bytes=2**30)
    plans = [p.plans[1] for p in stage.peers.values()]
    for matrix in MATRICES:
        parts = [p.factors(plan)[matrix.name] for p, plan in zip(stage.peers.values(), plans, strict=True)]
        whole = sum(n / 11 * f.b.astype(np.float64) @ f.a for n, f in zip((5, 6), parts, strict=True))
        u, s, v = np.linalg.svd(whole)
        best = u[:, :6] * s[:6] @ v[:6]
        assert np.allclose(master[matrix.name].b @ master[matrix.name].a, best, atol=1e-4)
    await stage.ended()


async def test_two_jobs_side_by_side_do_not_disturb_each_other(stage: Stage, tmp_path: Path) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await asyncio.gather(stage.submit(job_spec(name="j")), stage.submit(job_spec(name="k")))
    assert (await stage.ended("j")).phase is (await stage.ended("k")).phase is Phase.COMPLETED
    for name in ("j", "k"):
        assert stage.outcomes(name) == GOOD
        assert stage.masters(name) == await undisturbed(tmp_path / name, "a", "bb", name=name)


async def test_a_cancelled_job_tells_its_agents_to_stop(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a")
    stage.peers["a"].deaf_in = 1
    await stage.submit(job_spec(1))
    await stage.until(PHASES["plans are out"])
    await stage.coordinator.post(ev.JobCancelled(job="j"))
    job = await stage.ended()
    assert (job.phase, job.reason) == (Phase.CANCELLED, "cancelled by the operator")
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await stage.peers["a"].commands.get(), Cancel)


async def test_an_export_that_failed_is_made_at_the_next_start(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    obstacle = stage.folder / "cloud" / "exports"
    obstacle.write_text("in the way")
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert "not exported" in caplog.text
    obstacle.unlink()
    await stage.stop()
    await stage.start()
    await stage.ended()
    assert (stage.export() / "adapter_model.safetensors").is_file()


async def test_slow_work_that_is_asked_for_as_it_ends_is_begun_again(stage: Stage) -> None:
    await stage.start()
    done = []

    async def work(number: int) -> None:
        done.append(number)
        if number == 0:  # runs when this is done, and before anybody is told so
            asyncio.get_running_loop().call_soon(stage.coordinator._spawn, "x", work(1))

    stage.coordinator._spawn("x", work(0))
    for _ in range(5):
        await asyncio.sleep(0)
    assert done == [0, 1]
    assert "x" not in stage.coordinator._slow
    stage.coordinator._spawn("x", work(2))
    stage.coordinator._spawn("x", work(3))
    for _ in range(5):
        await asyncio.sleep(0)
    assert done == [0, 1, 2], "what is under way is not begun twice"


async def test_slow_work_that_is_asked_for_while_the_daemon_ends_is_not_begun(stage: Stage) -> None:
    await stage.start()

    async def work() -> None:
        raise AssertionError("begun")

    one = stage.coordinator
    await stage.kill()
    one._spawn("x", work())
    assert not one._slow
