"""Makes this server an agent: `fedpipe enrol URL --token T`.

1. The coordinator's authority is fetched and compared with the fingerprint in the token; from then on TLS is verified with it.
2. A key is made here and never leaves; a request for its certificate goes to the coordinator, with the token.
3. Accepted at once or once an operator says so; then identity and configuration are written, each file whole or not there.

Every step may be done again: a run that was interrupted goes on with the same key, and the coordinator gives the same answer.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import tomli_w

from agent.config import AgentConfig
from agent.identity import AUTHORITY_FILE, PEM_FILE, TRUST_FILE, Refused, TrustFile, check_issued, exchange
from protocol import enrolment, keys
from protocol.daemon import load_toml
from protocol.enrolment import Enrol, Enrolled, Token
from protocol.errors import BadConfig, Unavailable
from protocol.signing import follow

ENROLLING_FILE: Final = "enrolling.key"
FIRST_PAUSE_S: Final = 2.0
LONGEST_PAUSE_S: Final = 30.0


class Place(NamedTuple):
    """Where everything goes on this server."""

    config: Path
    state_dir: Path

    @property
    def identity(self) -> Path:
        """The folder of key, certificate and what is trusted."""
        return self.state_dir / "identity"


class Done(NamedTuple):
    """An enrolment that was accepted; `wrote_config` is false where a configuration was there already."""

    agent: str
    fleet: str
    broker_url: str
    config: str
    expires_at: float
    wrote_config: bool


def enrol(
    url: str, token: Token, agent: str, place: Place, tell: Callable[[str], None], wait_s: float, *, anew: bool = False
) -> Done:
    """Enrol this server; `tell` says what is waited for.  Raises Refused, Unavailable, BadConfig.

    `anew` replaces an identity that is there; without it that is an error.
    """
    if (place.identity / TRUST_FILE).exists() and not anew:
        raise BadConfig(f"{place.identity} holds an identity already: give --again to replace it")
    _check_config(place, agent)
    try:
        keys.make_private_folder(place.identity)
    except OSError as error:
        raise BadConfig(
            f"{place.identity} cannot be made: {error.strerror}; run this as root, or name another --state-dir"
        ) from None
    authority = authority_of(url, token)
    keys.write_public(place.identity / AUTHORITY_FILE, authority)
    context = ssl.create_default_context(cafile=str(place.identity / AUTHORITY_FILE))
    key = _key(place.identity / ENROLLING_FILE)
    asked = Enrol(token=str(token), csr=keys.request(key, agent), agent=agent)
    found = _accepted(url, asked, context, tell, wait_s, keys.public_digest(key.public_key()))
    _keep(url, found, key, place)
    (place.identity / ENROLLING_FILE).unlink(missing_ok=True)
    certificate = keys.load_certificate(found.certificate.encode(), "the answer")
    return Done(
        found.agent,
        found.fleet,
        found.broker_url,
        str(place.config),
        certificate.not_valid_after_utc.timestamp(),
        _write_config(place, found),
    )


def authority_of(url: str, token: Token) -> bytes:
    """The authority at `url`, if it is the one that the token names.  Raises Refused when it is another."""
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = (
        False,
        ssl.CERT_NONE,
    )  # what comes is compared with the fingerprint
    data = exchange(url, "GET", enrolment.AUTHORITY, None, unverified)
    for certificate in keys.load_certificates(data, f"the answer of {url}"):
        if keys.certificate_digest(certificate) == token.fingerprint:
            return keys.pem(certificate).encode()
    raise Refused(
        f"{url} is not the coordinator that made this token, or somebody is in between: nothing was sent to it; "
        "check the address, and ask for the token again over a way that you trust"
    )


def _accepted(
    url: str, asked: Enrol, context: ssl.SSLContext, tell: Callable[[str], None], wait_s: float, digest: str
) -> Enrolled:
    """Ask until somebody has decided."""
    end, pause_s = time.monotonic() + wait_s, FIRST_PAUSE_S
    while True:
        data = exchange(url, "POST", enrolment.ENROL, asked, context)
        try:
            found = msgspec.json.decode(data, type=Enrolled)
        except msgspec.MsgspecError as error:
            raise BadConfig(
                f"{url} does not answer as this version expects ({error}): install the coordinator's"
            ) from None
        if found.state == "accepted":
            return found
        if time.monotonic() + pause_s > end:
            raise Unavailable(
                f"{found.agent} waits to be accepted: say `fedpipe accept {found.agent}` where the coordinator is, "
                "then give this command again"
            )
        tell(
            f"{found.agent} waits to be accepted: compare its key, {digest[:16]}, with the one in `fedpipe enrolments`, "
            f"and say `fedpipe accept {found.agent}` where the coordinator is"
        )
        time.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)


def _key(place: Path) -> keys.Key:
    """The key of an enrolment that was interrupted, or a new one."""
    if not place.exists():
        keys.write_private(place, keys.key_pem(keys.new_key()))
    return keys.load_key(keys.read(place), str(place))


def _keep(url: str, found: Enrolled, key: keys.Key, place: Place) -> None:
    """Write the identity; trust.json comes last, and an identity is there once it is."""
    made, pinned = keys.load_certificate(found.certificate.encode(), "the answer"), place.identity / AUTHORITY_FILE
    named = keys.load_certificates(keys.read(pinned), str(pinned))
    authorities = check_issued(made, found, named, key, found.agent)
    chain = [(link.public, link.endorsement) for link in found.signing_keys]
    if not chain:
        raise BadConfig(f"{url} handed out no signing keys: install the same version on both sides")
    trust = TrustFile(
        agent=found.agent, fleet=found.fleet, coordinator=url, signing_keys=follow([chain[0][0]], chain[1:])
    )
    for old in ("heard.json", "next.key"):
        (place.identity / old).unlink(missing_ok=True)
    keys.write_public(pinned, authorities)
    keys.write_private(place.identity / PEM_FILE, keys.key_pem(key) + found.certificate.encode())
    keys.write_public(place.identity / TRUST_FILE, msgspec.json.encode(trust))


# -------------------------------------------------------------------------------------------------------- configuration


def _check_config(place: Place, agent: str) -> None:
    """A configuration that is there stays; it must be this agent's."""
    if not place.config.exists():
        if not os.access(_nearest(place.config.parent), os.W_OK):
            raise BadConfig(f"{place.config} cannot be written: run this as root, or name another --config")
        return
    known = load_toml(place.config, AgentConfig)
    if agent and known.agent != agent:
        raise BadConfig(
            f"{place.config} is of agent {known.agent}, not of {agent}: name another --config, or move it away"
        )
    if known.identity_dir != str(place.identity):
        raise BadConfig(f'{place.config} stays as it is; add to it, at the top: identity_dir = "{place.identity}"')


def _nearest(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _write_config(place: Place, found: Enrolled) -> bool:
    if place.config.exists():
        return False
    place.config.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "agent": found.agent,
        "fleet": found.fleet,
        "state_dir": str(place.state_dir),
        "identity_dir": str(place.identity),
        "broker": {"url": found.broker_url} | tls_files(place.identity, found.broker_url),
    }
    text = f"{HEAD}\n{tomli_w.dumps(settings)}\n{TAIL}"
    keys.write_public(place.config, text.encode())
    return True


def tls_files(identity: Path, broker_url: str) -> dict[str, str]:
    """The broker's settings that an identity gives."""
    if not broker_url.startswith("mqtts://"):
        return {}
    return {"ca_file": str(identity / AUTHORITY_FILE), "cert_file": str(identity / PEM_FILE)}


HEAD: Final = """\
# Written by `fedpipe enrol`.  Every other key with its default: docs/examples/agent.toml
# Check it:  fedpipe-agent check-config
# metrics = "127.0.0.1:9464"     # Prometheus may ask here"""
TAIL: Final = """\
# What may be trained on here; a job names it.
# [data.default]
# path = "/srv/data"

# Where base models are; a job names them by folder.
# [base]
# model_dirs = ["/srv/models"]
"""
