"""Does anybody hear this agent?  A broker that denies a topic in silence looks like a coordinator that has nothing to say.

The coordinator answers every birth, with a plan or with the clearing of one.  MQTT 3.1.1 acknowledges a denied message as if
it were delivered, and most brokers acknowledge a denied subscription; so a birth without an answer is the one sign there is.
"""

from __future__ import annotations

from typing import Final

from protocol.topics import Topics

PATIENCE_S: Final = 30.0


class Answers:
    """What was said to `agent` since its last birth.  Times are seconds on any one clock."""

    def __init__(self, topics: Topics, agent: str) -> None:
        self._topics, self._agent = topics, agent
        self._born_at: float | None = None
        self._is_answered = False
        self._coordinator = ""

    def born(self, now: float) -> None:
        """A birth was said; one before it that had no answer yet goes on waiting."""
        if self._coordinator != "away" and self._born_at is None:
            self._born_at, self._is_answered = now, False

    def heard(self) -> None:
        """Something came for this agent."""
        self._is_answered = True
        self._settle()

    def coordinator(self, *, online: bool) -> None:
        """The coordinator's birth or death was heard."""
        self._coordinator = "there" if online else "away"
        if not online:
            self._born_at = None
        self._settle()

    def _settle(self) -> None:
        if self._is_answered and self._coordinator:
            self._born_at = None

    def gone(self) -> None:
        """There is no broker: nobody can answer."""
        self._born_at, self._coordinator = None, ""

    def complaint(self, now: float) -> str:
        """What is wrong and what to do about it; empty while there is nothing to complain of."""
        if self._born_at is None or now - self._born_at < PATIENCE_S:
            return ""
        if not self._coordinator:
            topic = self._topics.coordinator_state()
            return (
                f"no coordinator is heard on {topic}: start it with this broker and this fleet; if it runs, the broker "
                f"must let this agent read it, as in `topic read {self._topics.root}/c/#`"
            )
        up, down = (f"{self._topics.root}/a/{self._agent}/{way}/#" for way in ("up", "down"))
        return (
            f"the coordinator does not answer our birth: if it lists this agent as online, the broker must let us read "
            f"what it says, as in `topic read {down}`; if not, we must be let write and the coordinator read, as in "
            f"`topic write {up}` and `topic read {self._topics.root}/a/+/up/#`"
        )
