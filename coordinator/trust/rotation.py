"""From one authority to the next, while every agent stays: both are trusted until each agent has renewed (RFC 4210, 4.4).

rotate    a new authority of the same name with a new key; the one before it, its predecessor, signs a link: a
          certificate for the new key.  What is issued from now on is shown with the link, so who knows the predecessor
          alone can verify it from the first moment, and learns of the new one with its next renewal
retire    the predecessor is dropped, once no agent depends on it

ca.pem       the authority, then its predecessor while there is one     ca.key   the authority's key
ca-old.key   the predecessor's: for the link, and for revocations of what it issued
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from coordinator.trust.authority import CERTIFICATE_FILE, KEY_FILE, OLD_KEY_FILE, Authority, new_pair, pair_of
from coordinator.trust.office import Office
from protocol import keys
from protocol.errors import BadConfig

N_NAMED: Final = 5


def rotate(folder: Path, now: float) -> Authority:
    """Make the next authority.  Raises BadConfig while the present one has a predecessor itself.

    A crash in between leaves the present one in force: ca.key decides which certificate is the authority's, and is written last.
    """
    present, place = Authority.load(folder), folder / KEY_FILE
    if present.predecessor:
        raise BadConfig("the authority before this one is trusted yet: `fedpipe-coordinator ca retire` first")
    own = pair_of([present.certificate], place) if place.exists() else None
    if own is None:
        raise BadConfig(f"{place} is kept elsewhere: put it there, rotate, and move the new one to where it was")
    following = new_pair(present.certificate.subject, now)
    made = Authority(following, own)
    keys.write_private(folder / OLD_KEY_FILE, keys.read(place))
    keys.write_public(folder / CERTIFICATE_FILE, made.pem.encode())
    keys.write_private(place, keys.key_pem(following.key))
    return made


def retire(office: Office, now: float) -> None:
    """Drop the predecessor: what it issued is worth nothing from now on.  Raises BadConfig while an agent has nothing else."""
    authority, folder = office.authority, office.folder
    if authority.predecessor is None:
        raise BadConfig("there is no authority before this one: nothing is to be retired")
    if left := lagging(office, now):
        named = ", ".join(left[:N_NAMED]) + (f" and {len(left) - N_NAMED} more" if left[N_NAMED:] else "")
        raise BadConfig(
            f"{named} would be shut out: wait until they have renewed (at two thirds of a certificate's life), "
            "or revoke those that do not come back"
        )
    keys.write_public(folder / CERTIFICATE_FILE, keys.pem(authority.certificate).encode())
    (folder / OLD_KEY_FILE).unlink()


def lagging(office: Office, now: float) -> list[str]:
    """Agents whose newest valid certificate is by the predecessor, by name.  Cost: one signature checked per agent."""
    newest = office.registry.newest_certificates(now)
    return [
        one.agent
        for one in newest
        if not office.authority.is_own(keys.load_certificate(one.pem.encode(), f"the certificate of {one.agent}"))
    ]
