"""The fleet's certificate authority: one self-signed certificate, and everything that is issued under it.

    authority (CN = fedpipe {fleet}, ECDSA P-256, path length 0)
      agents        CN = agent id, clientAuth           what the broker takes for the user name, so it names the topics
      coordinator   CN = coordinator.{fleet}, clientAuth   a dot can be in no agent's id, so no agent can be called that
      servers       CN = first name, serverAuth          the broker's, and the coordinator's own for HTTPS

A certificate for one side of TLS is none for the other: an agent cannot pose as the broker.  Nothing is taken over from a
request but its public key; the name is decided by whoever accepted it.  RFC 5280 throughout.

An authority may have a predecessor that is trusted as well: coordinator/trust/rotation.py.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol import keys
from protocol.errors import BadConfig

DAY_S: Final = 86_400.0
AUTHORITY_S: Final = 20 * 365 * DAY_S
SERVER_S: Final = 825 * DAY_S
"""Of a broker's certificate, which people put into place by hand."""
SKEW_S: Final = 3600.0
"""A certificate is valid from an hour ago on: clocks of servers differ."""
_LIST: Final = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----\n?", re.DOTALL)
SOON_S: Final = 365 * DAY_S
"""So long before its end an authority should be rotated: every agent must renew once before that."""
KEY_FILE: Final = "ca.key"
OLD_KEY_FILE: Final = "ca-old.key"
CERTIFICATE_FILE: Final = "ca.pem"


class Pair(NamedTuple):
    """A certificate and its key."""

    certificate: x509.Certificate
    key: keys.Key


class Authority:
    """Signs.  Knows nothing of who may have what.

    `pem` are the certificates that everybody must trust: its own, and its predecessor's while there is one; `link` is the
    predecessor's word for it, empty without one.
    """

    def __init__(self, own: Pair, predecessor: Pair | None = None) -> None:
        self.certificate, self._key = own
        self.predecessor = predecessor.certificate if predecessor else None
        self._trusted = [own, predecessor] if predecessor else [own]
        self.fingerprint = keys.certificate_digest(self.certificate)
        self.ends_at = self.certificate.not_valid_after_utc.timestamp()
        self.pem = "".join(keys.pem(one.certificate) for one in self._trusted)
        self.link = _link(predecessor, own) if predecessor else ""

    @classmethod
    def create(cls, folder: Path, fleet: str, now: float) -> Authority:
        """Make a new authority in `folder`, which it makes too.  Raises BadConfig when one is there or the folder cannot be written."""
        if (folder / CERTIFICATE_FILE).exists():
            raise BadConfig(
                f"{folder} holds an authority already: every agent depends on it; `ca rotate` makes the next, "
                "or move it away to begin anew"
            )
        try:
            keys.make_private_folder(folder)
        except OSError as error:
            raise BadConfig(f"{folder} cannot be made: {error.strerror}") from None
        made = new_pair(_name(f"fedpipe {fleet}"), now)
        keys.write_private(folder / KEY_FILE, keys.key_pem(made.key))
        keys.write_public(folder / CERTIFICATE_FILE, keys.pem(made.certificate).encode())
        return cls(made)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """The authority in `folder`; its key may also be systemd's credential `ca.key`.  Raises BadConfig."""
        file, place, old = folder / CERTIFICATE_FILE, private(folder, KEY_FILE), folder / OLD_KEY_FILE
        certificates = keys.load_certificates(keys.read(file), str(file))
        own = pair_of(certificates, place)
        if own is None:
            raise BadConfig(f"{place} is not the key of {file}: restore both from one copy")
        before = pair_of(certificates, old) if old.exists() else None
        # the same as our own: a rotation was cut short
        return cls(own, before if before and before.certificate != own.certificate else None)

    # ------------------------------------------------------------------------------------------------------- issuing

    def client(self, key: ec.EllipticCurvePublicKey, name: str, now: float, life_s: float) -> x509.Certificate:
        """A certificate for one who connects under `name`."""
        return self._issue(key, name, now, life_s, ExtendedKeyUsageOID.CLIENT_AUTH, [])

    def server(
        self, key: ec.EllipticCurvePublicKey, names: Iterable[str], now: float, life_s: float = SERVER_S
    ) -> x509.Certificate:
        """A certificate for one who listens under these DNS names and addresses.  Raises BadConfig for something else, or none."""
        alternatives = [_alternative(name) for name in names]
        if not alternatives:
            raise BadConfig("a server's certificate needs the names under which it is reached")
        return self._issue(key, str(alternatives[0].value), now, life_s, ExtendedKeyUsageOID.SERVER_AUTH, alternatives)

    def revocations(self, revoked: Mapping[int, float], now: float) -> bytes:
        """The list of revoked serial numbers, each with its instant, as PEM (RFC 5280, 5); one by each who is trusted.

        It never expires before the authority: a broker refuses everybody under a list that is out of date.
        """
        return b"".join(_list(one, revoked, now) for one in self._trusted)

    def has_listed(self, lists: bytes, serials: AbstractSet[int]) -> bool:
        """Whether there is a list by each who is trusted, and all these numbers in it.  Raises ValueError for what is no list."""
        found = [x509.load_pem_x509_crl(one) for one in _LIST.findall(lists)]
        return all(
            any(
                one.is_signature_valid(by.key.public_key()) and {entry.serial_number for entry in one} >= serials
                for one in found
            )
            for by in self._trusted
        )

    def is_own(self, certificate: x509.Certificate) -> bool:
        """Whether this authority issued it."""
        return keys.is_issued(certificate, [self.certificate])

    def is_trusted(self, certificate: x509.Certificate) -> bool:
        """Whether this authority or its predecessor issued it."""
        return keys.is_issued(certificate, [one.certificate for one in self._trusted])

    def shown(self, key: keys.Key, certificate: x509.Certificate) -> bytes:
        """Key, certificate and link in one file, as whoever uses them shows them to the other side."""
        return keys.key_pem(key) + (keys.pem(certificate) + self.link).encode()

    def _issue(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        now: float,
        life_s: float,
        purpose: x509.ObjectIdentifier,
        alternatives: list[x509.GeneralName],
    ) -> x509.Certificate:
        builder = (
            _builder(_name(name), self.certificate.subject, key, now, min(life_s, self.ends_at - now))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(_identifier(self._key), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def coordinator_name(fleet: str) -> str:
    """The common name of the fleet's coordinator: a dot can be in no agent's id."""
    return f"coordinator.{fleet}"[: keys.MAX_NAME]


def requested_key(csr: str) -> ec.EllipticCurvePublicKey:
    """The public key in a certificate request.  Raises BadConfig for one that is malformed, not signed by that key, or no P-256."""
    if len(csr) > keys.MAX_PEM_BYTES:
        raise BadConfig(f"a certificate request has at most {keys.MAX_PEM_BYTES} bytes")
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        is_wanted = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
        is_proven = is_wanted and request.is_signature_valid  # other kinds can cost a lot to verify
    except Exception as error:  # noqa: BLE001 - bytes of a stranger: the parser has many words for "no"
        raise BadConfig(f"the certificate request cannot be read: {error}"[:300]) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadConfig("the certificate request is for a key of another kind than ECDSA P-256")
    if not is_proven:
        raise BadConfig("the certificate request is not signed by its own key")
    return key


def private(folder: Path, name: str) -> Path:
    """Where a private key lies: systemd's credential of that name if there is one, else the folder."""
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent")) / name
    return credential if credential.exists() else folder / name


def new_pair(name: x509.Name, now: float) -> Pair:
    """A key and its self-signed certificate."""
    key = keys.new_key()
    return Pair(_authority(name, key.public_key(), now, AUTHORITY_S).sign(key, hashes.SHA256()), key)


def pair_of(certificates: Iterable[x509.Certificate], place: Path) -> Pair | None:
    """The key in `place` with the certificate of those that is for it.  Raises BadConfig."""
    key = keys.load_key(keys.read(place), str(place))
    digest = keys.public_digest(key.public_key())
    return next((Pair(one, key) for one in certificates if keys.certificate_digest(one) == digest), None)


def _link(by: Pair, to: Pair) -> str:
    begin, end = (
        to.certificate.not_valid_before_utc.timestamp() + SKEW_S,
        by.certificate.not_valid_after_utc.timestamp(),
    )
    if begin >= end:
        return ""  # it is over, and so is its word
    builder = _authority(by.certificate.subject, to.key.public_key(), begin, end - begin)
    return keys.pem(builder.add_extension(_identifier(by.key), critical=False).sign(by.key, hashes.SHA256()))


def _list(by: Pair, revoked: Mapping[int, float], now: float) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(by.certificate.subject)
        .last_update(_date(now - DAY_S + min(len(revoked), DAY_S - SKEW_S)))  # a broker takes the latest: to the second
        .next_update(by.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        .add_extension(_identifier(by.key), critical=False)
    )
    for serial, at in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_date(at)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(by.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _identifier(key: keys.Key) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _authority(name: x509.Name, key: ec.EllipticCurvePublicKey, now: float, life_s: float) -> x509.CertificateBuilder:
    """For an authority's key, by itself or by its predecessor: both have one name, so a path may be as long with a link."""
    return (
        _builder(name, name, key, now, life_s)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, life_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_date(now - min(SKEW_S, life_s)))
        .not_valid_after(_date(now + life_s))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[: keys.MAX_NAME])])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not name or not name.isascii() or any(c.isspace() or c in "/:@" for c in name):
        raise BadConfig(f"{name!r} is no DNS name and no address: write it without scheme and port")
    return x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _date(at: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(at), dt.UTC)
