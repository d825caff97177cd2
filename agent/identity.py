"""Who this server is, and whose word it takes: its key and certificate, the fleet's authority, the coordinator's signing keys.

    identity/agent.pem      private key and certificate; the broker takes its common name for the agent's id
    identity/next.key       the key of a renewal under way; a restart goes on with it
    identity/ca.pem         the fleet's authority, and the one before it while both are trusted
    identity/trust.json     who we are, where the coordinator is, which keys its messages are signed with
    identity/heard.json     how far its orders had come, so that an old one is not taken again

`fedpipe enrol` makes the folder.  At two thirds of its life a certificate is renewed: a new key, a request for it signed by the
present key, over HTTPS under the pinned authority.  The present certificate stays in force until the new one is in its place, in one
rename; a lost answer or a crash at any point leads to the same request, and that to the same certificate.
"""

from __future__ import annotations

import http.client
import json
import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import msgspec
from cryptography import x509

from protocol import enrolment, keys
from protocol.enrolment import Enrolled, Renew, SigningKey
from protocol.errors import BadConfig, OutsideFault, Unavailable
from protocol.files import replacing
from protocol.messages import Id
from protocol.signing import Mark, Verifier, follow

PEM_FILE: Final = "agent.pem"
NEXT_FILE: Final = "next.key"
AUTHORITY_FILE: Final = "ca.pem"
TRUST_FILE: Final = "trust.json"
HEARD_FILE: Final = "heard.json"
TIMEOUT_S: Final = 20.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


class TrustFile(msgspec.Struct, frozen=True, kw_only=True):
    """What was handed out at the enrolment.  `signing_keys` are pinned: they change only along their own chain."""

    agent: Id
    fleet: Id
    coordinator: str
    signing_keys: list[str]


class Refused(OutsideFault):
    """The coordinator answered, and said no."""


class Identity:
    """One agent's identity in `folder`.  Raises BadConfig for one that is not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / TRUST_FILE).exists():
            raise BadConfig(f"{folder} holds no identity: run `fedpipe enrol` on this server")
        self.trust: TrustFile = _decoded(keys.read(folder / TRUST_FILE), TrustFile, folder / TRUST_FILE)
        self.certificate = self._load()
        self.verifier = Verifier(self.trust.signing_keys, self._heard(), self._keep_marks)

    @property
    def agent(self) -> str:
        """The id under which this server was enrolled."""
        return self.trust.agent

    @property
    def renew_at(self) -> float:
        """Two thirds into the certificate's life (seconds since the epoch)."""
        begin, end = self.certificate.not_valid_before_utc.timestamp(), self.expires_at
        return begin + (end - begin) * 2 / 3

    @property
    def expires_at(self) -> float:
        """When the certificate ends (seconds since the epoch)."""
        return self.certificate.not_valid_after_utc.timestamp()

    # ------------------------------------------------------------------------------------------------------- renewal

    def renew(self) -> None:
        """Get the next certificate and put it into place.  Blocks for two requests.  Raises Refused, Unavailable, BadConfig."""
        self.certificate = self._load()
        place = self.folder / NEXT_FILE
        present = keys.load_key(keys.read(self.folder / PEM_FILE), str(self.folder / PEM_FILE))
        following = keys.load_key(keys.read(place), str(place)) if place.exists() else present
        if _same(following, present):  # none is under way, or the last one died before its end
            following = keys.new_key()
            keys.write_private(place, keys.key_pem(following))
        csr = keys.request(following, self.agent)
        asked = Renew(certificate=keys.pem(self.certificate), csr=csr, signature=keys.sign_renewal(present, csr).hex())
        answer = self._post(enrolment.RENEW, asked)
        self._take(answer, following)
        place.unlink()
        self._follow(answer.signing_keys)

    def refresh_keys(self) -> bool:
        """Ask for the signing keys; whether there are others now.  Blocks.  Raises Unavailable."""
        data = exchange(self.trust.coordinator, "GET", enrolment.KEYS, None, self._context())
        return self._follow(_decoded(data, list[SigningKey], enrolment.KEYS))

    def _follow(self, chain: list[SigningKey]) -> bool:
        pinned = self.trust.signing_keys
        found = follow(pinned, [(link.public, link.endorsement) for link in chain])
        if found == pinned:
            return False
        self.trust = msgspec.structs.replace(self.trust, signing_keys=found)
        keys.write_public(self.folder / TRUST_FILE, msgspec.json.encode(self.trust))
        self.verifier.pin(found)
        return True

    def _take(self, answer: Enrolled, key: keys.Key) -> None:
        """Put a certificate into force, if it is what we asked for, and trust the authorities that follow from the present."""
        made, place = keys.load_certificate(answer.certificate.encode(), "the answer"), self.folder / AUTHORITY_FILE
        authorities = check_issued(made, answer, keys.load_certificates(keys.read(place), str(place)), key, self.agent)
        keys.write_public(place, authorities)  # first: they verify the old certificate's peers as well
        keys.write_private(self.folder / PEM_FILE, keys.key_pem(key) + answer.certificate.encode())
        self.certificate = made

    def _post(self, path: str, asked: object) -> Enrolled:
        data = exchange(self.trust.coordinator, "POST", path, asked, self._context())
        return _decoded(data, Enrolled, path)

    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / AUTHORITY_FILE))

    # --------------------------------------------------------------------------------------------------------- files

    def _load(self) -> x509.Certificate:
        place = self.folder / PEM_FILE
        data = keys.read(place)
        certificate = keys.load_certificate(data, str(place))
        if keys.certificate_digest(certificate) != keys.public_digest(keys.load_key(data, str(place)).public_key()):
            raise BadConfig(f"{place}: key and certificate are not of one pair: enrol again")
        if keys.common_name(certificate) != self.agent:
            raise BadConfig(f"{place} is not the certificate of {self.agent}: enrol again")
        return certificate

    def _heard(self) -> dict[str, Mark]:
        """A file that is lost or damaged costs the memory of the orders so far, and nothing else."""
        try:
            return msgspec.json.decode((self.folder / HEARD_FILE).read_bytes(), type=dict[str, Mark])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("%s cannot be read: %s", HEARD_FILE, error, extra={"action": "identity_file"})
            return {}

    def _keep_marks(self, marks: dict[str, Mark]) -> None:
        try:
            with replacing(self.folder / HEARD_FILE) as file:
                file.write(msgspec.json.encode(marks))
        except OSError as error:
            logger.warning("%s cannot be written: %s", HEARD_FILE, error, extra={"action": "identity_file"})


def _same(one: keys.Key, other: keys.Key) -> bool:
    return keys.public_digest(one.public_key()) == keys.public_digest(other.public_key())


def check_issued(
    made: x509.Certificate, answer: Enrolled, pinned: Sequence[x509.Certificate], key: keys.Key, agent: str
) -> bytes:
    """The authorities to trust from now on, as PEM, if the certificate is for our key and name, and by one of them.

    Raises Refused: whoever answered is not our coordinator.
    """
    authorities = keys.follow_authorities(pinned, keys.load_certificates(answer.authority.encode(), "the answer"))
    if not keys.is_issued(made, authorities):
        raise Refused("the answer holds a certificate of another authority than the fleet's")
    if keys.certificate_digest(made) != keys.public_digest(key.public_key()) or keys.common_name(made) != agent:
        raise Refused("the answer holds a certificate for another key or name than ours")
    return "".join(map(keys.pem, authorities)).encode()


def exchange(url: str, method: str, path: str, asked: object | None, context: ssl.SSLContext) -> bytes:
    """One request over HTTPS.  Raises Unavailable when there is no answer, Refused (with the coordinator's text) when it is no."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise BadConfig(f"{url!r} is no address of a coordinator: write https://host:8443")
    body = msgspec.json.encode(asked) if asked is not None else None
    connection = http.client.HTTPSConnection(parts.hostname, parts.port or 8443, timeout=TIMEOUT_S, context=context)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read(enrolment.MAX_BODY_BYTES * 4)
    except ssl.SSLCertVerificationError as error:
        raise Unavailable(f"{url}: its certificate does not hold ({error.verify_message}): {_advice(error)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"no coordinator answers at {url} ({error}): check the address and the firewall") from None
    finally:
        connection.close()
    if response.status >= 300:
        raise _refusal(url, response.status, data)
    return data


def _advice(error: ssl.SSLCertVerificationError) -> str:
    if "mismatch" in error.verify_message:
        return "use a name that is in trust.names of the coordinator"
    return "it is not of the authority that the token (or the enrolment) names"


def _refusal(url: str, status: int, data: bytes) -> OutsideFault:
    try:
        text = str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"{url} answers {status}, but not as a coordinator: check the address and the port")
    return Unavailable(text) if status >= 500 or status == 429 else Refused(text)


def _decoded(data: bytes, kind: type[T] | Any, where: object) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise BadConfig(f"{where} cannot be read ({error}): is fedpipe of the same version on both sides?") from None
