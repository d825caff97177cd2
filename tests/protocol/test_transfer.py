"""The receiving pool as stories: what happened, what it wished."""

from collections import deque
from math import inf

import pytest

from protocol.bitmap import Bitmap
from protocol.errors import BadMessage
from protocol.messages import Blob, Grant
from protocol.pacing import Pace
from protocol.transfer import Action, Completed, GaveUp, Receiving, SendGrant, StopListening

KIB = 1024


def blob(n_chunks: int, name: str = "a", *, chunk: int = KIB, last: int = 1) -> Blob:
    return Blob(sha256=name * 64, size=(n_chunks - 1) * chunk + last, chunk=chunk)


A, B = "a" * 32, "b" * 32


def grants(actions: list[Action]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Credit by (peer, transfer); fails when there is anything but credit."""
    assert all(isinstance(action, SendGrant) for action in actions), actions
    found = {(a.peer, a.grant.xfer): list(a.grant.ranges) for a in actions if isinstance(a, SendGrant)}
    assert len(found) == len(actions), "two grants for one transfer at once"
    return found


def feed(pool: Receiving, peer: str, what: Blob, *indices: int, now: float = 0.0) -> list[Action]:
    actions: list[Action] = []
    for index in indices:
        n_bytes = min(what.chunk, what.size - index * what.chunk)
        actions += pool.chunk(peer, what.xfer, index, n_bytes, now)
        pool.check()
    return actions


def test_a_window_then_half_windows_then_complete() -> None:
    pool = Receiving(window=4)
    what = blob(7)
    assert grants(pool.open("x", what, 0)) == {("x", A): [(0, 4)]}
    assert feed(pool, "x", what, 0) == []
    assert grants(feed(pool, "x", what, 1)) == {("x", A): [(4, 2)]}
    assert feed(pool, "x", what, 2) == []
    assert grants(feed(pool, "x", what, 3)) == {("x", A): [(6, 1)]}
    assert pool.remaining("x", A) == 3
    assert feed(pool, "x", what, 6, 5, 4) == [Completed("x", A)]
    assert (len(pool), pool.out_bytes, pool.wake_at, pool.remaining("x", A)) == (0, 0, None, None)
    assert pool.tick(1e9) == []
    assert pool.counts.n_bytes == what.size


def test_only_what_is_missing_on_disk_is_asked_for() -> None:
    have = Bitmap(8)
    for index in (0, 2, 3, 6):
        have.add(index)
    pool = Receiving(window=16)
    assert grants(pool.open("x", blob(8), 0, have=have)) == {("x", A): [(1, 1), (4, 2), (7, 1)]}
    assert pool.open("y", blob(8), 0, have=Bitmap(8, full=True)) == [Completed("y", A)]
    pool.check()


def test_a_prefix_needs_only_its_chunks_whole() -> None:
    pool = Receiving(window=16)
    what = blob(8)
    assert grants(pool.open("x", what, 0, size=2 * KIB + 1)) == {("x", A): [(0, 3)]}
    assert feed(pool, "x", what, 7) == [], "a broadcast goes on beyond the prefix"
    assert pool.counts.n_unneeded == 1
    assert feed(pool, "x", what, 0, 1, 2) == [Completed("x", A)]


def test_a_peer_waits_for_budget_and_is_woken_when_some_comes_free() -> None:
    pool = Receiving(window=4, budget_bytes=4 * KIB)
    one, two = blob(8), blob(8, "b")
    assert grants(pool.open("x", one, 0)) == {("x", A): [(0, 4)]}
    assert pool.open("y", two, 0) == []
    assert pool.open("z", two, 0) == []
    pool.check()
    assert feed(pool, "x", one, 0) == [], "one chunk is not worth a grant"
    assert grants(feed(pool, "x", one, 1)) == {("y", B): [(0, 2)]}
    assert grants(feed(pool, "x", one, 2, 3)) == {("z", B): [(0, 2)]}
    assert grants(feed(pool, "y", two, 0, 1)) == {("x", A): [(4, 2)]}


def test_a_peer_that_leaves_frees_its_credit_for_the_next() -> None:
    pool = Receiving(window=4, budget_bytes=4 * KIB)
    pool.open("x", blob(8), 0)
    pool.open("y", blob(8), 0)
    assert grants(pool.drop_peer("x", 1)) == {("y", A): [(0, 4)]}
    assert pool.open("z", blob(3, "b"), 1) == []
    assert grants(pool.close("y", A, 2)) == {("z", B): [(0, 3)]}
    assert pool.close("y", A, 2) == pool.drop_peer("nobody", 2) == []
    pool.check()


def test_silence_halves_the_window_doubles_the_patience_and_ends_with_a_reason() -> None:
    pool = Receiving(window=4, timeout_s=5, max_timeout_s=15, max_tries=4)
    pool.open("x", blob(8), 0)
    assert pool.wake_at == 5
    assert pool.tick(4.9) == []
    assert grants(pool.tick(5)) == {("x", A): [(0, 2)]}
    assert pool.wake_at == 15
    assert grants(pool.tick(15)) == {("x", A): [(0, 1)]}
    assert pool.wake_at == 30, "capped"
    assert grants(pool.tick(30)) == {("x", A): [(0, 1)]}
    pool.check()
    actions = pool.tick(45)
    assert [type(action) for action in actions] == [GaveUp]
    assert isinstance(actions[0], GaveUp)
    assert "8 chunks are missing" in actions[0].reason
    assert (len(pool), pool.out_bytes, pool.wake_at) == (0, 0, None)


def test_progress_ends_the_backing_off_and_reopens_the_window() -> None:
    pool = Receiving(window=4, timeout_s=5)
    what = blob(20)
    pool.open("x", what, 0)
    pool.tick(5)
    pool.tick(15)
    assert grants(feed(pool, "x", what, 0, now=15.5)) == {("x", A): [(1, 2)]}
    out = []
    for index in range(1, 18):
        feed(pool, "x", what, index, now=15.5)
        out.append(pool.out_bytes // KIB)
    assert (out[0], max(out)) == (2, 4)
    assert pool.tick(20.4) == []
    assert grants(pool.tick(20.5)) == {("x", A): [(18, 2)]}, "the first patience again"
    assert pool.counts.n_voided == 4 + 2 + 2


def test_a_lost_chunk_alone_is_asked_for_again() -> None:
    pool = Receiving(window=4, timeout_s=5)
    what = blob(4)
    pool.open("x", what, 0)
    feed(pool, "x", what, 0, now=0.1)
    feed(pool, "x", what, 2, 3, now=3)
    assert pool.tick(5) == [], "the timer began anew at 3"
    assert grants(pool.tick(8)) == {("x", A): [(1, 1)]}
    assert feed(pool, "x", what, 1, now=8) == [Completed("x", A)]


def test_a_late_chunk_is_used_and_never_asked_for_again() -> None:
    pool = Receiving(window=2, budget_bytes=2 * KIB, timeout_s=5)
    slow, other = blob(2), blob(3, "b", last=KIB)
    pool.open("slow", slow, 0)
    pool.open("other", other, 0)
    assert grants(pool.tick(5)) == {("other", B): [(0, 2)]}, "the slow one's credit serves the next in the queue"
    assert feed(pool, "slow", slow, 0, now=6) == []
    assert pool.counts.n_unasked == 1
    assert grants(feed(pool, "other", other, 0, now=7)) == {("slow", A): [(1, 1)]}, "and not chunk 0"


def test_a_late_chunk_counts_for_the_credit_given_again() -> None:
    pool = Receiving(window=4, timeout_s=5)
    what = blob(2)
    pool.open("x", what, 0)
    assert grants(pool.tick(5)) == {("x", A): [(0, 2)]}
    assert feed(pool, "x", what, 0, now=6) == [], "asked for again meanwhile, the first copy is as good"
    assert feed(pool, "x", what, 0, now=7) == [], "the second is a duplicate"
    assert pool.counts.n_unneeded == 1


def test_a_slow_link_earns_patience() -> None:
    pool = Receiving(window=2, timeout_s=5, max_timeout_s=60)
    what = blob(9)
    pool.open("x", what, 0)
    for index, now in enumerate([4, 8, 12]):
        feed(pool, "x", what, index, now=now)
    assert pool.tick(12 + 15) == []
    assert grants(pool.tick(12 + 16)) != {}


def test_waiting_for_budget_is_not_the_peers_fault() -> None:
    pool = Receiving(window=1, budget_bytes=KIB, timeout_s=5, max_tries=1)
    what = blob(2)
    queue = [action for i in range(10) for action in pool.open(f"agent-{i}", what, 0)]
    now, n_done = 0.0, 0
    while queue:
        assert len(queue) == 1, "one chunk at a time"
        action = queue.pop()
        now += 4
        assert pool.tick(now) == []
        assert isinstance(action, SendGrant)
        queue = feed(pool, action.peer, what, action.grant.ranges[0][0], now=now)
        n_done += isinstance(queue[0], Completed)
        queue = [action for action in queue if isinstance(action, SendGrant)]
    assert (n_done, now, pool.counts.n_voided) == (10, 80, 0)


def test_there_is_room_while_nobody_waits_and_credit_is_left() -> None:
    pool = Receiving(window=4, budget_bytes=8 * KIB)
    what = blob(8)
    assert pool.has_room(4 * KIB)
    pool.open("x", what, 3.0)
    assert pool.has_room(100 * KIB), "half of all there is"
    pool.open("y", what, 3.0)
    assert not pool.has_room(1)
    pool.open("z", what, 3.0)
    pool.close("x", A, 3.0)
    assert not pool.has_room(1), "it went to who waited"
    pool.close("y", A, 3.0)
    assert pool.has_room(4 * KIB)


def test_a_new_bus_voids_all_credit_and_gives_it_again() -> None:
    pool = Receiving(window=4, max_tries=2, timeout_s=5)
    one, two = blob(6), blob(6, "b")
    pool.open("x", one, 0)
    pool.open("y", two, 0)
    feed(pool, "x", one, 1, now=1)
    pool.tick(6)
    assert grants(pool.reset(7)) == {("x", A): [(0, 1), (2, 3)], ("y", B): [(0, 4)]}
    pool.check()
    assert grants(pool.reset(8, "y")) == {("y", B): [(0, 4)]}, "a peer that was reborn"
    assert pool.reset(8, "nobody") == []
    assert grants(pool.tick(12.9)) == {("x", A): [(0, 1), (2, 1)]}, "tries start anew"


def test_what_nobody_needs_is_counted_and_changes_nothing() -> None:
    pool = Receiving(window=4)
    what = blob(4)
    pool.open("x", what, 0)
    assert pool.chunk("y", A, 0, KIB, 0) == []
    assert pool.chunk("x", B, 0, KIB, 0) == []
    assert pool.chunk("x", A, 4, KIB, 0) == []
    assert pool.chunk("x", A, 3, KIB, 0) == [], "the last one is shorter"
    assert pool.chunk("x", A, 0, KIB - 1, 0) == []
    assert pool.chunk("x", A, 2**32 - 1, KIB, 0) == []
    assert pool.chunk("x", A, 0, 0, 0) == []
    feed(pool, "x", what, 0, 0)
    counts = pool.counts
    assert (counts.n_stray, counts.n_bad, counts.n_unneeded, counts.n_chunks) == (2, 5, 1, 1)
    assert pool.remaining("x", A) == 3


def test_the_same_content_from_two_peers_is_two_transfers() -> None:
    pool = Receiving(window=2)
    what = blob(2)
    assert grants(pool.open("x", what, 0)) == {("x", A): [(0, 2)]}
    assert grants(pool.open("y", what, 0)) == {("y", A): [(0, 2)]}
    assert feed(pool, "x", what, 0, 1) == [Completed("x", A)]
    assert pool.remaining("y", A) == 2


def test_two_blobs_of_one_peer_share_its_window_in_turn() -> None:
    pool = Receiving(window=4)
    one, two = blob(8), blob(8, "b")
    assert grants(pool.open("x", one, 0)) == {("x", A): [(0, 4)]}
    assert pool.open("x", two, 0) == []
    assert grants(feed(pool, "x", one, 0, 1)) == {("x", A): [(4, 2)]}
    assert grants(feed(pool, "x", one, 2, 3)) == {("x", B): [(0, 2)]}
    assert grants(feed(pool, "x", one, 4, 5)) == {("x", A): [(6, 2)]}
    assert grants(feed(pool, "x", two, 0, 1)) == {("x", B): [(2, 2)]}


def test_opening_again_changes_nothing_unless_the_geometry_differs() -> None:
    pool = Receiving(window=4)
    pool.open("x", blob(8), 0)
    assert pool.open("x", blob(8), 1) == []
    finer = Blob(sha256="a" * 64, size=blob(8).size, chunk=2 * KIB)
    assert grants(pool.open("x", finer, 2)) == {("x", A): [(0, 4)]}
    assert grants(pool.open("x", finer, 3, size=KIB)) == {("x", A): [(0, 1)]}
    pool.check()
    assert len(pool) == 1


def hear(pool: Receiving, what: Blob, *indices: int, now: float = 0.0) -> list[Action]:
    actions: list[Action] = []
    for index in indices:
        n_bytes = min(what.chunk, what.size - index * what.chunk)
        actions += pool.chunk("c", what.xfer, index, n_bytes, now, heard=True)
        pool.check()
    return actions


def test_a_listener_says_how_far_it_listens_and_its_credit_goes_on_behind_what_it_hears() -> None:
    pool, what = Receiving(window=4), blob(9)
    (begun,) = pool.open("c", what, 0, size=7 * KIB, listening=True)
    assert begun == SendGrant("c", Grant(xfer=A, ranges=[(0, 4)], until=7))
    assert grants(hear(pool, what, 0, 3)) == {("c", A): [(4, 3)]}, "1 and 2 are passed over and leave room for three"
    assert grants(hear(pool, what, 4)) == {("c", A): [(1, 2)]}, "the gaps come last"
    assert hear(pool, what, 5, 1, 6) == [], "a gap may be filled for all, before or after"
    assert hear(pool, what, 2) == [Completed("c", A)]
    assert pool.counts.n_voided == 2


def test_who_joins_late_goes_on_from_where_the_broadcast_is() -> None:
    pool, what = Receiving(window=4), blob(40)
    pool.open("c", what, 0, listening=True)
    assert grants(hear(pool, what, 20)) == {("c", A): [(21, 4)]}


def test_who_is_sent_more_than_its_budget_without_asking_listens_no_longer() -> None:
    pool, what = Receiving(window=2, budget_bytes=8 * KIB), blob(80)
    pool.open("c", what, 0, listening=True)
    assert StopListening("c", A) not in hear(pool, what, *range(7, 64, 8))
    stopped, granted = hear(pool, what, 72)
    assert stopped == StopListening("c", A)
    assert isinstance(granted, SendGrant)
    assert granted.grant.until == 0
    pool = Receiving(window=2, budget_bytes=8 * KIB)
    pool.open("c", what, 0, listening=True)
    heard = [action for index in range(7, 70, 4) for action in hear(pool, what, index, index + 1)]
    assert StopListening("c", A) not in heard, "it catches up each time"


@pytest.mark.parametrize("heard", [(), (0,)], ids=["deaf", "ended"])
def test_who_hears_nothing_twice_in_a_row_pulls(heard: tuple[int, ...]) -> None:
    pool, what = Receiving(window=4, timeout_s=5), blob(6)
    pool.open("c", what, 0, listening=True)
    hear(pool, what, *heard)
    actions: list[Action] = []
    for _ in range(2):
        assert StopListening("c", A) not in actions
        assert pool.wake_at is not None
        actions = pool.tick(pool.wake_at)
    stopped, granted = actions
    assert stopped == StopListening("c", A)
    assert isinstance(granted, SendGrant)
    assert (granted.grant.until, granted.grant.ranges[0][0]) == (0, len(heard))


@pytest.mark.parametrize(
    ("what", "size"),
    [
        (blob(4), 0),
        (blob(4), 5 * KIB),
        (blob(2, chunk=64 * KIB), None),
        (Blob(sha256="a" * 64, size=2**40, chunk=1024), None),
    ],
    ids=["empty prefix", "prefix above the size", "chunk above the budget", "too many chunks"],
)
def test_what_cannot_be_pulled_is_refused(what: Blob, size: int | None) -> None:
    pool = Receiving(budget_bytes=32 * KIB)
    with pytest.raises(BadMessage):
        pool.open("x", what, 0, size=size)
    assert len(pool) == 0
    pool.check()


def test_small_blobs_do_not_pay_for_whole_chunks() -> None:
    pool = Receiving(budget_bytes=32 * KIB)
    tiny = [Blob(sha256=f"{i:064x}", size=100) for i in range(200)]
    assert sum(len(pool.open(f"agent-{i}", what, 0)) for i, what in enumerate(tiny)) == 200


def test_peers_advance_together_when_the_budget_is_short() -> None:
    pool = Receiving(window=8, budget_bytes=16 * KIB)
    what = blob(100)
    peers = [f"agent-{i}" for i in range(10)]
    queue = [action for peer in peers for action in pool.open(peer, what, 0)]
    while not any(isinstance(action, Completed) for action in queue):
        action = queue.pop(0)
        assert isinstance(action, SendGrant)
        for first, n in action.grant.ranges:
            queue += feed(pool, action.peer, what, *range(first, first + n))
    left = [pool.remaining(peer, what.xfer) or 0 for peer in peers]
    assert max(left) <= 16, f"the first is done and another has {max(left)} of 100 to go"


# ---------------------------------------------------------------------------------------------------- long links and caps


def drive(
    pool: Receiving, what: Blob, *, bytes_per_s: float, rtt_s: float, until_s: float = inf
) -> tuple[float, float]:
    """Pull over a link of this bandwidth and round trip; when the last chunk came, and the most that waited before the link."""
    now, free_at, queue_s = 0.0, 0.0, 0.0
    arrivals: deque[tuple[float, int]] = deque()
    actions = pool.open("x", what, now)
    while True:
        for action in actions:
            if isinstance(action, Completed):
                return now, queue_s
            assert isinstance(action, SendGrant)
            for first, n in action.grant.ranges:
                for index in range(first, first + n):
                    free_at = max(free_at, now + rtt_s / 2) + what.chunk / bytes_per_s
                    queue_s = max(queue_s, free_at - now - rtt_s / 2)
                    arrivals.append((free_at + rtt_s / 2, index))
        if not arrivals or (pool.wake_at is not None and pool.wake_at < arrivals[0][0]):
            assert pool.wake_at is not None
            now = pool.wake_at
            actions = pool.tick(now)
        else:
            now, index = arrivals.popleft()
            actions = feed(pool, "x", what, index, now=now)
        if now > until_s:
            return now, queue_s


@pytest.mark.parametrize("mbit_per_s", [20, 200, 1000])
def test_a_window_follows_a_long_link_and_no_further(mbit_per_s: int) -> None:
    bytes_per_s = mbit_per_s * 1e6 / 8
    what = blob(1200, chunk=256 * KIB, last=256 * KIB)
    pool = Receiving(window=8, max_window=256)
    took_s, queue_s = drive(pool, what, bytes_per_s=bytes_per_s, rtt_s=0.1)
    assert what.size / took_s > 0.85 * bytes_per_s
    start_s = 8 * 256 * KIB / bytes_per_s
    assert queue_s < max(start_s, 0.4), "what waits before a slow link is not the point of a long window"
    assert pool.counts.n_voided == 0
    fixed_s, _ = drive(Receiving(window=8), what, bytes_per_s=bytes_per_s, rtt_s=0.1)
    assert mbit_per_s < 200 or fixed_s > 1.2 * took_s


def test_a_narrow_link_holds_little_credit_and_loses_nothing_by_it() -> None:
    what, bytes_per_s = blob(60, chunk=256 * KIB, last=256 * KIB), 250_000.0
    pool = Receiving(window=8, max_window=256)
    _, late_s = drive(pool, what, bytes_per_s=bytes_per_s, rtt_s=0.05, until_s=30.0)
    assert late_s == pytest.approx(8 * 256 * KIB / bytes_per_s), "at first, when nobody knows the link"
    assert pool.out_bytes <= 3 * 256 * KIB
    took_s, _ = drive(Receiving(window=8, max_window=256), what, bytes_per_s=bytes_per_s, rtt_s=0.05)
    assert what.size / took_s > 0.98 * bytes_per_s


def test_no_window_outgrows_its_share_of_the_budget() -> None:
    pool = Receiving(window=2, max_window=64, budget_bytes=32 * KIB)
    for peer in ("y", "z"):
        pool.open(peer, blob(100, "b"), 0)
    drive(pool, blob(400), bytes_per_s=1e6, rtt_s=0.1, until_s=0.3)
    assert pool.out_bytes <= (32 // 3 + 2 * 2) * KIB


def test_credit_is_given_no_faster_than_the_cap() -> None:
    pool = Receiving(window=8, pace=Pace(10 * KIB))
    took_s, _ = drive(pool, blob(101, last=KIB), bytes_per_s=1e9, rtt_s=0.01)
    assert 8 < took_s < 10.5, "a hundred KiB at ten per second, less the burst and the last window"


def test_while_closed_no_credit_is_given() -> None:
    pool = Receiving(window=4, pace=Pace(is_open=False))
    assert pool.open("x", blob(6), 0) == []
    assert pool.wake_at is not None
    assert pool.tick(pool.wake_at) == []
    pool.check()
    pool.pace.is_open = True
    assert grants(pool.tick(pool.wake_at)) == {("x", A): [(0, 4)]}
