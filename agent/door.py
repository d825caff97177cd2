"""Whose word this agent takes: its coordinator's alone once it is enrolled, any that its broker lets through until then.

An agent that is not enrolled never loads what enrolment needs: the cryptography package takes 10 MB, an idle agent little more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config import AgentConfig
from protocol import codec
from protocol.bus import Bus
from protocol.errors import BadConfig
from protocol.messages import Envelope, Message
from protocol.seal import unsealed

if TYPE_CHECKING:
    from agent.identity import Identity
    from agent.renewal import Renewal


class Door:
    """`open` is the only way in for a message.  Raises BadConfig for an identity that is not this agent's or not whole."""

    def __init__(
        self, config: AgentConfig, bus: Bus, clock: Callable[[], float], keys_changed: Callable[[], None]
    ) -> None:
        self._clock = clock
        self.identity: Identity | None = None
        self._renewal: Renewal | None = None
        if not config.identity_dir:
            return
        from agent.identity import Identity
        from agent.renewal import Renewal

        self.identity = Identity(Path(config.identity_dir))
        mine = (self.identity.trust.fleet, self.identity.agent)
        if mine != (config.fleet, config.agent):
            raise BadConfig(
                f"{config.identity_dir} is the identity of {mine[1]} of fleet {mine[0]}, not of {config.agent} of {config.fleet}: "
                "correct agent, fleet or identity_dir, or enrol again"
            )
        self._renewal = Renewal(self.identity, bus, keys_changed)

    def open(self, topic: str, payload: bytes, *kinds: type[Message]) -> Envelope:
        """The message in a payload.  Raises BadMessage for one that is malformed, or not from whom it has to be."""
        if self.identity is None or self._renewal is None:
            return codec.decode(unsealed(payload), *kinds)
        if self.identity.verifier.is_unknown(payload):
            self._renewal.unknown_key()
        return self.identity.verifier.open(topic, payload, self._clock(), *kinds)

    async def run(self) -> None:
        """Keep the identity fresh, until cancelled; return at once when there is none."""
        if self._renewal is not None:
            await self._renewal.run()
