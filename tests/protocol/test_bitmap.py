"""The bitmap against Python's set."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.bitmap import Bitmap
from protocol.errors import BadMessage

SUBSETS = st.integers(0, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)) if n else st.just(set()))
)


def of(n: int, members: set[int]) -> Bitmap:
    bitmap = Bitmap(n)
    for index in members:
        bitmap.add(index)
    return bitmap


def spread(runs: list[tuple[int, int]]) -> list[int]:
    return [index for first, n in runs for index in range(first, first + n)]


@given(SUBSETS, st.integers(0, 60))
def test_it_is_a_set_with_runs(subset: tuple[int, set[int]], start: int) -> None:
    n, members = subset
    bitmap = of(n, members)
    assert bitmap.count == len(members)
    assert bitmap.complete == (len(members) == n)
    assert [index for index in range(-2, n + 2) if index in bitmap] == sorted(members)
    assert spread(list(bitmap.runs(start))) == sorted(i for i in members if i >= start)
    assert spread(list(bitmap.missing(start))) == [i for i in range(start, n) if i not in members]
    inverse = bitmap.inverted()
    assert spread(list(inverse.runs())) == spread(list(bitmap.missing()))
    assert inverse.count == n - len(members)


@given(SUBSETS)
def test_runs_are_maximal(subset: tuple[int, set[int]]) -> None:
    runs = list(of(*subset).runs())
    assert all(n > 0 for _, n in runs)
    assert all(first + n < later for (first, n), (later, _) in itertools.pairwise(runs))


@given(SUBSETS, st.integers(0, 70), st.integers(0, 60))
def test_take_removes_the_first_ones(subset: tuple[int, set[int]], limit: int, start: int) -> None:
    n, members = subset
    bitmap = of(n, members)
    taken = spread(bitmap.take(limit, start))
    assert taken == sorted(i for i in members if i >= start)[:limit]
    assert bitmap == of(n, members - set(taken))
    assert bitmap.count == len(members) - len(taken)


@given(SUBSETS)
def test_packed_and_unpacked_it_is_the_same(subset: tuple[int, set[int]]) -> None:
    n, members = subset
    packed = of(n, members).to_bytes()
    assert len(packed) == (n + 7) // 8
    again = Bitmap.from_bytes(n, packed)
    assert again == of(n, members)
    assert again.count == len(members)


def test_add_and_discard_say_whether_anything_changed() -> None:
    bitmap = Bitmap(3)
    assert [bitmap.add(1), bitmap.add(1), bitmap.discard(1), bitmap.discard(1), bitmap.discard(9)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert bitmap.count == 0
    assert Bitmap(3, full=True).complete


@pytest.mark.parametrize(
    ("n", "packed"), [(8, b""), (8, b"\x00\x00"), (9, b"\x00"), (0, b"\x00"), (3, b"\x10"), (9, b"\x00\x40")]
)
def test_packed_bytes_of_another_size_are_refused(n: int, packed: bytes) -> None:
    with pytest.raises(BadMessage):
        Bitmap.from_bytes(n, packed)
