"""Who may say how much: a budget per agent, one for all strangers, and a count of what was refused, by kind.

The idea.  To decode, to journal and to answer costs, and whoever may publish can make the coordinator pay without end.  So
before a single byte is decoded, every message is paid for from a bucket of tokens (Turner, 1986, token bucket): one per agent
that the fleet knows, and *one for all that it does not know*, because names can be invented.  A flooding agent empties its own
bucket and is not heard for a while; the others do not notice.  Limits are far above honest use: an agent says a few words per
round and a heartbeat each few seconds.

What is remembered is bounded: buckets only of known agents, at most `max_agents` of them, and only until they are full again.

What was refused is lost, so an agent that was refused anything is asked to say everything again once it has calmed down; for
an honest one in an evil hour that is all the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from protocol.errors import BadMessage

RATE_PER_S: Final = 20.0
BURST: Final = 400.0
"""Tokens of one agent: so many words that are journalled may come at once."""
COST: Final = {"state": 1.0, "report": 1.0, "exec": 1.0, "offer": 1.0, "progress": 0.05, "answer": 0.02}
"""Tokens per message; credit for chunks (answer) costs a thousandth of a journalled word's time, and a fast link needs it."""
BYTES_PER_TOKEN: Final = 64 * 1024
"""And for its length: 2 MiB cost 32 tokens more."""
ARRIVAL_S: Final = 60.0
"""A whole new fleet of max_agents may arrive at once, and another within so long."""
FROM_STRANGERS: Final = frozenset({"state", "report", "progress"})


class Bucket(NamedTuple):
    """Tokens left at an instant."""

    tokens: float
    at: float


class Gate:
    """Lets messages through or refuses them.  `known` are the agents of the fleet as they are now."""

    def __init__(self, max_agents: int, known: Callable[[], Collection[str]]) -> None:
        self.counts: Counter[str] = Counter()
        self._max_agents, self._known = max_agents, known
        self._buckets: dict[str, Bucket] = {}
        self._strangers = Bucket(float(max_agents), 0.0)
        self._arriving: set[str] = set()
        self._muted: set[str] = set()

    def renew(self, max_agents: int) -> None:
        """Another size of the fleet; who is in stays in."""
        self._max_agents = max_agents

    def enter(self, agent: str, leaf: str, n_bytes: int, now: float) -> None:
        """Pay for a message.  Raises BadMessage when it is not let in; O(1)."""
        cost = COST[leaf] + n_bytes / BYTES_PER_TOKEN
        if agent in self._known() or agent in self._arriving:
            left = self._left(self._buckets.get(agent), BURST, RATE_PER_S, now)
            if left < cost:
                self._muted.add(agent)
                raise BadMessage(
                    f"more than {RATE_PER_S:g} words per second: what {agent} says is left out for a while", "flood"
                )
            self._buckets[agent] = Bucket(left - cost, now)
            return
        if leaf not in FROM_STRANGERS:
            raise BadMessage(f"a word on {leaf!r} from an agent that has not said birth", "stranger")
        burst = float(self._max_agents)
        left = self._left(self._strangers, burst, burst / ARRIVAL_S, now)
        if left < cost:
            raise BadMessage("too many unknown agents at once: they are left out for a while", "stranger_flood")
        self._strangers = Bucket(left - cost, now)

    def welcome(self, agent: str) -> None:
        """An agent joins the fleet.  Raises BadMessage when there is no room for one more."""
        if agent in self._known() or agent in self._arriving:
            return
        if len(self._known()) + len(self._arriving) >= self._max_agents:
            self._arriving = {a for a in self._arriving if a not in self._known()}
        if len(self._known()) + len(self._arriving) >= self._max_agents:
            text = f"the fleet is full with {self._max_agents} agents: raise max_agents, or see who fills it"
            raise BadMessage(text, "fleet_full")
        self._arriving.add(agent)

    def calm(self, now: float) -> list[str]:
        """Agents of which words were left out, once each, as soon as they have half of their budget again."""
        left = {agent: self._left(self._buckets.get(agent), BURST, RATE_PER_S, now) for agent in self._muted}
        calm = sorted(agent for agent, tokens in left.items() if tokens >= BURST / 2)
        self._muted.difference_update(calm)
        return calm

    def tidy(self, now: float) -> None:
        """Forget what is as good as new: full buckets, agents that have arrived.  Cost: linear in agents heard of late."""
        idle_s = BURST / RATE_PER_S
        self._buckets = {agent: bucket for agent, bucket in self._buckets.items() if now - bucket.at < idle_s}
        self._arriving = {agent for agent in self._arriving if agent not in self._known()}

    def check(self) -> None:
        """Assert that what is remembered is bounded, for tests."""
        assert len(self._buckets) <= 2 * self._max_agents
        assert len(self._arriving) <= self._max_agents
        assert len(self._muted) <= 2 * self._max_agents
        assert all(bucket.tokens >= 0 for bucket in (*self._buckets.values(), self._strangers))

    @staticmethod
    def _left(bucket: Bucket | None, burst: float, rate_per_s: float, now: float) -> float:
        return burst if bucket is None else min(burst, bucket.tokens + (now - bucket.at) * rate_per_s)
