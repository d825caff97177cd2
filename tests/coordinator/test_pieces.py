"""Snapshots in pieces: any bytes come back whole, what did not change is stored once, and one bit spoils no two neighbours."""

from __future__ import annotations

import random
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import pieces
from coordinator.core import events as ev
from coordinator.store import Store

ONE = b"\xa8surveyed" + random.Random(1).randbytes(150_000)
TWO = b"\xaacalibrated" + random.Random(2).randbytes(5_000)


@given(
    st.lists(
        st.one_of(st.sampled_from([*map(msgpack.packb, pieces._FIELDS), ONE, TWO]), st.binary(max_size=6000)),
        max_size=12,
    )
)
def test_the_pieces_in_order_are_the_whole(parts: list[bytes]) -> None:
    data = b"".join(parts)
    found = list(pieces.cut(data))
    assert b"".join(found) == data
    assert all(0 < len(piece) <= pieces.MAX_BYTES + pieces.LARGE_BYTES for piece in found)


def test_what_is_large_stands_alone_whatever_is_around_it() -> None:
    alone = set(pieces.cut(ONE))
    assert alone < set(pieces.cut(b"before" * 10_000 + ONE + TWO + b"\xa4specwhatever comes next"))
    assert TWO in set(pieces.cut(ONE + TWO + b"\xa4spec"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "journal.sqlite")


def states(n: int) -> list[bytes]:
    """One after the other: each has what was measured, and something of its own."""
    return [b"\xa4jobs" + bytes([number]) * 100 + ONE + TWO for number in range(n)]


def stored_bytes(store: Store) -> int:
    return int(store._db.execute("SELECT COALESCE(SUM(LENGTH(body)), 0) FROM pieces").fetchone()[0])


def saved(store: Store, n: int) -> list[bytes]:
    for state in (made := states(n)):
        store.save_snapshot(store.append([(1.0, ev.Tick())])[-1], state)
    return made


def test_twenty_snapshots_take_hardly_more_than_two(store: Store) -> None:
    made = saved(store, 20)
    assert [s.state for s in store.snapshots()] == made[::-1]
    assert stored_bytes(store) < 2.1 * len(made[0])
    assert len(store.frames()) == 20
    assert sum(frame.n_bytes for frame in store.frames()) == pytest.approx(stored_bytes(store), rel=0.05)


def test_what_a_snapshot_is_said_to_cost_is_what_goes_with_it(store: Store) -> None:
    saved(store, 5)
    while len(frames := store.frames()) > 1:
        before = stored_bytes(store)
        store.forget([], [], frames[1].seq)
        assert before - stored_bytes(store) <= frames[0].n_bytes < before - stored_bytes(store) + 1000
    assert [s.state for s in store.snapshots()] == states(5)[4:]


def test_a_bit_in_a_shared_piece_spoils_no_neighbours_and_nothing_that_is_saved_later(store: Store) -> None:
    made = saved(store, 4)
    turned = "UPDATE pieces SET body = CAST(x'00' || body AS BLOB) WHERE half = ? AND LENGTH(body) > 2000"
    ((half,),) = store._db.execute("SELECT half FROM snapshots ORDER BY seq DESC LIMIT 1").fetchall()
    assert store._db.execute(turned, (half,)).rowcount > 0
    assert [s.state for s in store.snapshots()] == [made[2], made[0]]
    for number in (7, 8):
        store.save_snapshot(store.append([(1.0, ev.Tick())])[-1], states(9)[number])
    assert [s.state for s in store.snapshots()] == [states(9)[8], states(9)[7], made[2], made[0]]
