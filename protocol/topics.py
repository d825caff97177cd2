"""Where every message travels: the topic tree, built and parsed in this one place.

    fed/v1/{fleet}/c/state | c/job/{job} | c/blob/{xfer}
    fed/v1/{fleet}/a/{agent}/up/{leaf}      and  up/d/{xfer}     agent -> coordinator
    fed/v1/{fleet}/a/{agent}/up/probe/uplink                     agent -> broker
    fed/v1/{fleet}/a/{agent}/down/{leaf}    and  down/d/{xfer}   coordinator -> agent

The sender of a message is read from its topic, never from its payload: the broker's access control guards topics.
At most 8 levels and 256 bytes, so that the tree also fits the cloud brokers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from protocol.errors import BadMessage

ROOT: Final = "fed/v1"
MAX_TOPIC_BYTES: Final = 256

UpLeaf = Literal["state", "report", "progress", "exec", "offer", "answer"]
DownLeaf = Literal["plan", "cmd", "grant"]
UP_LEAVES: Final[frozenset[str]] = frozenset({"state", "report", "progress", "exec", "offer", "answer"})
DOWN_LEAVES: Final[frozenset[str]] = frozenset({"plan", "cmd", "grant"})

ID_RULE: Final = "1 to 64 of a-z, 0-9 and inner dashes"
_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_XFER = re.compile(r"[0-9a-f]{32}")


def is_id(text: str) -> bool:
    """Whether `text` may name a fleet, an agent or a job: 1 to 64 of a-z, 0-9 and inner dashes."""
    return _ID.fullmatch(text) is not None


def is_xfer(text: str) -> bool:
    """Whether `text` names a transfer: the first 32 hex digits of the content's sha256."""
    return _XFER.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class FromAgent:
    """A parsed `a/{agent}/up/...` topic; `xfer` is set exactly when leaf is 'd' (a chunk)."""

    agent: str
    leaf: str
    xfer: str = ""


@dataclass(frozen=True, slots=True)
class ToAgent:
    """A parsed `a/{agent}/down/...` topic; `xfer` is set exactly when leaf is 'd' (a chunk)."""

    agent: str
    leaf: str
    xfer: str = ""


@dataclass(frozen=True, slots=True)
class FromCoordinator:
    """A parsed `c/...` topic: leaf 'state', 'job' (name = job id) or 'blob' (name = transfer id)."""

    leaf: str
    name: str = ""


Place = FromAgent | ToAgent | FromCoordinator


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one fleet.  Raises ValueError for a fleet name that could not be a topic level."""

    fleet: str

    def __post_init__(self) -> None:
        if not is_id(self.fleet):
            msg = f"fleet name {self.fleet!r}: use {ID_RULE}"
            raise ValueError(msg)

    @property
    def root(self) -> str:
        """`fed/v1/{fleet}`."""
        return f"{ROOT}/{self.fleet}"

    def coordinator_state(self) -> str:
        """Retained; the coordinator's birth and its will."""
        return f"{self.root}/c/state"

    def job(self, job: str) -> str:
        """Retained; the job card."""
        return f"{self.root}/c/job/{job}"

    def blob(self, xfer: str) -> str:
        """Broadcast chunks of one blob."""
        return f"{self.root}/c/blob/{xfer}"

    def up(self, agent: str, leaf: UpLeaf) -> str:
        """From agent to coordinator."""
        return f"{self.root}/a/{agent}/up/{leaf}"

    def down(self, agent: str, leaf: DownLeaf) -> str:
        """From coordinator to one agent."""
        return f"{self.root}/a/{agent}/down/{leaf}"

    def up_chunk(self, agent: str, xfer: str) -> str:
        """Chunks of an upload."""
        return f"{self.root}/a/{agent}/up/d/{xfer}"

    def up_probe(self, agent: str) -> str:
        """Nobody listens: how fast the broker has it is all that an agent wants to know, and its right to write covers it."""
        return f"{self.root}/a/{agent}/up/probe/uplink"

    def down_chunk(self, agent: str, xfer: str) -> str:
        """Chunks of a download to one agent."""
        return f"{self.root}/a/{agent}/down/d/{xfer}"

    def coordinator_subscriptions(self) -> list[str]:
        """What the coordinator listens to: everything that agents say to it."""
        return [f"{self.root}/a/+/up/+", f"{self.root}/a/+/up/d/+"]

    def agent_subscriptions(self, agent: str) -> list[str]:
        """What an agent always listens to; blobs are subscribed to while one is wanted."""
        return [f"{self.root}/a/{agent}/down/#", self.coordinator_state()]

    def parse(self, topic: str) -> Place:
        """Say who spoke and about what.  Raises BadMessage for any topic outside the tree."""
        prefix, rest = self.root + "/", topic[len(self.root) + 1 :]
        if not topic.startswith(prefix) or len(topic) > MAX_TOPIC_BYTES:
            raise BadMessage(f"topic outside the fleet's tree: {topic[:80]!r}", "bad_topic")
        match rest.split("/"):
            case ["a", agent, "up", leaf] if is_id(agent) and leaf in UP_LEAVES:
                return FromAgent(agent, leaf)
            case ["a", agent, "up", "d", xfer] if is_id(agent) and is_xfer(xfer):
                return FromAgent(agent, "d", xfer)
            case ["a", agent, "down", leaf] if is_id(agent) and leaf in DOWN_LEAVES:
                return ToAgent(agent, leaf)
            case ["a", agent, "down", "d", xfer] if is_id(agent) and is_xfer(xfer):
                return ToAgent(agent, "d", xfer)
            case ["c", "state"]:
                return FromCoordinator("state")
            case ["c", "job", job] if is_id(job):
                return FromCoordinator("job", job)
            case ["c", "blob", xfer] if is_xfer(xfer):
                return FromCoordinator("blob", xfer)
        raise BadMessage(f"no such topic in this protocol: {topic[:80]!r}", "bad_topic")
