"""A broker as the daemons know it (protocol/bus.py): clean sessions, retained words, wills; no promise beyond the connection.

What is said on a topic arrives in order, on different topics in any order; some of it comes twice, a little is swallowed as by
a full queue.  Whoever is not connected hears nothing but what is retained.  A will is spoken when the broker notices the end,
at the latest when the same client is back.  A crash of the broker forgets whatever was retained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from fedpipe.simulation.clockwork import Clockwork, Life
from fedpipe.simulation.scenario import Faults
from protocol.topics import FromAgent, FromCoordinator, ToAgent, Topics

COORDINATOR = "coordinator"
ANY_AGENT = "*"
NOBODY = ""
TOPICS = Topics("sim")


class Client(Protocol):
    """A daemon's end of a connection."""

    name: str

    def welcomed(self) -> None:
        """There is a connection."""

    def cut_off(self) -> None:
        """It is gone."""

    def heard(self, topic: str, payload: bytes) -> None:
        """A message came."""


class Will(NamedTuple):
    """What the broker says when a client vanishes."""

    topic: str
    payload: bytes


class _Link:
    __slots__ = ("client", "life", "will")

    def __init__(self, client: Client, will: Will) -> None:
        self.client, self.will, self.life = client, will, Life()


class Broker:
    """All connections and all that is retained."""

    def __init__(self, clockwork: Clockwork, faults: Faults) -> None:
        self.up = True
        self.faults = faults
        self.n_messages = 0
        self._clockwork, self._chance = clockwork, clockwork.chance("broker")
        self._links: dict[str, _Link] = {}
        self._wills: dict[str, _Link] = {}
        self._retained: dict[str, dict[str, bytes]] = {}  # by reader
        self._readers: dict[str, str] = {}
        self._last_at: dict[tuple[str, str], float] = {}

    # -------------------------------------------------------------------------------------------------- connections

    def join(self, client: Client, will: Will) -> None:
        """A new connection; an older one of the same client ends, and its will is spoken first."""
        if client.name in self._links:
            self._end(client.name)
        self._speak_will(client.name)
        link = self._links[client.name] = _Link(client, will)
        for reader in (client.name, ANY_AGENT):
            if reader == ANY_AGENT and client.name == COORDINATOR:
                continue
            for topic, payload in self._retained.get(reader, {}).items():
                self._deliver(link, topic, payload)
        client.welcomed()

    def part(self, name: str) -> None:
        """A goodbye: no will is spoken."""
        link = self._links.pop(name, None)
        if link:
            link.life.alive = False

    def cut(self, name: str, *, notices_after_s: float = 0.0) -> None:
        """A connection breaks; the client knows at once, the broker may take its time."""
        if name not in self._links:
            return
        link = self._end(name)
        self._wills[name] = link
        self._clockwork.after(notices_after_s, self._clockwork.always, self._noticed, link)
        link.client.cut_off()

    def crash(self, *, forgets: bool) -> None:
        """The broker is gone, and with it every connection; wills are not spoken."""
        self.up = False
        if forgets:
            self._retained.clear()
        self._wills.clear()
        for name in list(self._links):
            self._end(name).client.cut_off()

    def _end(self, name: str) -> _Link:
        link = self._links.pop(name)
        link.life.alive = False
        return link

    def _noticed(self, link: _Link) -> None:
        if self._wills.get(link.client.name) is link:
            self._speak_will(link.client.name)

    def _speak_will(self, name: str) -> None:
        link = self._wills.pop(name, None)
        if link and self.up:
            self._arrived(link.will.topic, link.will.payload, retain=True)

    def is_connected(self, name: str) -> bool:
        """Whether this client has a connection."""
        return name in self._links

    # ------------------------------------------------------------------------------------------------------ messages

    def publish(self, sender: str, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """What nobody is connected to say is lost."""
        link = self._links.get(sender)
        if link is None:
            return
        self.n_messages += 1
        if sender == COORDINATOR:  # its way to the broker is short, the agents' ways are long
            self._arrived(topic, payload, retain=retain)
        else:
            self._put(link, sender, topic, lambda: self._arrived(topic, payload, retain=retain))

    def _arrived(self, topic: str, payload: bytes, *, retain: bool) -> None:
        reader = self._reader(topic)
        if retain and payload:
            self._retained.setdefault(reader, {})[topic] = payload
        elif retain:
            self._retained.get(reader, {}).pop(topic, None)
        names = [name for name in self._links if name != COORDINATOR] if reader == ANY_AGENT else [reader]
        for name in names:
            link = self._links.get(name)
            if link is None:
                continue
            if not retain and self._chance.random() < self.faults.swallow_ratio:
                self._clockwork.fault("message swallowed", name)
            elif name == COORDINATOR:
                link.client.heard(topic, payload)
            else:
                self._deliver(link, topic, payload)

    def _deliver(self, link: _Link, topic: str, payload: bytes) -> None:
        self._put(link, link.client.name, topic, lambda: link.client.heard(topic, payload))

    def _put(self, link: _Link, name: str, topic: str, what: Callable[[], None]) -> None:
        """In order on its topic, but for second copies of what carries a serial or a digest."""
        clockwork = self._clockwork
        at = max(clockwork.now + self._delay_s(), self._last_at.get((name, topic), 0.0))
        self._last_at[name, topic] = at
        clockwork.at(at, link.life, what)
        if self._chance.random() < self.faults.duplicate_ratio:
            clockwork.faults["message twice"] += 1
            in_order = topic.endswith(("/state", "/report", "/plan"))
            clockwork.at(at if in_order else at + 4 * self._delay_s(), link.life, what)

    def _delay_s(self) -> float:
        return self._chance.uniform(0.2, 1.0) * self.faults.delay_s

    def _reader(self, topic: str) -> str:
        """Who has subscribed to it: each topic has one reader, or all agents, or none."""
        found = self._readers.get(topic)
        if found is None:
            match TOPICS.parse(topic):
                case FromAgent():
                    found = COORDINATOR
                case ToAgent(agent=agent):
                    found = agent
                case FromCoordinator(leaf=leaf):
                    found = ANY_AGENT if leaf == "state" else NOBODY
            self._readers[topic] = found
        return found

    @property
    def n_plans(self) -> int:
        """Plans that are retained."""
        return sum(topic.endswith("/plan") for topics in self._retained.values() for topic in topics)
