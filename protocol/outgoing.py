"""Control messages on their way out: put in one queue, wrapped when it is their turn, published in order.

Up to IN_FLIGHT of them wait for the broker's acknowledgement at once: a link with a round trip of seconds costs a thousand
agents' plans some round trips, not a thousand.  MQTT keeps the order of one connection's publishes.

Nobody who decides waits for the network, so saying is enqueueing; a thousand agents' plans are bytes only when they go.  What a
lost connection swallows is not kept: both daemons say everything that still matters again on the next connection.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocol import codec
from protocol.bus import Bus, BusError, NotConnected, Will
from protocol.daemon import OncePer
from protocol.errors import BadMessage
from protocol.messages import Body, Grant, Progress

IN_FLIGHT: Final = 20
"""As many as a broker takes by default (its Receive Maximum); a smaller limit holds them back in the client."""
FLEETING: Final = (Grant, Progress)
"""Said at QoS 0: one that is lost is made up for by the next.  A broker may let through one message of QoS 1 per round trip,
and credit that waits for its turn runs out before it is given.  Credit for whole objects is rare, and waited for longer."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Saying:
    """One message on its way out."""

    topic: str
    body: Body | None
    """None removes what is retained."""
    retain: bool = False
    is_over: bool = False
    """The broker has it, or will never get it: it refused, the connection ended, or no receiver would take it."""


class Outgoing:
    """What one daemon says, in one session.  `session` (16 hex digits) is new with each process; `seal` may sign (topic, bytes)."""

    def __init__(self, clock: Callable[[], float], seal: Callable[[str, bytes], bytes] | None = None) -> None:
        self.session = secrets.token_hex(8)
        self._clock = clock
        self._seal = seal or (lambda _topic, payload: payload)
        self._sent = 0
        self._queue: asyncio.Queue[Saying] = asyncio.Queue()
        self._complaints = OncePer()

    def encode(self, body: Body) -> bytes:
        """A message in its envelope, as bytes."""
        self._sent += 1
        return codec.encode(body, session=self.session, seq=self._sent, now=self._clock())

    def will(self, topic: str, body: Body) -> Will:
        """The words for the case that we vanish."""
        return Will(topic, self._seal(topic, self.encode(body)))

    def say(self, topic: str, body: Body, *, retain: bool = False) -> Saying:
        """Publish a message after everything said before.  One that no receiver would take is named in the log instead."""
        saying = Saying(topic, body, retain)
        self._queue.put_nowait(saying)
        return saying

    def clear(self, topic: str) -> None:
        """Remove what is retained on a topic."""
        self._queue.put_nowait(Saying(topic, None, retain=True))

    async def run(self, bus: Bus) -> None:
        """Publish what is said, until cancelled."""
        room = asyncio.Semaphore(IN_FLIGHT)
        async with asyncio.TaskGroup() as publishing:
            while True:
                await room.acquire()
                saying = await self._queue.get()
                publishing.create_task(self._publish(bus, saying)).add_done_callback(lambda _: room.release())

    async def _publish(self, bus: Bus, saying: Saying) -> None:
        try:
            payload = self._seal(saying.topic, self.encode(saying.body)) if saying.body else b""
            await bus.publish(saying.topic, payload, qos=0 if _is_fleeting(saying.body) else 1, retain=saying.retain)
        except BadMessage as error:
            logger.error("not said: %s", error, extra={"action": "publish_refused", "topic": saying.topic})
        except NotConnected:
            pass
        except BusError as error:
            if self._complaints(saying.topic, self._clock()) is not None:
                logger.error("%s", error, extra={"action": "publish_refused", "topic": saying.topic})
        finally:
            saying.is_over = True

    async def goodbye(self, bus: Bus, topic: str, body: Body) -> None:
        """The last words, retained, past the queue; without a broker nobody hears them."""
        try:
            await bus.publish(topic, self._seal(topic, self.encode(body)), retain=True)
        except BusError as error:
            logger.debug("goodbye not said", extra={"action": "goodbye_failed", "error": str(error)})


def _is_fleeting(body: Body | None) -> bool:
    return isinstance(body, FLEETING) and not (isinstance(body, Grant) and body.by_store)
