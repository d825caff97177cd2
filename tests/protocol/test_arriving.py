"""Reading what is still coming: it waits for bytes, never for ever, and never gives out others than the file's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest

from protocol import manifest
from protocol.adapters import Factors
from protocol.arriving import Arriving, reading, settled, size_of
from protocol.errors import BadUpdate, Unavailable
from protocol.messages import UpdateDtype
from protocol.updates import LoraUpdate, write_update

PATIENCE_S = 30.0
Work = Callable[[], object]


class Late:
    """A file whose bytes are let through bit by bit, and a thread that reads it."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data
        self.path.write_bytes(b"")
        self.file = Arriving(len(data))

    def upto(self, n_bytes: int) -> None:
        with self.path.open("r+b") as file:
            file.write(self.data[:n_bytes])
        self.file.reached(n_bytes, self.path)


@pytest.fixture
def late(tmp_path: Path) -> Late:
    return Late(tmp_path / "part", Random(1).randbytes(1000))


@pytest.fixture
def meanwhile() -> Callable[[Work], Future[object]]:
    """Have something done in a thread that is known to have begun."""
    threads = ThreadPoolExecutor()

    def begin(work: Work) -> Future[object]:
        begun = threading.Event()
        found = threads.submit(lambda: (begun.set(), work())[1])
        assert begun.wait(PATIENCE_S)
        return found

    return begin


def test_who_reads_waits_for_the_last_byte_it_asked_for(
    late: Late, meanwhile: Callable[[Work], Future[object]]
) -> None:
    found = meanwhile(lambda: late.file.read(300, 500))
    for n_bytes in (0, 1, 500, 799):
        late.upto(n_bytes)
        assert not found.done()
    late.upto(800)
    assert found.result(PATIENCE_S) == late.data[500:800]
    assert late.file.read(800, 0) == late.data[:800], "what is here is not waited for"


def test_a_read_beyond_the_end_brings_what_there_is(late: Late) -> None:
    late.upto(1000)
    assert late.file.read(600, 500) == late.data[500:]
    assert late.file.read(10, 1000) == late.file.read(10, 2000) == b""
    assert late.file.read(0, 0) == b""


def test_it_is_read_on_where_the_file_has_moved_to(late: Late) -> None:
    late.upto(1000)
    late.path.rename(late.path.with_name("whole"))
    late.file.arrived()
    assert late.file.read(1000, 0) == late.data
    late.file.settled()


def test_all_who_wait_are_told_that_it_does_not_come(late: Late, meanwhile: Callable[[Work], Future[object]]) -> None:
    waiting = [meanwhile(lambda: late.file.read(1, 999)) for _ in range(3)] + [meanwhile(late.file.settled)]
    late.upto(999)
    late.file.lost("the agent has gone")
    for one in waiting:
        with pytest.raises(Unavailable, match="the agent has gone"):
            one.result(PATIENCE_S)
    late.upto(1000)
    with pytest.raises(Unavailable, match="the agent has gone"):
        late.file.read(1, 0)


def test_it_settles_when_it_is_verified_not_when_it_is_read(
    late: Late, meanwhile: Callable[[Work], Future[object]]
) -> None:
    late.upto(1000)
    found = meanwhile(late.file.settled)
    assert late.file.read(1000, 0) == late.data
    assert not found.done()
    late.file.arrived()
    assert found.result(PATIENCE_S) is None


def test_a_file_that_cannot_be_opened_does_not_come(late: Late) -> None:
    late.file.reached(10, late.path.with_name("nowhere"))
    with pytest.raises(Unavailable, match="cannot be read"):
        late.file.read(1, 0)


def test_a_file_that_is_here_is_read_alike(late: Late) -> None:
    late.upto(1000)
    for source in (late.path, late.file):
        assert size_of(source) == 1000
        with reading(source) as read:
            assert read(5, 990) == late.data[990:995]
            assert read(50, 990) == late.data[990:]
    settled(late.path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "nf4"])
def test_an_update_that_came_bit_by_bit_holds_what_it_would_have(
    tmp_path: Path, meanwhile: Callable[[Work], Future[object]], dtype: UpdateDtype
) -> None:
    rng = np.random.default_rng(1)
    whole = {
        f"m{i}": Factors(rng.standard_normal((3, 40), np.float32), rng.standard_normal((50, 3), np.float32))
        for i in range(5)
    }
    path = tmp_path / "whole"
    size = write_update(path, whole, job="j", round=1, attempt=0, dtype=dtype)
    known = LoraUpdate.open(path, max_bytes=size)
    one = Late(tmp_path / "part", path.read_bytes())
    opening = meanwhile(lambda: LoraUpdate.open(one.file, max_bytes=size))
    one.upto(10)
    assert not opening.done()
    one.upto(size)
    update = opening.result(PATIENCE_S)
    assert isinstance(update, LoraUpdate)
    for name in whole:
        assert (update.factors(name).a == known.factors(name).a).all()
        assert (update.factors(name).b == known.factors(name).b).all()


def test_matrices_that_came_are_read_while_others_are_missing(
    tmp_path: Path, meanwhile: Callable[[Work], Future[object]]
) -> None:
    rng = np.random.default_rng(1)
    whole = {
        f"m{i}": Factors(rng.standard_normal((8, 4000), np.float32), rng.standard_normal((4000, 8), np.float32))
        for i in range(3)
    }
    path = tmp_path / "whole"
    size = write_update(path, whole, job="j", round=1, attempt=0, dtype="fp32")
    one = Late(tmp_path / "part", path.read_bytes())
    one.upto(size // 3 + 1000)
    update = LoraUpdate.open(one.file, max_bytes=size)
    assert (update.factors("m0").a == whole["m0"].a).all()
    second = meanwhile(lambda: update.factors("m1"))
    assert not second.done()
    one.upto(size - 1)
    found = second.result(PATIENCE_S)
    assert isinstance(found, Factors)
    assert (found.b == whole["m1"].b).all()
    third = meanwhile(lambda: update.factors("m2"))
    one.file.lost("cut off")
    with pytest.raises(Unavailable, match="cut off"):
        third.result(PATIENCE_S)


def test_a_header_of_many_reads_is_waited_for_piece_by_piece(
    tmp_path: Path, meanwhile: Callable[[Work], Future[object]]
) -> None:
    names = [f"{i:04}-{Random(i).randbytes(40).hex()}" for i in range(3000)]
    path = tmp_path / "whole"
    tiny = Factors(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))
    size = write_update(path, dict.fromkeys(names, tiny), job="j", round=1, attempt=0, dtype="bf16")
    one = Late(tmp_path / "part", path.read_bytes())
    opening = meanwhile(lambda: LoraUpdate.open(one.file, max_bytes=size))
    for n_bytes in range(0, 2 * manifest._READ_BYTES, 10_000):
        one.upto(n_bytes)
        assert not opening.done(), "the header is longer than that"
    one.upto(size)
    update = opening.result(PATIENCE_S)
    assert isinstance(update, LoraUpdate)
    assert list(update.ranks) == names


def test_a_file_of_another_size_than_its_header_says_is_refused_before_it_is_here(tmp_path: Path) -> None:
    path = tmp_path / "whole"
    big = Factors(np.ones((4, 40_000), np.float32), np.ones((40_000, 4), np.float32))
    size = write_update(path, {"m": big}, job="j", round=1, attempt=0, dtype="fp32")
    one = Late(tmp_path / "part", path.read_bytes() + b"x")
    one.upto(manifest._READ_BYTES)
    with pytest.raises(BadUpdate, match="truncated or damaged"):
        LoraUpdate.open(one.file, max_bytes=size + 1)
