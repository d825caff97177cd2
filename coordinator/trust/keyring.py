"""The keys that sign what the coordinator says: the present one, and the chain that leads to it.

Each key is endorsed by its predecessor, so an agent that pinned one can follow to the present one, whoever hands it the chain; it
holds the newest two for valid.  Only the present private key is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.trust.authority import private
from protocol import keys
from protocol.enrolment import SigningKey
from protocol.errors import BadConfig
from protocol.signing import Signer, endorse, public_hex

KEY_FILE: Final = "signing.key"
CHAIN_FILE: Final = "signing-keys.json"


class Keyring:
    """The chain, and the private key of its last link."""

    def __init__(self, folder: Path, key: Ed25519PrivateKey, chain: list[SigningKey]) -> None:
        self._folder, self._key, self.chain = folder, key, chain
        self.sign = Signer(key)

    @classmethod
    def create(cls, folder: Path) -> Keyring:
        """The first key of a new fleet."""
        key = Ed25519PrivateKey.generate()
        ring = cls(folder, key, [SigningKey(public=public_hex(key))])
        ring._save()
        return ring

    @classmethod
    def load(cls, folder: Path) -> Keyring:
        """The keys in `folder`; the private one may also be systemd's credential `signing.key`.  Raises BadConfig."""
        place, file = private(folder, KEY_FILE), folder / CHAIN_FILE
        key = keys.load_signing_key(keys.read(place), str(place))
        try:
            chain = msgspec.json.decode(keys.read(file), type=list[SigningKey])
        except msgspec.MsgspecError as error:
            raise BadConfig(f"{file}: {error}: restore it from a copy") from None
        if public_hex(key) not in [link.public for link in chain[-2:]]:
            raise BadConfig(f"{place} is not the key that {file} ends with: restore both from one copy")
        return cls(folder, key, chain)

    def rotate(self) -> Keyring:
        """The same with one more key.  A crash between the two files leaves the present key in use, and valid."""
        key = Ed25519PrivateKey.generate()
        at = [link.public for link in self.chain].index(public_hex(self._key))
        link = SigningKey(public=public_hex(key), endorsement=endorse(self._key, public_hex(key)))
        ring = Keyring(self._folder, key, [*self.chain[: at + 1], link])
        ring._save()
        return ring

    def _save(self) -> None:
        keys.write_public(self._folder / CHAIN_FILE, msgspec.json.encode(self.chain))
        keys.write_private(self._folder / KEY_FILE, keys.key_pem(self._key))
