"""News: what listeners hear of a job's life, in order, and what becomes of one that does not listen well."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from coordinator.core import events as ev
from coordinator.feed import (
    AgentMoved,
    AnyNews,
    BrokerMoved,
    JobMoved,
    Listener,
    Listening,
    Missed,
    Progressed,
    RoundClosed,
    ShareMoved,
    sse,
)
from protocol.messages import ExecState

JOB = b"""
[job]
name = "j"
[model]
source = "toy"
[round]
n_rounds = 1
"""


@pytest.fixture
def heard(served: Any) -> Iterator[Iterator[AnyNews]]:
    """News of the served coordinator, as a reader of the stream gets them."""

    def read(response: httpx.Response) -> Iterator[AnyNews]:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield msgspec.json.decode(line[6:], type=AnyNews)

    with httpx.stream("GET", f"{served.url}/v1/events", trust_env=False, timeout=30) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        news = read(response)
        assert isinstance(next(news), Listening)
        yield news


def until(news: Iterator[AnyNews], kind: type, **fields: object) -> Any:
    """The next news of this kind with these fields."""
    for item in news:
        if isinstance(item, kind) and all(getattr(item, name) == value for name, value in fields.items()):
            return item
    raise AssertionError("the stream ended")


def test_a_broker_that_goes_and_comes_back_is_news(served: Any, heard: Iterator[AnyNews]) -> None:
    served.loop.call_soon_threadsafe(served.broker.stop)
    gone = until(heard, BrokerMoved)
    assert (gone.connected, gone.fault) == (False, "the broker was stopped")
    served.loop.call_soon_threadsafe(served.broker.start)
    assert until(heard, BrokerMoved).connected


def test_a_jobs_life_is_heard_as_it_happens(served: Any, heard: Iterator[AnyNews]) -> None:
    httpx.post(f"{served.url}/v1/jobs", content=JOB, headers={"content-type": "application/toml"}, trust_env=False)
    served.join("a")
    assert until(heard, JobMoved).phase == "waiting"
    joined = until(heard, AgentMoved)
    assert (joined.agent, joined.online) == ("a", True)
    assert until(heard, ShareMoved, state="OFFERED").round == 0
    served.survey("a")
    assert until(heard, JobMoved, phase="collecting").n_rounds == 1
    assert until(heard, ShareMoved, state="OFFERED").round == 1
    served.move("a", ExecState.TRAINING)
    assert until(heard, ShareMoved, state="TRAINING").agent == "a"
    served.say("a", step=3)
    assert until(heard, Progressed).agents["a"].step == 3
    served.offer("a")
    assert until(heard, ShareMoved, state="DONE").job == "j"
    closed = until(heard, RoundClosed)
    assert (closed.record.round, closed.record.outcome, closed.record.shares["a"].samples) == (1, "aggregated", 100)
    served.until(lambda state: state.jobs["j"].phase == "evaluating")
    served.finish("a")
    assert until(heard, JobMoved, phase="completed").round == 1
    served.post(ev.AgentLeft(agent="a", session="a" * 16, reason="stopping"))
    assert until(heard, AgentMoved, online=False).reason == "stopping"


def test_a_revoked_agent_and_the_end_of_its_share_are_news(served: Any, heard: Iterator[AnyNews]) -> None:
    text = JOB + b"min_agents = 1\nstart_agents = 2\n"
    httpx.post(f"{served.url}/v1/jobs", content=text, headers={"content-type": "application/toml"}, trust_env=False)
    served.join("a", "b")
    served.survey("a", "b")
    assert until(heard, ShareMoved, state="OFFERED", round=1).job == "j"
    served.post(ev.AgentRevoked(agent="b", reason="stolen"))
    gone = until(heard, AgentMoved, online=False)
    assert (gone.agent, gone.reason) == ("b", "revoked: stolen")
    assert until(heard, ShareMoved, agent="b", state="FAILED").reason == "revoked: stolen"


def test_nothing_is_watched_while_nobody_listens(served: Any) -> None:
    assert not served.coordinator.watchers
    with httpx.stream("GET", f"{served.url}/v1/events", trust_env=False, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: listening"
        assert len(served.coordinator.watchers) == 1
    served.post(ev.Tick())

    async def gone() -> None:
        while served.coordinator.watchers:  # noqa: ASYNC110 - the reader's end is seen by the server when it is
            await asyncio.sleep(0)

    asyncio.run_coroutine_threadsafe(gone(), served.loop).result(30)


async def test_a_slow_listener_loses_the_oldest_and_is_told() -> None:
    listener = Listener(limit=3)
    items = [AgentMoved(at=0.0, agent=f"a{i}", online=True) for i in range(5)]
    listener.put(items, now=7.0)
    assert await listener.take(1.0) == [Missed(at=7.0, n=2), *items[2:]]
    listener.put(items[:1], now=8.0)
    assert await listener.take(1.0) == items[:1]


async def test_waiting_ends_with_time_with_news_or_with_the_end() -> None:
    listener = Listener()
    assert await listener.take(0.001) == []
    waiting = asyncio.create_task(listener.take(60.0))
    await asyncio.sleep(0)
    listener.put([AgentMoved(at=0.0, agent="a", online=True)], now=0.0)
    assert len(await waiting) == 1
    listener.close()
    assert await listener.take(60.0) == []


def test_an_event_is_one_line_of_data_whatever_it_says() -> None:
    text = sse(AgentMoved(at=1.0, agent="a", online=False, reason="two\nlines"))
    assert text.startswith(b"event: agent\ndata: {")
    assert text.endswith(b"}\n\n")
    assert text.count(b"\n") == 3
