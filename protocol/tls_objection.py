"""Why a TLS server closed the door on our certificate: it says so in an alert, which the MQTT client's hurry to write loses.

Under TLS 1.3 (RFC 8446, 6.2) a server judges the client's certificate after the client took the handshake for finished.  A client that
writes at once then often sees only a broken connection.  So, when a connection ended without a welcome, one more is opened that
says nothing and listens for the reason.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final, NamedTuple

from protocol.bus import Address, Refusal

PATIENCE_S: Final = 3.0

_CURES: Final = {
    "CERTIFICATE_REVOKED": "our certificate is revoked: ask the coordinator's operator for a new token, then `fedpipe enrol --again`",
    "CERTIFICATE_EXPIRED": "our certificate has expired: `fedpipe enrol --again` with a new token, and see why it was not "
    "renewed (renewal_failed in the log)",
    "UNKNOWN_CA": "it does not know the authority of our certificate: was this server enrolled with another fleet?",
    "CERTIFICATE_REQUIRED": "it asks for a client certificate: `fedpipe enrol` this server, or set broker.cert_file",
    "UNSUPPORTED_CERTIFICATE": "our certificate is not one for clients: `fedpipe enrol` makes one, or correct broker.cert_file",
    "BAD_CERTIFICATE": "our certificate is not acceptable to it: correct broker.cert_file",
}


class Objection(NamedTuple):
    """What a server holds against our certificate, in words and as a kind; both empty when it says nothing."""

    text: str = ""
    refusal: Refusal = ""


async def objection(address: Address, context: ssl.SSLContext) -> Objection:
    """What the server holds against our certificate.  Takes PATIENCE_S at most, mostly less."""
    try:
        return await asyncio.to_thread(_ask, address, context)
    except OSError:
        return Objection()


def _ask(address: Address, context: ssl.SSLContext) -> Objection:
    try:
        with (
            socket.create_connection((address.host, address.port), PATIENCE_S) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as link,
        ):
            link.recv(1)
    except ssl.SSLError as error:
        for alert, text in _CURES.items():
            if alert in (error.reason or ""):
                refusal: Refusal = "revoked" if alert == "CERTIFICATE_REVOKED" else "credentials"
                return Objection(f"the broker at {address} refuses us: {text}", refusal)
    return Objection()
