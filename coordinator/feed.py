"""News for whoever listens: what the core was told and what it decided, as small JSON events.

A listener has a queue with an end.  One that reads too slowly loses its oldest news and is told how many; it never slows the
coordinator down, and reading a view puts it right.  While nobody listens nothing is computed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import msgspec

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import ENDED, FleetState, RoundRecord
from protocol.messages import Progress

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator

MAX_WAITING: Final = 1000
PROGRESS_S: Final = 1.0
STILL_HERE_S: Final = 15.0
"""Proxies close a stream that is silent for a minute."""


class News(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Something that just changed, at `at` on the coordinator's clock (seconds since the epoch)."""

    at: float


class Listening(News, frozen=True, kw_only=True, tag="listening"):
    """You hear everything from here on: what was before is in the views."""


class JobMoved(News, frozen=True, kw_only=True, tag="job"):
    """A job entered a phase; `round` counts finished rounds."""

    job: str
    phase: str
    round: int
    n_rounds: int
    reason: str = ""


class ShareMoved(News, frozen=True, kw_only=True, tag="share"):
    """An agent's part of a round entered a state; round 0 is the survey."""

    job: str
    round: int
    attempt: int
    agent: str
    state: str
    reason: str = ""


class AgentMoved(News, frozen=True, kw_only=True, tag="agent"):
    """An agent came or went."""

    agent: str
    online: bool
    reason: str = ""


class RoundClosed(News, frozen=True, kw_only=True, tag="round"):
    """A round ended, with every share's end."""

    job: str
    record: RoundRecord


class Progressed(News, frozen=True, kw_only=True, tag="progress"):
    """How far those agents are that said something new."""

    agents: dict[str, Progress]


class BrokerMoved(News, frozen=True, kw_only=True, tag="broker"):
    """The connection to the broker came or went; `fault` says why it is gone."""

    connected: bool
    fault: str = ""


class Missed(News, frozen=True, kw_only=True, tag="missed"):
    """You read too slowly: so many of your oldest news are lost.  Read the views."""

    n: int


AnyNews = Listening | JobMoved | ShareMoved | AgentMoved | RoundClosed | Progressed | BrokerMoved | Missed


def news(events: Iterable[ev.Happened], wishes: Iterable[act.Wish], state: FleetState, now: float) -> list[AnyNews]:
    """What a batch of events and the wishes that came of it mean to people.  Cost: linear in the batch."""
    found: list[AnyNews] = []
    touched: dict[tuple[str, str], None] = {}
    for event in events:
        match event:
            case ev.AgentJoined(agent=agent):
                found.append(AgentMoved(at=now, agent=agent, online=True))
            case ev.AgentLeft(agent=agent, reason=reason):
                found.append(AgentMoved(at=now, agent=agent, online=False, reason=reason))
            case ev.AgentRevoked(agent=agent):
                found.append(AgentMoved(at=now, agent=agent, online=False, reason=state.agents[agent].reason))
                touched |= dict.fromkeys((name, agent) for name, job in state.jobs.items() if job.phase not in ENDED)
            case ev.ShareMoved(agent=agent, job=job):
                touched[job, agent] = None
            case ev.UpdateOffered() | ev.UpdateStored() | ev.UpdateSpoiled():
                touched[event.offer.job, event.agent] = None
    for wish in wishes:
        match wish:
            case act.Announce(card=card):
                moved = JobMoved(
                    at=now,
                    job=card.job,
                    phase=card.phase,
                    round=card.round,
                    n_rounds=card.n_rounds,
                    reason=card.reason,
                )
                found.append(moved)
            case act.Record(job=job, record=record):
                found.append(RoundClosed(at=now, job=job, record=record))
            case act.Assign(agent=agent, plan=plan):
                touched[plan.job, agent] = None
            case act.Withdraw(agent=agent, cancel=cancel) if cancel:
                touched[cancel.job, agent] = None
    shares = [_share(state, job, agent, now) for job, agent in touched]
    return found + [share for share in shares if share]


def _share(state: FleetState, name: str, agent: str, now: float) -> ShareMoved | None:
    """The agent's part of the open round, or else its survey; a closed round is told as a whole."""
    job = state.jobs.get(name)
    if job is None:
        return None
    member, number = job.members.get(agent), 0
    share = member.survey if member else None
    if job.round and agent in job.round.shares:
        share, number = job.round.shares[agent], job.round.number
    if share is None:
        return None
    return ShareMoved(
        at=now,
        job=name,
        round=number,
        attempt=share.attempt,
        agent=agent,
        state=str(share.state),
        reason=share.reason,
    )


class Listener:
    """One reader's queue; at most `limit` news wait in it."""

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._waiting: deque[AnyNews] = deque(maxlen=limit)
        self._n_missed = 0
        self._moved = asyncio.Event()
        self.closed = False

    def put(self, items: Iterable[AnyNews], now: float) -> None:
        """Add news; the oldest make room."""
        for item in items:
            self._n_missed += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(item)
        self._now = now
        self._moved.set()

    def close(self) -> None:
        """No more news will come."""
        self.closed = True
        self._moved.set()

    async def take(self, timeout_s: float) -> list[AnyNews]:
        """Everything that waits, or nothing after `timeout_s`; what was lost is said first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        if not self.closed:
            self._moved.clear()
        taken: list[AnyNews] = list(self._waiting)
        if self._n_missed:
            taken.insert(0, Missed(at=self._now, n=self._n_missed))
        self._waiting.clear()
        self._n_missed = 0
        return taken


class Feed:
    """All listeners of one coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._listeners: set[Listener] = set()
        self._closed = False

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """A queue that fills for as long as the block lasts."""
        listener = Listener()
        self._listeners.add(listener)
        self._coordinator.watchers.add(self._happened)
        if self._closed:
            listener.close()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._coordinator.watchers.discard(self._happened)

    def close(self) -> None:
        """End every stream: the coordinator stops."""
        self._closed = True
        for listener in self._listeners:
            listener.close()

    def _happened(self, events: list[ev.Happened], wishes: list[act.Wish]) -> None:
        now = self._coordinator.clock()
        items = news(events, wishes, self._coordinator.fleet.state, now)
        if items:
            for listener in self._listeners:
                listener.put(items, now)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events (WHATWG HTML, 9.2) for one listener: news as they come, progress once per second at most."""
        clock, presence = self._coordinator.clock, self._coordinator.presence
        said: dict[str, Progress] = {}
        spoke_at = progress_at = clock()
        connected = self._coordinator.connected
        with self.listen() as listener:
            yield sse(Listening(at=spoke_at))
            while not listener.closed:
                batch = await listener.take(PROGRESS_S)
                now = clock()
                if now - progress_at >= PROGRESS_S:
                    progress_at = now
                    moved = {a: p for a, p in presence.progress.items() if said.get(a) != p}
                    said = dict(presence.progress)
                    batch += [Progressed(at=now, agents=moved)] if moved else []
                if connected != self._coordinator.connected:
                    connected = self._coordinator.connected
                    batch.append(BrokerMoved(at=now, connected=connected, fault=self._coordinator.bus_fault))
                if batch:
                    spoke_at = now
                    yield b"".join(map(sse, batch))
                elif now - spoke_at >= STILL_HERE_S:
                    spoke_at = now
                    yield b": still here\n\n"


def sse(item: AnyNews) -> bytes:
    """One server-sent event."""
    kind = str(item.__struct_config__.tag).encode()
    return b"event: %b\ndata: %b\n\n" % (kind, msgspec.json.encode(item))
