"""Keeps this server's identity fresh while the agent runs: the certificate at two thirds of its life, the signing keys when unknown ones appear.

A renewal that fails is tried again after a tenth of the time that is left, within a minute and six hours; the present
certificate is in force meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

from agent.identity import Identity
from protocol.bus import Bus
from protocol.errors import OutsideFault

SHORTEST_S: Final = 60.0
LONGEST_S: Final = 6 * 3600.0

logger = logging.getLogger(__name__)


class Renewal:
    """The task beside the daemon's others.  `keys_changed` is called when other signing keys are in force."""

    def __init__(self, identity: Identity, bus: Bus, keys_changed: Callable[[], None]) -> None:
        self._identity, self._bus, self._keys_changed = identity, bus, keys_changed
        self._unknown_key = asyncio.Event()
        self._asked_at = -SHORTEST_S

    def unknown_key(self) -> None:
        """A message came that is signed with a key that is not pinned."""
        self._unknown_key.set()

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = 0.0
        while True:
            wait_s = retry_s or max(0.0, self._identity.renew_at - time.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LONGEST_S, wait_s)):
                    await self._unknown_key.wait()
            if self._unknown_key.is_set():
                await self._refresh_keys()
            if time.time() >= self._identity.renew_at:
                retry_s = await self._renew()

    async def _renew(self) -> float:
        """0, or after how long to try again."""
        identity = self._identity
        try:
            await asyncio.to_thread(identity.renew)
        except OutsideFault as error:
            left_s = identity.expires_at - time.time()
            extra = {"action": "renewal_failed", "days_left": round(left_s / 86_400, 1)}
            logger.error("the certificate could not be renewed: %s", error, extra=extra)
            return min(LONGEST_S, max(SHORTEST_S, left_s / 10))
        logger.info("the certificate is renewed", extra={"action": "renewed", "until": int(identity.expires_at)})
        await self._bus.reconnect()
        return 0.0

    async def _refresh_keys(self) -> None:
        """At most once a minute: whoever can publish to us could make us ask."""
        wait_s = self._asked_at + SHORTEST_S - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        self._asked_at = time.monotonic()
        self._unknown_key.clear()
        try:
            changed = await asyncio.to_thread(self._identity.refresh_keys)
        except OutsideFault as error:
            logger.warning("the signing keys could not be asked for: %s", error, extra={"action": "renewal_failed"})
            return
        if changed:
            logger.info("the coordinator signs with another key now", extra={"action": "keys_followed"})
            self._keys_changed()
