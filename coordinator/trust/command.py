"""What `fedpipe-coordinator ca` does: make the authority, show it, sign with the next key from now on."""

from __future__ import annotations

import time

from coordinator.config import CoordinatorConfig
from coordinator.trust import trust_folder
from coordinator.trust.authority import Authority
from coordinator.trust.keyring import Keyring
from coordinator.trust.office import create


def authority(what: str, config: CoordinatorConfig) -> str:
    """The text for the operator.  Raises BadConfig."""
    folder = trust_folder(config)
    match what:
        case "init":
            made = create(folder, config.fleet, time.time())
            return (
                f"The authority of fleet {config.fleet} is in {folder}; its fingerprint is {made.fingerprint}.\n"
                "Next: `fedpipe mosquitto-config --out DIR --host NAME`, then start the coordinator; "
                "keep a copy of the folder where nobody else can read it."
            )
        case "rotate-signing-key":
            ring = Keyring.load(folder).rotate()
            return (
                f"Messages will be signed with key {ring.chain[-1].public[:16]} once the coordinator is started again; "
                "agents take the key before it as well, until the next rotation."
            )
    known, ring = Authority.load(folder), Keyring.load(folder)
    until = known.certificate.not_valid_after_utc.date().isoformat()
    return f"authority   {known.fingerprint}\nvalid until {until}\nsigning key {ring.chain[-1].public}\nfolder      {folder}"
