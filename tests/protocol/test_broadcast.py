"""One blob to many at once: stories of the sender's side, and laws over a lossy, late and uneven fleet on virtual time."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bitmap import Bitmap
from protocol.broadcast import EVERYONE, Broadcasts
from protocol.frames import n_prefix_chunks
from protocol.messages import Blob, Grant
from protocol.sending import SendChunk, Sending
from protocol.transfer import Action, Completed, GaveUp, Receiving, SendGrant, StopListening

KIB = 1024
MODEL = Blob(sha256="a" * 64, size=20 * KIB, chunk=KIB)
STALL_S, GATHER_S = 1.0, 0.25


def grant(*ranges: tuple[int, int], until: int = 20) -> Grant:
    return Grant(xfer=MODEL.xfer, ranges=list(ranges), until=until)


def sent(broadcasts: Broadcasts, now: float) -> list[tuple[str, int]]:
    found = []
    while (chunk := broadcasts.next_chunk(now)) is not None:
        found.append((chunk.peer, chunk.index))
        broadcasts.check()
    return found


def to_all(*indices: int) -> list[tuple[str, int]]:
    return [(EVERYONE, index) for index in indices]


def fleet(*peers: str) -> Broadcasts:
    broadcasts = Broadcasts(stall_s=STALL_S, gather_s=GATHER_S)
    for peer in peers:
        broadcasts.expect(peer, MODEL, 0)
    return broadcasts


# --------------------------------------------------------------------------------------------------------------- stories


def test_the_first_chunk_waits_while_more_keep_coming_but_not_for_long() -> None:
    some = fleet("x", "y", "z", "absent")
    for at, peer in ((0.0, "x"), (0.9, "y"), (1.8, "z")):
        some.granted(peer, MODEL, grant((0, 1)), at)
        assert sent(some, at) == []
    assert sent(some, 2.7) == []
    assert sent(some, 2.9) == to_all(0), "nobody came for a second"
    names = [f"a-{number}" for number in range(40)]
    many, first_at = fleet(*names, "absent"), None
    for number, peer in enumerate(names):
        many.granted(peer, MODEL, grant((0, 1)), 0.5 * number)
        if first_at is None and sent(many, 0.5 * number):
            first_at = 0.5 * number
    assert first_at is not None
    assert 11 <= first_at <= 11.5, "those who came first would begin to doubt"


def test_nothing_is_sent_before_all_have_asked_and_then_once() -> None:
    some = fleet("x", "y", "z")
    some.granted("x", MODEL, grant((0, 4)), 0)
    some.granted("y", MODEL, grant((0, 6)), 0.1)
    assert sent(some, 0.5) == []
    some.granted("z", MODEL, grant((0, 2)), 0.5)
    assert sent(some, 0.5) == to_all(0, 1)
    some.granted("z", MODEL, grant((2, 4)), 0.6)
    assert sent(some, 0.6) == to_all(2, 3)
    assert some.wake_at is not None
    assert 0.6 + STALL_S / 2 < some.wake_at <= 0.6 + STALL_S


def test_who_lets_the_others_wait_is_left_behind_and_not_waited_for_again() -> None:
    some = fleet("x", "y", "z")
    for peer in "xy":
        some.granted(peer, MODEL, grant((0, 2)), 0)
    assert some.wake_at == STALL_S
    assert sent(some, 0.99) == []
    assert sent(some, STALL_S) == to_all(0, 1)
    some.granted("z", MODEL, grant((5, 1)), 2)
    for peer in "xy":
        some.granted(peer, MODEL, grant((2, 4)), 2)
    assert sent(some, 2) == to_all(2, 3, 4, 5)


def test_a_gap_waits_for_others_and_goes_to_whoever_asked() -> None:
    some = fleet("x", "y", "z")
    for peer in "xyz":
        some.granted(peer, MODEL, grant((0, 10)), 0)
    assert len(sent(some, 0)) == 10
    some.granted("x", MODEL, grant((3, 1), (7, 1)), 1)
    some.granted("y", MODEL, grant((7, 1)), 1.1)
    assert sent(some, 1.2) == []
    assert sent(some, 1.25) == [("x", 3), (EVERYONE, 7)]
    assert sent(some, 9) == []


def test_what_is_on_its_way_to_one_that_was_left_behind_is_sent_again_only_if_it_asks_again() -> None:
    some = fleet("x", "y", "z")
    for peer in "xyz":
        some.granted(peer, MODEL, grant((0, 4)), 0)
    assert sent(some, 0) == to_all(0, 1, 2, 3)
    for peer in "xy":
        some.granted(peer, MODEL, grant((4, 6)), 0)
    assert sent(some, STALL_S) == to_all(4, 5, 6, 7, 8, 9)
    some.granted("z", MODEL, grant((4, 4)), 2)
    some.granted("late", MODEL, grant((0, 1), (9, 1)), 2)
    assert sent(some, 9) == [("late", 0), ("late", 9)]
    some.granted("z", MODEL, grant((6, 1), (8, 2)), 9)
    assert sent(some, 10) == [("z", 6)]


def test_nobody_is_waited_for_beyond_the_end_of_what_it_wants() -> None:
    some = fleet("x", "small")
    some.granted("x", MODEL, grant((0, 20)), 0)
    some.granted("small", MODEL, grant((0, 5), until=5), 0)
    assert sent(some, 0) == [*to_all(0, 1, 2, 3, 4), *(("x", index) for index in range(5, 20))]


def test_one_alone_is_sent_its_chunks_at_once() -> None:
    some = fleet()
    some.granted("x", MODEL, grant((0, 3)), 0)
    assert sent(some, 0) == [("x", 0), ("x", 1), ("x", 2)]


def test_who_leaves_is_not_waited_for_and_gets_nothing() -> None:
    some = fleet("x", "y", "z")
    for peer in "xy":
        some.granted(peer, MODEL, grant((0, 2)), 0)
    some.leave("z")
    some.leave("y", MODEL.xfer)
    assert sent(some, 0) == [("x", 0), ("x", 1)]


def test_a_new_bus_begins_where_the_members_then_ask() -> None:
    some = fleet("x", "y")
    for peer in "xy":
        some.granted(peer, MODEL, grant((0, 8)), 0)
    assert len(sent(some, 0)) == 8
    some.granted("x", MODEL, grant((8, 4)), 0)
    some.reset()
    assert some.wake_at is None
    some.granted("x", MODEL, grant((6, 4)), 1)
    assert sent(some, 1) == []
    some.granted("y", MODEL, grant((5, 5)), 1.5)
    assert sent(some, 1.5) == [("y", 5), *to_all(6, 7, 8, 9)]


def test_who_was_left_behind_takes_part_again_on_a_new_bus() -> None:
    some = fleet("x", "y")
    some.granted("x", MODEL, grant((0, 2)), 0)
    assert sent(some, 5.0)[:1] == [("x", 0)], "y is left behind"
    some.reset()
    some.expect("y", MODEL, 6)
    some.check()
    some.granted("x", MODEL, grant((0, 2)), 6)
    assert sent(some, 6.1) == [], "y is waited for"
    some.granted("y", MODEL, grant((0, 2)), 6.2)
    assert sent(some, 6.2) == to_all(0, 1)


def test_the_next_round_with_the_same_model_begins_anew() -> None:
    some = fleet("x", "y")
    for peer in "xy":
        some.granted(peer, MODEL, grant((0, 20)), 0)
    assert len(sent(some, 0)) == 20
    for peer in "xy":
        some.expect(peer, MODEL, 60)
    some.granted("x", MODEL, grant((0, 20)), 60)
    assert sent(some, 60) == []
    some.granted("y", MODEL, grant((0, 20)), 60)
    assert len(sent(some, 60)) == 20


def test_two_blobs_are_served_in_turn() -> None:
    other = Blob(sha256="b" * 64, size=3 * KIB, chunk=KIB)
    some = fleet()
    some.granted("x", MODEL, grant((0, 2)), 0)
    some.granted("x", other, Grant(xfer=other.xfer, ranges=[(0, 2)], until=3), 0)
    order = [chunk.xfer[0] for _ in range(4) if (chunk := some.next_chunk(0))]
    assert order in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


# ------------------------------------------------------------------------------------------------------------------ laws


@dataclass
class Listener:
    """One agent: what it wants, how late it comes, what of it is lost, and how long a chunk takes on its link."""

    pool: Receiving
    size: int | None
    starts_at: float
    loss_ratio: float
    chunk_s: float
    have: Bitmap
    is_deaf: bool = False
    subscribed: bool = False
    free_at: float = 0.0
    n_came: int = 0
    end: Action | None = None


@dataclass
class World:
    """A sender, a broker that copies, and listeners, each behind a link of its own that keeps the order."""

    random: Random
    blob: Blob
    listeners: dict[str, Listener]
    delay_s: float
    checks: bool = False
    now: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)
    broadcasts: Broadcasts = field(default_factory=lambda: Broadcasts(stall_s=STALL_S, gather_s=GATHER_S))
    sending: Sending = field(default_factory=Sending)
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    serial: count[int] = field(default_factory=count)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.serial), what))

    def begin(self) -> None:
        self.sending.add(self.blob)
        for name, one in self.listeners.items():
            self.broadcasts.expect(name, self.blob, 0)
            self.at(one.starts_at, partial(self.join, name, one))

    def join(self, name: str, one: Listener) -> None:
        one.subscribed = not one.is_deaf
        self.perform(name, one.pool.open("c", self.blob, self.now, size=one.size, have=one.have, listening=True))

    def perform(self, name: str, actions: list[Action]) -> None:
        one = self.listeners[name]
        if self.checks:
            one.pool.check()
            self.broadcasts.check()
        for action in actions:
            match action:
                case SendGrant(grant=grant):
                    self.at(self.now + self.delay_s, partial(self.take, name, grant))
                case StopListening():
                    one.subscribed = False
                case Completed() | GaveUp():
                    assert one.end is None
                    one.end, one.subscribed = action, False

    def take(self, name: str, grant: Grant) -> None:
        assert self.sending.asked_of(name, grant) is self.blob
        if grant.until:
            self.broadcasts.granted(name, self.blob, grant, self.now)
        else:
            self.broadcasts.leave(name, grant.xfer)
            self.sending.granted(name, grant)
        self.send()

    def send(self) -> None:
        while (chunk := self.broadcasts.next_chunk(self.now) or self.sending.next_chunk()) is not None:
            self.sent[chunk.peer] += 1
            for name in [chunk.peer] if chunk.peer else [n for n, one in self.listeners.items() if one.subscribed]:
                self.carry(name, chunk)

    def carry(self, name: str, chunk: SendChunk) -> None:
        one, heard = self.listeners[name], chunk.peer == EVERYONE
        one.free_at = max(one.free_at, self.now + self.delay_s) + one.chunk_s
        if self.random.random() >= one.loss_ratio:
            self.at(one.free_at, lambda: self.arrive(name, chunk, heard=heard))

    def arrive(self, name: str, chunk: SendChunk, *, heard: bool) -> None:
        one = self.listeners[name]
        one.n_came += 1
        self.perform(name, one.pool.chunk("c", chunk.xfer, chunk.index, chunk.length, self.now, heard=heard))

    def run(self) -> None:
        self.begin()
        for _ in range(300_000):
            timers = [(one.pool.wake_at, name) for name, one in self.listeners.items() if one.pool.wake_at is not None]
            timers += [(self.broadcasts.wake_at, "")] if self.broadcasts.wake_at is not None else []
            at, name = min(timers, default=(None, ""))
            if self.events and (at is None or self.events[0][0] <= at):
                self.now, _, what = heapq.heappop(self.events)
                what()
            elif at is None:
                return
            else:
                self.now = max(self.now, at)
                if name:
                    self.perform(name, self.listeners[name].pool.tick(self.now))
                else:
                    self.send()
        raise AssertionError("it does not come to an end")

    def assert_all_is_here(self) -> None:
        for name, one in self.listeners.items():
            assert one.end == Completed("c", self.blob.xfer), name


def listener(
    blob: Blob,
    size: int | None = None,
    *,
    window: int = 8,
    starts_at: float = 0.0,
    loss_ratio: float = 0.0,
    chunk_s: float = 0.001,
) -> Listener:
    pool = Receiving(window=window, max_window=64, budget_bytes=64 * KIB, max_tries=100)
    return Listener(pool, size, starts_at, loss_ratio, chunk_s, have=Bitmap(n_prefix_chunks(blob, size)))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    random = Random(draw(st.integers(0, 2**32)))
    blob = Blob(sha256="a" * 64, size=random.randint(1, 60 * KIB), chunk=KIB)
    listeners = {}
    for number in range(random.randint(1, 8)):
        one = listener(
            blob,
            random.choice([None, random.randint(1, blob.size)]),
            window=random.randint(1, 12),
            starts_at=random.choice([0.0, 0.01, random.uniform(0, 6)]),
            loss_ratio=random.choice([0.0, 0.05, 0.3]),
            chunk_s=random.choice([0.0, 0.001, 0.05, 0.7]),
        )
        one.is_deaf = random.random() < 0.1
        for index in range(len(one.have)):
            if random.random() < 0.1:
                one.have.add(index)
        listeners[f"agent-{number}"] = one
    return World(random, blob, listeners, delay_s=random.choice([0.0, 0.001, 0.1]), checks=True)


@settings(max_examples=120)
@given(worlds())
def test_all_have_what_they_want_whoever_is_late_slow_deaf_or_loses(world: World) -> None:
    world.run()
    world.assert_all_is_here()


def test_a_fleet_that_keeps_up_costs_one_copy() -> None:
    blob = Blob(sha256="a" * 64, size=150 * KIB, chunk=KIB)
    listeners = {f"agent-{n}": listener(blob, blob.size // (1 + n % 3), chunk_s=0.001 * (1 + n % 5)) for n in range(30)}
    world = World(Random(1), blob, listeners, delay_s=0.02)
    world.run()
    world.assert_all_is_here()
    assert world.sent == {EVERYONE: 150}
    for one in listeners.values():
        assert one.pool.counts.n_unneeded == one.pool.counts.n_unasked == 0


def test_losses_on_each_link_are_mended_together() -> None:
    blob = Blob(sha256="a" * 64, size=150 * KIB, chunk=KIB)
    listeners = {f"agent-{n}": listener(blob, loss_ratio=0.05) for n in range(30)}
    world = World(Random(1), blob, listeners, delay_s=0.02)
    world.run()
    world.assert_all_is_here()
    assert sum(world.sent.values()) < 0.9 * 0.05 * 30 * 150 + 150, "fewer than one more for each that was lost"


@pytest.mark.parametrize("chunk_s", [2.0, 0.2, 0.05])
def test_one_slow_link_costs_the_others_a_pause_and_not_their_pace(chunk_s: float) -> None:
    blob = Blob(sha256="a" * 64, size=150 * KIB, chunk=KIB)
    listeners = {f"agent-{n}": listener(blob) for n in range(20)} | {"slow": listener(blob, chunk_s=chunk_s)}
    world = World(Random(1), blob, listeners, delay_s=0.02)
    done_at: dict[str, float] = {}
    perform = world.perform

    def watched(name: str, actions: list[Action]) -> None:
        perform(name, actions)
        if world.listeners[name].end is not None:
            done_at.setdefault(name, world.now)

    world.perform = watched  # type: ignore[method-assign]
    world.run()
    world.assert_all_is_here()
    assert max(at for name, at in done_at.items() if name != "slow") < 4
    assert done_at["slow"] < 150 * chunk_s * 1.6 + 10
    assert world.sent == {EVERYONE: 150}, "what it is sent later than the others it is not sent twice"
