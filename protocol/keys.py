"""Private keys, requests for certificates and certificates, as PEM on disk and as values.

Keys for TLS are ECDSA on P-256 (RFC 5480), keys that sign messages are Ed25519 (RFC 8032); all arithmetic is the cryptography
package's.  A private key is written only by `write_private`: readable by its owner alone before the first byte is in it, whole or
not there, and owned by whoever owns its folder, so that root may prepare what a daemon of less rights then uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from protocol.errors import BadConfig
from protocol.files import give_to_folder, replacing

MAX_PEM_BYTES: Final = 16 * 1024
"""A request or a certificate above this is refused before it is parsed."""
MAX_NAME: Final = 64
"""Characters of a common name (RFC 5280, ub-common-name): an agent's id just fits."""
_RENEWAL: Final = b"fedpipe certificate renewal 1\0"

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    """A fresh key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key | ed25519.Ed25519PrivateKey) -> bytes:
    """PKCS 8, not encrypted: the file's mode guards it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(data: bytes, where: str) -> Key:
    """The first private key in `data`.  Raises BadConfig that names `where` when there is none for TLS."""
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise BadConfig(f"{where} holds no private key that can be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadConfig(f"{where} holds a key of another kind than ECDSA P-256")
    return key


def load_signing_key(data: bytes, where: str) -> ed25519.Ed25519PrivateKey:
    """An Ed25519 private key.  Raises BadConfig that names `where`."""
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:
        raise BadConfig(f"{where} holds no private key that can be read: {error}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise BadConfig(f"{where} holds a key of another kind than Ed25519")
    return key


def request(key: Key, name: str) -> str:
    """A certificate request (PKCS 10), signed by `key`; whoever issues decides about the name."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:MAX_NAME] or "unnamed")])
    built = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return built.public_bytes(serialization.Encoding.PEM).decode()


def load_certificate(data: bytes, where: str) -> x509.Certificate:
    """The first certificate in `data`.  Raises BadConfig that names `where`."""
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise BadConfig(f"{where} holds no certificate that can be read: {error}") from None


def load_certificates(data: bytes, where: str) -> list[x509.Certificate]:
    """Every certificate in `data`, at least one.  Raises BadConfig that names `where`."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise BadConfig(f"{where} holds no certificates that can be read: {error}") from None


def follow_authorities(
    pinned: Sequence[x509.Certificate], offered: Iterable[x509.Certificate]
) -> list[x509.Certificate]:
    """The authorities to trust from now on: those in `offered` that are pinned, or for which a pinned one vouches.

    It vouches with a certificate that it issued for the other's key (RFC 4210, 4.4.1, "new with old"), so whoever hands them
    over need not be trusted.  Empty when nothing follows.  Raises BadConfig for a key that fedpipe does not use.
    """
    found = list(offered)
    known = {certificate_digest(one) for one in pinned}
    known |= {certificate_digest(one) for one in found if _is_authority(one) and is_issued(one, pinned)}
    return [one for one in found if is_issued(one, [one]) and certificate_digest(one) in known]


def is_issued(certificate: x509.Certificate, authorities: Iterable[x509.Certificate]) -> bool:
    """Whether one of these authorities signed it."""
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except Exception:  # noqa: BLE001, S112 - bytes of a stranger: whatever is wrong with it, it is not by this one
            continue
        return True
    return False


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def pem(certificate: x509.Certificate) -> str:
    """As text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def common_name(certificate: x509.Certificate) -> str:
    """The one common name of its subject; empty when there is none, or more than one."""
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if len(found) == 1 else ""


def public_digest(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> str:
    """sha256 of the public key (SubjectPublicKeyInfo, DER), in hex: the identity of a key, also of an authority's (as in RFC 7469)."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def certificate_digest(certificate: x509.Certificate) -> str:
    """`public_digest` of the key that it certifies.  Raises BadConfig for a key that fedpipe does not use."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise BadConfig("the certificate is for a key of another kind than ECDSA P-256")
    return public_digest(key)


def sign_renewal(present: Key, csr: str) -> bytes:
    """The present key asks for a certificate for the key in `csr`."""
    return present.sign(_RENEWAL + csr.encode(), ec.ECDSA(hashes.SHA256()))


def is_renewal(present: x509.Certificate, csr: str, signature: bytes) -> bool:
    """Whether the holder of `present` asked for this."""
    key = present.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, _RENEWAL + csr.encode(), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def make_private_folder(folder: Path) -> None:
    """A folder that its owner alone may enter; one that root makes in a daemon's folder is the daemon's.  Raises OSError."""
    if folder.exists():
        return
    folder.mkdir(mode=0o700, parents=True)
    give_to_folder(folder)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that its owner alone may read."""
    _write(path, data, 0o600)


def write_public(path: Path, data: bytes) -> None:
    """Write a file that everybody may read."""
    _write(path, data, 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        with replacing(path) as file:
            os.fchmod(file.fileno(), mode)
            give_to_folder(Path(file.name))
            file.write(data)
    except OSError as error:
        raise BadConfig(f"{path} cannot be written: {error.strerror or error}; name a folder of yours") from None


def read(path: Path) -> bytes:
    """The content of a file.  Raises BadConfig that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror or error}") from None
