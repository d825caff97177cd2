"""The coordinator sums while updates come: the same versions as without, whatever becomes of the last update."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.config import Transfer as TransferConfig
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import Phase
from protocol.frames import decode_frame
from tests.coordinator.daemon.peer import PATIENCE_S
from tests.coordinator.daemon.stage import PHASES, Stage, job_spec


class Gap:
    """Of each update of bb one chunk is lost for as long as it is open."""

    def __init__(self, stage: Stage, index: int) -> None:
        self.index, self.is_open = index, True
        stage.broker.drop = lambda topic, payload: (
            self.is_open and "/bb/up/d/" in topic and decode_frame(payload)[0] == self.index
        )


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """A coordinator that asks for a lost chunk again and again."""
    transfer = TransferConfig(timeout_s=0.02)
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(Stage(tmp_path, stack, transfer=transfer))


def is_begun(stage: Stage) -> bool:
    return "j" in stage.coordinator.work.ahead._sums


async def until_begun(stage: Stage) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_begun(stage):  # noqa: ASYNC110 - some turns of the loop
            await asyncio.sleep(0)


def acts(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [getattr(record, "action", "") for record in caplog.records]
    return [action for action in said if action in {"ahead", "ahead_failed"}]


async def test_every_version_is_that_of_a_sum_afterwards(
    stage: Stage, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert acts(caplog) == ["ahead", "ahead"]
    caplog.clear()
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(Stage(tmp_path_factory.mktemp("plain"), stack))
        one = await other.start()
        one.work.fold_ahead = lambda *_: None  # type: ignore[method-assign]
        await other.peer("a", "bb")
        await other.submit(job_spec())
        assert (await other.ended()).phase is Phase.COMPLETED
        assert acts(caplog) == []
        assert stage.masters() == other.masters()


async def test_it_begins_when_only_the_last_is_missing_and_ends_with_it(stage: Stage, wanted: list[str]) -> None:
    gap = Gap(stage, index=1)
    wishes: list[act.Wish] = []
    one = await stage.start()
    one.watchers.add(lambda _, more: wishes.extend(more))
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    await until_begun(stage)
    kept = set(one.blobs)
    assert len(kept) == 1, "the update of a, and no version"
    gap.is_open = False
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    folds = [wish for wish in wishes if isinstance(wish, act.Aggregate)]
    foreseen = [wish.fold for wish in wishes if isinstance(wish, act.AggregateAhead)]
    assert all(fold in foreseen for fold in folds)


async def test_an_update_that_is_lost_meanwhile_is_not_in_the_version(
    stage: Stage, caplog: pytest.LogCaptureFixture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    caplog.set_level("INFO")
    Gap(stage, index=1)
    one = await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec(n_rounds=1, min_agents=1, start_agents=2))
    await stage.until(PHASES["one update is here"])
    await until_begun(stage)
    bb = stage.peers["bb"]
    (offer,) = bb.offers.values()
    one.traffic.withdrawn("bb", offer.blob.xfer, "its disk was lost")
    assert (await stage.ended()).phase is Phase.COMPLETED
    (first, _) = one.store.rounds("j")
    assert (first.shares["a"].state, first.shares["bb"].state) == ("DONE", "FAILED")
    assert acts(caplog) == []
    async with AsyncExitStack() as stack:
        alone = await stack.enter_async_context(Stage(tmp_path_factory.mktemp("alone"), stack))
        await alone.start()
        await alone.peer("a", "bb")
        alone.peers["bb"].forge = lambda _, path, offer: path.unlink() or offer  # type: ignore[func-returns-value]
        await alone.submit(job_spec(n_rounds=1, min_agents=1, start_agents=2))
        await alone.ended()
        assert stage.masters() == alone.masters()


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_an_end_in_the_middle_leaves_nothing_behind(stage: Stage, wanted: list[str], how: str) -> None:
    gap = Gap(stage, index=1)
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    await until_begun(stage)
    await (stage.stop() if how == "stop" else stage.kill())
    async with asyncio.timeout(PATIENCE_S):
        while any(t.name.startswith("ahead") for t in threading.enumerate()):  # noqa: ASYNC110 - it ends by itself
            await asyncio.sleep(0.005)
    assert not [path for path in stage.coordinator.blobs.partial.iterdir() if path.name.startswith("new-")]
    await stage.start()
    gap.is_open = False
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted


async def test_a_cancelled_job_has_no_sum(stage: Stage) -> None:
    Gap(stage, index=1)
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    await until_begun(stage)
    await stage.coordinator.post(ev.JobCancelled(job="j", reason="enough"))
    await stage.ended()
    assert not is_begun(stage)
