"""Sums that begin before their last updates are here: the same bits, and nothing kept of one that nobody asks for."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coordinator import folding
from coordinator.ahead import Ahead
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import Contribution
from coordinator.folding import Early, Unchecked
from protocol.adapters import Factors
from protocol.arriving import Arriving
from protocol.blobs import Blobs
from protocol.messages import Matrix
from protocol.updates import write_update

MATRICES = [Matrix(name=f"m{i}", d_out=6000, d_in=5000) for i in range(4)]
RANKS = {m.name: 4 for m in MATRICES}
PATIENCE_S = 30.0


class Round:
    """Three updates: those of a and b are here, that of c comes."""

    def __init__(self, folder: Path, method: str = "qlora") -> None:
        self.folder, self.blobs = folder, Blobs(folder / "blobs")
        self.files = {agent: self._update(agent) for agent in "abc"}
        for agent in "ab":
            self.blobs.put_file(self.files[agent])
        self.wish = act.Aggregate(
            job="j",
            round=1,
            attempt=0,
            version=1,
            master="",
            contributions=[self._contribution(agent) for agent in "abc"],
            matrices=MATRICES,
            method=method,
            max_rank=6,
            server_lr=1.0,
            model_dtype="bf16",
        )
        self.late = self.coming()

    def coming(self) -> Arriving:
        return Arriving(self.files["c"].stat().st_size)

    def unchecked(self, file: Arriving | None = None) -> dict[str, Unchecked]:
        return {self.wish.contributions[2].sha256: Unchecked(file or self.late, RANKS)}

    def comes(self, share: float = 1.0) -> None:
        path = self.files["c"]
        self.late.reached(int(path.stat().st_size * share), path)

    def kept(self) -> set[str]:
        """What is in the store besides the updates."""
        return set(self.blobs) - {c.sha256 for c in self.wish.contributions}

    def _update(self, agent: str, kind: str = "lora") -> Path:
        rng = np.random.default_rng(ord(agent))
        path = self.folder / agent
        adapter = {
            m.name: Factors(rng.standard_normal((4, 5000), np.float32), rng.standard_normal((6000, 4), np.float32))
            for m in MATRICES
        }
        write_update(path, adapter, job="j", round=1, attempt=0, dtype="int8", kind=kind)  # type: ignore[arg-type]
        return path

    def _contribution(self, agent: str) -> Contribution:
        path = self.files[agent]
        sha256 = Blobs(self.folder / "elsewhere").put_file(path)
        size = path.stat().st_size
        return Contribution(agent=agent, round=1, attempt=0, sha256=sha256, size=size, weight=float(ord(agent)))

    def plainly(self) -> ev.Aggregated:
        return folding.fold(self.wish, Blobs(self.folder / "elsewhere"), 1024)


@pytest.fixture
def one(tmp_path: Path) -> Round:
    return Round(tmp_path)


@pytest.fixture
async def ahead(one: Round) -> AsyncIterator[Ahead]:
    def fold(wish: act.Aggregate, early: Early) -> ev.Aggregated:
        return folding.fold(wish, one.blobs, 1024, (), early)

    async with Ahead(fold) as found:
        yield found
    await until(lambda: not threads())


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ahead")]


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - a thread of the sum is what changes it
            await asyncio.sleep(0.005)


async def test_what_comes_meanwhile_is_summed_to_the_same_bits(one: Round, ahead: Ahead) -> None:
    ahead.begin(one.wish, one.unchecked())
    for share in (0.001, 0.3, 0.6, 1.0):
        one.comes(share)
        await asyncio.sleep(0.01)
    one.late.arrived()
    found = await ahead.take(one.wish)
    assert found == one.plainly()
    assert one.kept() == {found.master, found.model.sha256}
    assert list(one.blobs.partial.iterdir()) == []


async def test_it_goes_as_far_as_what_has_come(one: Round, ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[str] = []
    from coordinator.aggregators import product

    leading = product._leading
    monkeypatch.setattr(product, "_leading", lambda name, *rest: (leading(name, *rest), summed.append(name))[0])
    ahead.begin(one.wish, one.unchecked())
    one.comes(0.6)
    await until(lambda: summed == ["m0", "m1"])
    one.comes(0.8)
    await until(lambda: summed == ["m0", "m1", "m2"])
    assert one.kept() == set()


async def test_nothing_is_kept_before_it_is_asked_for(one: Round, ahead: Ahead) -> None:
    ahead.begin(one.wish, one.unchecked())
    one.comes()
    one.late.arrived()
    await until(lambda: ahead._sums["j"].is_waiting)
    assert one.kept() == set()
    ahead.give_up("j")
    await until(lambda: not threads())
    assert one.kept() == set()
    assert list(one.blobs.partial.iterdir()) == []


async def test_a_round_that_closes_with_others_is_summed_anew(one: Round, ahead: Ahead) -> None:
    ahead.begin(one.wish, one.unchecked())
    one.comes()
    one.late.arrived()
    without_c = msgspec.structs.replace(one.wish, contributions=one.wish.contributions[:2])
    assert await ahead.take(without_c) is None
    await until(lambda: not threads())
    assert await ahead.take(one.wish) is None, "it is forgotten"
    assert one.kept() == set()


async def test_one_that_is_not_what_its_digest_says_does_not_count(one: Round, ahead: Ahead) -> None:
    ahead.begin(one.wish, one.unchecked())
    one.comes()
    one.late.lost("another digest")
    assert await ahead.take(one.wish) is None
    assert one.kept() == set()


async def test_one_that_stops_coming_may_begin_anew_when_it_comes_again(one: Round, ahead: Ahead) -> None:
    assert ahead.may_begin(one.wish)
    ahead.begin(one.wish, one.unchecked())
    assert not ahead.may_begin(one.wish)
    one.late.lost("the agent has gone")
    await until(lambda: ahead.may_begin(one.wish))
    one.late = one.coming()
    ahead.begin(one.wish, one.unchecked())
    one.comes()
    one.late.arrived()
    assert await ahead.take(one.wish) == one.plainly()


async def test_one_that_cannot_be_used_does_not_begin_anew(one: Round, ahead: Ahead) -> None:
    lying = {key: Unchecked(one.late, {m.name: 2 for m in MATRICES}) for key in one.unchecked()}
    ahead.begin(one.wish, lying)
    one.comes()
    one.late.arrived()
    await until(lambda: not threads())
    assert not ahead.may_begin(one.wish), "rank 4 where 2 were planned, now and always"
    assert await ahead.take(one.wish) is None, "who asks hears it from the fold itself"


async def test_a_header_that_lies_takes_no_memory(tmp_path: Path, one: Round, ahead: Ahead) -> None:
    wide = {"m0": Factors(np.ones((1, 5000), np.float32), np.ones((2**21, 1), np.float32))}
    one.files["c"] = tmp_path / "wide"
    size = write_update(one.files["c"], wide, job="j", round=1, attempt=0, dtype="nf4")
    contributions = [*one.wish.contributions[:2], msgspec.structs.replace(one.wish.contributions[2], size=size)]
    wish = msgspec.structs.replace(one.wish, contributions=contributions)
    one.late = one.coming()
    tracemalloc.start()
    try:
        ahead.begin(wish, one.unchecked())
        one.comes()
        await until(lambda: not threads())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 2**20
    assert await ahead.take(wish) is None


async def test_one_sum_is_at_work_at_a_time(one: Round, ahead: Ahead) -> None:
    other = msgspec.structs.replace(one.wish, job="other")
    ahead.begin(one.wish, one.unchecked())
    assert not ahead.may_begin(other)
    one.comes()
    one.late.arrived()
    await until(lambda: ahead.may_begin(other))
    assert await ahead.take(other) is None
    assert await ahead.take(one.wish), "what waits is kept for who asks"


async def test_another_sum_of_the_same_job_takes_its_place(one: Round, ahead: Ahead) -> None:
    ahead.begin(one.wish, one.unchecked())
    heavier = [msgspec.structs.replace(c, weight=1.0) for c in one.wish.contributions]
    wish = msgspec.structs.replace(one.wish, contributions=heavier)
    assert ahead.may_begin(wish)
    first, one.late = one.late, one.coming()
    ahead.begin(wish, one.unchecked())
    assert first.fault
    one.comes()
    one.late.arrived()
    assert await ahead.take(one.wish) is None
    assert one.kept() == set()


async def test_an_end_lets_no_thread_wait(one: Round) -> None:
    async with Ahead(lambda wish, early: folding.fold(wish, one.blobs, 1024, (), early)) as ahead:
        ahead.begin(one.wish, one.unchecked())
        one.comes(0.5)
    await until(lambda: not threads())


@pytest.mark.parametrize(("method", "pays"), [("qlora", True), ("fedavg", False)])
def test_it_begins_early_where_a_sum_takes_long(tmp_path: Path, method: str, pays: bool) -> None:
    assert folding.pays_early(Round(tmp_path, method).wish, ()) is pays


def test_a_method_that_is_not_allowed_any_more_does_not_begin(tmp_path: Path) -> None:
    assert not folding.pays_early(Round(tmp_path, "of-another-package").wish, ())
