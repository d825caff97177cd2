"""Many senders and one receiver over a channel that loses, repeats, delays and reorders, on virtual time.

Receiving and Sending are the real ones.  What must hold: everything completes, what is in flight stays within the windows and
the budget, and nothing is asked for twice that was not lost.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bitmap import Bitmap
from protocol.frames import chunk_length
from protocol.messages import Blob, Grant
from protocol.sending import SendChunk, Sending
from protocol.transfer import Action, Completed, GaveUp, Receiving, SendGrant

TIMEOUT_S = 5.0
Key = tuple[str, str, int]
Transfers = dict[tuple[str, str], tuple[Blob, Bitmap]]


@dataclass
class World:
    """One receiver, senders by name, and what is between them."""

    random: Random
    pool: Receiving
    loss_ratio: float
    duplicate_ratio: float
    max_delay_s: float
    now: float = 0.0
    epoch: int = 0
    dead: set[str] = field(default_factory=set)
    senders: dict[str, Sending] = field(default_factory=dict)
    blobs: dict[tuple[str, str], Blob] = field(default_factory=dict)
    granted: set[Key] = field(default_factory=set)  # and neither here nor lost
    arrived: set[Key] = field(default_factory=set)
    ended: dict[tuple[str, str], Action] = field(default_factory=dict)
    n_again: int = 0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    serial: count[int] = field(default_factory=count)

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + delay_s, next(self.serial), what))

    def delay(self) -> float:
        return self.random.uniform(0, self.max_delay_s)

    def open(self, peer: str, blob: Blob, have: Bitmap | None = None) -> None:
        self.senders.setdefault(peer, Sending()).add(blob)
        self.blobs[peer, blob.xfer] = blob
        self.perform(self.pool.open(peer, blob, self.now, have=have))

    def perform(self, actions: list[Action]) -> None:
        self.pool.check()
        for action in actions:
            match action:
                case SendGrant():
                    self.note_credit(action.peer, action.grant)
                    self.send_grant(action, self.epoch)
                case Completed() | GaveUp():
                    assert (action.peer, action.xfer) not in self.ended
                    self.ended[action.peer, action.xfer] = action

    def note_credit(self, peer: str, grant: Grant) -> None:
        keys = {(peer, grant.xfer, index) for first, n in grant.ranges for index in range(first, first + n)}
        assert not keys & self.arrived, "asked for what is here"
        self.n_again += len(keys & self.granted)
        self.granted |= keys
        in_flight = [key for key in self.granted if key[0] == peer]
        assert len(in_flight) <= self.pool.window
        assert sum(chunk_length(self.blobs[p, x], i) for p, x, i in self.granted) <= self.pool.budget_bytes

    def send_grant(self, action: SendGrant, epoch: int) -> None:
        def arrive() -> None:
            if action.peer in self.dead:
                self.granted = {key for key in self.granted if key[:2] != (action.peer, action.grant.xfer)}
            elif epoch == self.epoch:
                sender = self.senders[action.peer]
                assert sender.granted("receiver", action.grant)
                while (chunk := sender.next_chunk()) is not None:
                    self.send_chunk(action.peer, chunk)

        self.after(self.delay(), arrive)

    def send_chunk(self, peer: str, chunk: SendChunk) -> None:
        key, epoch = (peer, chunk.xfer, chunk.index), self.epoch

        def arrive() -> None:
            if epoch == self.epoch:
                self.granted.discard(key)
                self.arrived.add(key)
                self.perform(self.pool.chunk(peer, chunk.xfer, chunk.index, chunk.length, self.now))

        if self.random.random() < self.loss_ratio:
            self.granted.discard(key)
            return
        self.after(self.delay(), arrive)
        while self.random.random() < self.duplicate_ratio:
            self.after(self.delay(), arrive)

    def reset(self) -> None:
        """The bus is new: what was under way is gone."""
        self.epoch += 1
        self.granted.clear()
        for sender in self.senders.values():
            sender.reset()
        self.perform(self.pool.reset(self.now))

    def run(self) -> None:
        for _ in range(200_000):
            wake_at = self.pool.wake_at
            if self.events and (wake_at is None or self.events[0][0] <= wake_at):
                self.now, _, what = heapq.heappop(self.events)
                what()
            elif wake_at is not None:
                self.now = max(self.now, wake_at)
                self.perform(self.pool.tick(self.now))
                assert self.pool.wake_at is None or self.pool.wake_at > self.now, "the clock would spin"
            else:
                return
        raise AssertionError("it does not come to an end")


@st.composite
def worlds(draw: st.DrawFn, *, loss_ratio: float) -> tuple[World, Transfers]:
    random = Random(draw(st.integers(0, 2**32)))
    window = draw(st.integers(1, 12))
    pool = Receiving(
        window=window,
        budget_bytes=1024 * draw(st.integers(1, 24)),
        timeout_s=TIMEOUT_S,
        max_timeout_s=4 * TIMEOUT_S,
        max_tries=1000,
    )
    world = World(
        random=random,
        pool=pool,
        loss_ratio=random.uniform(0, loss_ratio),
        duplicate_ratio=random.uniform(0, 0.3),
        max_delay_s=random.choice([0, 0.01, 0.49 * TIMEOUT_S]),
    )
    transfers: Transfers = {}
    blobs: dict[int, Blob] = {}
    for number in range(random.randint(1, 8)):
        size = random.randint(1, 100 * 1024)
        name = random.getrandbits(2)  # so that two agents may have the same content
        blob = blobs.setdefault(name, Blob(sha256=f"{name:064x}"[::-1], size=size, chunk=1024))
        have = Bitmap(blob.n_chunks)
        for index in range(blob.n_chunks):
            if random.random() < 0.2:
                have.add(index)
        transfers[f"agent-{number % 4}", blob.xfer] = (blob, have)
    return world, transfers


def begin(world: World, transfers: Transfers) -> None:
    for (peer, _), (blob, have) in transfers.items():
        world.after(world.random.uniform(0, 3), lambda p=peer, b=blob, h=have: world.open(p, b, h))


def assert_all_is_here(world: World, transfers: Transfers) -> None:
    assert set(world.ended) == set(transfers)
    for (peer, xfer), (blob, have) in transfers.items():
        assert world.ended[peer, xfer] == Completed(peer, xfer)
        arrived = {index for p, x, index in world.arrived if (p, x) == (peer, xfer)}
        assert arrived == {index for index in range(blob.n_chunks) if index not in have}
    assert len(world.pool) == world.pool.out_bytes == 0


@settings(max_examples=150)
@given(worlds(loss_ratio=0.4))
def test_all_complete_and_only_lost_chunks_are_asked_for_again(
    case: tuple[World, Transfers],
) -> None:
    world, transfers = case
    begin(world, transfers)
    world.run()
    assert_all_is_here(world, transfers)
    assert world.n_again == 0


@settings(max_examples=100)
@given(worlds(loss_ratio=0.2), st.lists(st.floats(0, 60), max_size=4))
def test_all_complete_although_the_bus_breaks(case: tuple[World, Transfers], breaks_at: list[float]) -> None:
    world, transfers = case
    begin(world, transfers)
    for at in breaks_at:
        world.after(at, world.reset)
    world.run()
    assert_all_is_here(world, transfers)


@settings(max_examples=50)
@given(worlds(loss_ratio=0.1), st.integers(0, 3))
def test_a_peer_that_dies_is_given_up_and_the_others_complete(case: tuple[World, Transfers], dead: int) -> None:
    world, transfers = case
    world.pool.max_tries = 10
    begin(world, transfers)

    world.after(3, lambda: world.dead.add(f"agent-{dead}"))
    world.run()
    for (peer, xfer), end in world.ended.items():
        assert peer == f"agent-{dead}" or end == Completed(peer, xfer)
    assert set(world.ended) == set(world.blobs)


def test_a_thousand_agents_share_one_budget() -> None:
    pool = Receiving(window=8, budget_bytes=64 * 1024, timeout_s=TIMEOUT_S)
    pool.check = lambda: None  # type: ignore[method-assign]  # it looks at everything
    world = World(Random(1), pool, loss_ratio=0.01, duplicate_ratio=0, max_delay_s=0.05)
    for number in range(1000):
        world.open(f"agent-{number}", Blob(sha256=f"{number:064x}"[::-1], size=10 * 1024, chunk=1024))
    world.run()
    assert len(world.ended) == 1000
    assert all(isinstance(end, Completed) for end in world.ended.values())
    assert world.n_again == 0
    assert pool.counts.n_grants < 0.7 * pool.counts.n_chunks, "credit comes in batches"
