"""Is it hopeless?  When a broker refuses who we are, a daemon has to choose between trying on and ending with exit code 77.

Nobody logs into these servers: an agent that ends because its broker's access list was wrong for a minute is lost for good.  So
only two refusals are final, and both only after the broker insisted on them (protocol/mqtt_bus.py):

    revoked         somebody decided it; only a new token brings this server back
    never taken     this user, or certificate, of this configuration was never welcome there: it was set up wrongly

Whatever was welcome once is tried for ever; the reason stands in the log and in systemd's status line.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import msgspec

from protocol.bus import BrokerConfig, Refusal
from protocol.errors import NotAllowed
from protocol.files import replacing


class Credentials:
    """What one daemon's broker thought of it; `place` is the file that remembers it from one start to the next."""

    def __init__(self, place: Path, broker: BrokerConfig, client_id: str) -> None:
        named = [broker.url, broker.username, broker.password_file, broker.cert_file, client_id]
        self._place, self._digest = place, hashlib.sha256(msgspec.json.encode(named)).hexdigest()
        self._taken = False

    def taken(self) -> None:
        """The broker said welcome."""
        if self._taken:
            return
        self._taken = True
        with suppress(OSError):  # a disk that refuses: only a later start judges more sternly
            if self._remembered() != self._digest:
                with replacing(self._place) as file:
                    file.write(self._digest.encode())

    def refused(self, refusal: Refusal, reason: str) -> None:
        """The broker insists on a refusal; "" is any other trouble.  Raises NotAllowed when trying again cannot help."""
        if refusal == "revoked" or (refusal and not self._taken and self._remembered() != self._digest):
            raise NotAllowed(f"{reason}; it is no use to try again: correct that, then start this service anew")

    def _remembered(self) -> str:
        try:
            return self._place.read_text(encoding="ascii")
        except (OSError, ValueError):
            return ""
