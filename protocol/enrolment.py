r"""How a server becomes an agent: what is said over HTTPS between `fedpipe enrol` (or an agent's renewal) and the coordinator.

    GET  /v1/authority                                        the authority's certificate, PEM; before it is retired, its predecessor's too
    POST /v1/enrol   Enrol{token, agent, csr}              -> Enrolled{state: accepted, certificate, ...} or {state: pending}
    POST /v1/renew   Renew{certificate, csr, signature}    -> Enrolled{state: accepted, certificate, ...}
    GET  /v1/keys                                             the chain of keys that sign messages

A join token is `fp1.ID.SECRET.FINGERPRINT`.  The first part names it, the second proves it, the third is the sha256 of the
authority's public key, so the very first connection can be verified: the authority's certificate is fetched unverified, compared
with the fingerprint, and only then is anything said, over TLS under that authority.  (As kubeadm does it; RFC 7469 for the digest.)

Every request may be repeated: the same token with the same key, or the same renewal, gets the same answer, so a lost answer costs
nothing.  A token that is used up by other keys is refused, and the answer names who used it.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from protocol.errors import BadConfig
from protocol.messages import Id

MAX_BODY_BYTES: Final = 64 * 1024
ENROL: Final = "/v1/enrol"
RENEW: Final = "/v1/renew"
KEYS: Final = "/v1/keys"
AUTHORITY: Final = "/v1/authority"

Pem = Annotated[str, Meta(max_length=16 * 1024)]


class Enrol(msgspec.Struct, frozen=True, kw_only=True):
    """A server asks to become an agent; `agent` may be empty when the token names one."""

    token: Annotated[str, Meta(max_length=400)]
    csr: Pem
    agent: Annotated[str, Meta(max_length=64)] = ""


class Renew(msgspec.Struct, frozen=True, kw_only=True):
    """An agent asks for a certificate for its next key; `signature` (hex) is by the key of the present one, over the request."""

    certificate: Pem
    csr: Pem
    signature: Annotated[str, Meta(pattern=r"^([0-9a-f]{2}){8,80}\Z")]


class SigningKey(msgspec.Struct, frozen=True, kw_only=True):
    """One key of the chain: 32 bytes in hex, and the signature of its predecessor over it (empty for the first)."""

    public: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    endorsement: Annotated[str, Meta(pattern=r"^([0-9a-f]{128})?\Z")] = ""


class Enrolled(msgspec.Struct, frozen=True, kw_only=True):
    """Where an enrolment stands; all but the first two fields are there once it is accepted."""

    agent: Id
    state: Literal["pending", "accepted"]
    fleet: Id = "main"
    broker_url: str = ""
    certificate: Pem = ""
    authority: Pem = ""
    signing_keys: list[SigningKey] = []


class Token(NamedTuple):
    """A join token, taken apart."""

    id: str
    secret: str
    fingerprint: str

    def __str__(self) -> str:
        return f"fp1.{self.id}.{self.secret}.{self.fingerprint}"


def new_token(fingerprint: str) -> Token:
    """A token that nobody can guess: 128 bits."""
    return Token(secrets.token_hex(4), secrets.token_hex(16), fingerprint)


def parse_token(text: str) -> Token:
    """Take a token apart.  Raises BadConfig, without repeating it."""
    parts = text.strip().split(".")
    if len(parts) != 4 or parts[0] != "fp1" or [len(p) for p in parts[1:]] != [8, 32, 64]:
        raise BadConfig("this is no join token: it begins with fp1. and is one word; make one with `fedpipe token`")
    return Token(*parts[1:])
