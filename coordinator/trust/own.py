"""The coordinator's own certificates: it is a client of the broker and a server of HTTPS, and issues both to itself.

Each is one file with key and certificate, made anew at two thirds of its life or by a new authority; who uses it reads the
file again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509

from coordinator.trust.authority import DAY_S, Authority, coordinator_name
from protocol import keys
from protocol.errors import BadConfig

LIFE_S: Final = 90 * DAY_S
CLIENT_FILE: Final = "coordinator.pem"
HTTPS_FILE: Final = "https.pem"


def client_certificate(folder: Path, authority: Authority, fleet: str, now: float) -> bool:
    """Make sure that `coordinator.pem` holds for a while; whether it was made anew."""
    place, name = folder / CLIENT_FILE, coordinator_name(fleet)
    if _lasts(place, authority, now) and keys.common_name(_read(place)) == name:
        return False
    key = keys.new_key()
    made = authority.client(key.public_key(), name, now, LIFE_S)
    keys.write_private(place, authority.shown(key, made))
    return True


def https_certificate(folder: Path, authority: Authority, names: Sequence[str], now: float) -> bool:
    """The same for `https.pem`, under these names and this machine's own."""
    place = folder / HTTPS_FILE
    wanted = list(dict.fromkeys([*names, "localhost", "127.0.0.1", "::1"]))
    if _lasts(place, authority, now) and _names(_read(place)) == wanted:
        return False
    key = keys.new_key()
    made = authority.server(key.public_key(), wanted, now, LIFE_S)
    keys.write_private(place, authority.shown(key, made))
    return True


def _lasts(place: Path, authority: Authority, now: float) -> bool:
    try:
        found = _read(place)
    except BadConfig:
        return False
    return authority.is_own(found) and now < found.not_valid_after_utc.timestamp() - LIFE_S / 3


def _read(place: Path) -> x509.Certificate:
    return keys.load_certificate(keys.read(place), str(place))


def _names(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]
