"""The fleet's certificate authority: one self-signed certificate, and everything that is issued under it.

    authority (CN = fedpipe {fleet}, ECDSA P-256, path length 0)
      agents        CN = agent id, clientAuth           what the broker takes for the user name, so it names the topics
      coordinator   CN = coordinator.{fleet}, clientAuth   a dot can be in no agent's id, so no agent can be called that
      servers       CN = first name, serverAuth          the broker's, and the coordinator's own for HTTPS

A certificate for one side of TLS is none for the other: an agent cannot pose as the broker.  Nothing is taken over from a
request but its public key; the name is decided by whoever accepted it.  RFC 5280 throughout.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

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
KEY_FILE: Final = "ca.key"
CERTIFICATE_FILE: Final = "ca.pem"


class Authority:
    """Signs.  Knows nothing of who may have what."""

    def __init__(self, certificate: x509.Certificate, key: keys.Key) -> None:
        self.certificate, self._key = certificate, key
        self.pem = keys.pem(certificate)
        self.fingerprint = keys.certificate_digest(certificate)

    @classmethod
    def create(cls, folder: Path, fleet: str, now: float) -> Authority:
        """Make a new authority in `folder`, which it makes too.  Raises BadConfig when one is there or the folder cannot be written."""
        if (folder / CERTIFICATE_FILE).exists():
            raise BadConfig(
                f"{folder} holds an authority already: every agent depends on it; move it away to begin anew"
            )
        try:
            keys.make_private_folder(folder)
        except OSError as error:
            raise BadConfig(f"{folder} cannot be made: {error.strerror}") from None
        key, name = keys.new_key(), _name(f"fedpipe {fleet}")
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key.public_key(), now, AUTHORITY_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        keys.write_private(folder / KEY_FILE, keys.key_pem(key))
        keys.write_public(folder / CERTIFICATE_FILE, keys.pem(certificate).encode())
        return cls(certificate, key)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """The authority in `folder`; its key may also be systemd's credential `ca.key`.  Raises BadConfig."""
        certificate = keys.load_certificate(keys.read(folder / CERTIFICATE_FILE), str(folder / CERTIFICATE_FILE))
        place = private(folder, KEY_FILE)
        authority = cls(certificate, keys.load_key(keys.read(place), str(place)))
        if keys.public_digest(authority._key.public_key()) != authority.fingerprint:
            raise BadConfig(f"{place} is not the key of {folder / CERTIFICATE_FILE}: restore both from one copy")
        return authority

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
        """The list of revoked serial numbers, each with its instant, as PEM (RFC 5280, 5).

        It never expires before the authority: a broker refuses everybody under a list that is out of date.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(_date(now - SKEW_S))
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        )
        for serial, at in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_date(at)).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def is_own(self, certificate: x509.Certificate) -> bool:
        """Whether this authority issued it."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it is not ours
            return False
        return True

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
            _builder(_name(name), self.certificate.subject, key, now, life_s)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
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
        key, is_proven = request.public_key(), request.is_signature_valid
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
