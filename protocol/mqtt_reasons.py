"""Why there is no connection, in words that say what to do next.  Everything the operator reads about the broker is here."""

from __future__ import annotations

import socket
import ssl
from typing import Final, Literal

from protocol.bus import Address

BAD_PASSWORD: Final = 134
NOT_AUTHORIZED: Final = 135
TAKEN_OVER: Final = 142

_REFUSALS: Final = {
    132: "it does not speak this MQTT version: set broker.protocol to auto or 3.1.1",
    133: "it does not accept this client id",
    134: "wrong user name or password: check broker.username and broker.password_file",
    NOT_AUTHORIZED: "not authorized: check the user name and password (broker.username, broker.password_file) or the client "
    "certificate, and the broker's access control",
    136: "it is not available now",
    137: "it is busy",
    138: "this client is banned: ask the broker's operator",
    149: "our will is larger than it accepts",
    151: "a quota is used up: ask the broker's operator",
    154: "it does not support retained messages, which fedpipe needs",
    155: "it does not support QoS 1, which fedpipe needs",
    159: "too many connections at once",
}
_PARTINGS: Final = {
    130: "protocol error, or a message above its size limit: lower broker.chunk_bytes or raise its message_size_limit",
    NOT_AUTHORIZED: "not authorized: check its access control for this client",
    139: "it is shutting down",
    141: "it heard nothing from us during the keepalive",
    TAKEN_OVER: "another client connected with the same client id: every agent needs its own, look for a copied configuration",
    147: "more unacknowledged messages than its Receive Maximum",
    149: "a packet was too large: lower broker.chunk_bytes or raise its max_packet_size",
    150: "message rate too high",
    151: "a quota is used up: ask the broker's operator",
    152: "its operator closed the connection",
}


def refusal(code: int, name: str, address: Address) -> str:
    """The broker answered CONNECT with reason `code`, which MQTT calls `name`."""
    return f"the broker at {address} refuses us: {_REFUSALS.get(code, name)}"


def parting(code: int, name: str, address: Address) -> str:
    """The broker closed an MQTT 5 connection with a DISCONNECT of reason `code`."""
    return f"the broker at {address} disconnected us: {_PARTINGS.get(code, name)}"


def denial(access: Literal["read", "write"], topic: str, code: int, address: Address) -> str:
    """The broker refused a PUBLISH or SUBSCRIBE, with the line for mosquitto's acl_file that would allow it."""
    levels = topic.split("/")
    ours = next((i for i, level in enumerate(levels) if level in {"up", "down", "c"}), len(levels) - 1)
    wanted = topic if ours == len(levels) - 1 else "/".join([*levels[: ours + 1], "#"])
    done = "our message to" if access == "write" else "us the topic"
    return f"the broker at {address} denies {done} {topic} (code {code}): allow it, as in `topic {access} {wanted}`"


def broken(address: Address, *, welcomed: bool, detail: str) -> str:
    """The connection ended without a word; `detail` is what the socket said, if anything."""
    ending = f" ({detail})" if detail else ""
    if welcomed:
        return f"the connection to the broker at {address} was lost{ending}"
    if address.tls:
        advice = "if it asks for client certificates, set broker.cert_file and broker.key_file"
    else:
        advice = "if it speaks TLS there, write mqtts:// in broker.url; or its max_connections are reached"
    return f"the broker at {address} closed the connection without a welcome{ending}: {advice}"


def unsteady(reason: str, client_id: str) -> str:
    """Connections are welcomed and do not last; the commonest cause is one that older brokers do not tell."""
    return f"{reason}; it happens again and again: does another process carry the id {client_id}, from a copied configuration?"


def silent(address: Address, waited_s: float) -> str:
    """The broker is connected but does not answer."""
    return f"the broker at {address} gave no answer for {waited_s:.0f} s"


def obstacle(error: BaseException | None, address: Address) -> str:
    """The way to the broker is blocked: `error` is what the operating system or TLS said."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"the certificate of {address} is not trusted ({error.verify_message}): set broker.ca_file to its authority"
        case socket.gaierror():
            return f"the name {address.host!r} does not resolve ({error.strerror}): check broker.url and DNS"
        case ConnectionResetError() | ssl.SSLError() if address.tls:
            return (
                f"no TLS with {address} ({error}): is that its TLS port?  For a plain one write mqtt:// in broker.url"
            )
        case ConnectionResetError():  # it may come before or after the socket calls itself connected
            return broken(address, welcomed=False, detail=str(error))
        case ConnectionRefusedError():
            return f"nothing listens at {address}: start the broker or correct broker.url"
        case TimeoutError():
            return f"no answer from {address}: check the address, the network and its firewalls"
        case _:
            return f"cannot reach {address}: {error or 'unknown error'}"
