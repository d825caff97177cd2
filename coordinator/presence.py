"""Who has been heard of lately, and how far they are: heartbeats folded in memory, never journalled.

Ten thousand agents with a heartbeat each 15 s are 700 messages a second that change nothing; only silence and the end of a
silence are facts for the core.
"""

from __future__ import annotations

from protocol.messages import Progress

SILENT_BEATS = 3


class Presence:
    """The last word of every agent.  `heartbeat_s` is how often agents are expected to speak."""

    def __init__(self, heartbeat_s: float) -> None:
        self._limit_s = SILENT_BEATS * heartbeat_s
        self._heard_at: dict[str, float] = {}
        self.progress: dict[str, Progress] = {}
        self._sessions: dict[str, tuple[str, str]] = {}

    def heard(self, agent: str, now: float, progress: Progress | None = None) -> None:
        """An agent said something."""
        self._heard_at[agent] = now
        if progress is not None:
            self.progress[agent] = progress

    def is_twin(self, agent: str, session: str) -> bool:
        """Whether this birth is of a process that another had taken the place of: two live under one name.

        A process has one session for all its life, so a session that comes back after another one says it.
        """
        last, before = self._sessions.get(agent, ("", ""))
        if session != last:
            self._sessions[agent] = (session, last)
        return session not in {last, ""} and session == before

    def heard_at(self, agent: str) -> float | None:
        """When the agent last said anything, in this process's life."""
        return self._heard_at.get(agent)

    def left(self, agent: str) -> None:
        """The agent is known to be gone: do not wait for it."""
        self._heard_at.pop(agent, None)
        self.progress.pop(agent, None)

    def expect(self, agent: str, now: float) -> None:
        """The agent is believed to be there: from now on its silence counts."""
        self._heard_at.setdefault(agent, now)

    def silent(self, now: float) -> list[str]:
        """Agents that are silent for too long.  Cost: linear in agents; call it once per heartbeat."""
        return [agent for agent, at in self._heard_at.items() if now - at > self._limit_s]
