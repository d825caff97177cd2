"""What `fedpipe-coordinator ca` does: make the authority, show it, put the next in its place, sign with the next key from now on.

Each is a line of the audit log; the daemon may run meanwhile, and knows of it once it is started again.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from coordinator.audit import LOCAL, Act, Audit
from coordinator.config import CoordinatorConfig
from coordinator.trust import own, rotation, trust_folder
from coordinator.trust.authority import SOON_S, Authority
from coordinator.trust.keyring import Keyring
from coordinator.trust.office import create
from coordinator.trust.service import open_office
from protocol import keys
from protocol.errors import BadConfig, Unavailable


def authority(what: str, config: CoordinatorConfig) -> str:
    """The text for the operator.  Raises BadConfig, and Unavailable where it cannot be written to the audit log."""
    if what == "show":
        return _shown(config)
    with audited(config, f"ca {what}", config.fleet) as doing:
        return _done(what, config, doing)


@contextmanager
def audited(config: CoordinatorConfig, action: str, what: str) -> Iterator[Act]:
    """The block is an act of whoever is logged in here.  Raises Unavailable before it is begun."""
    try:
        keys.make_private_folder(Path(config.state_dir))
    except OSError as error:
        raise BadConfig(f"state_dir {config.state_dir} cannot be made: {error.strerror}") from None
    with Audit(Path(config.state_dir) / "audit.log", time.time).act(f"{LOCAL}:{_user()}", action, what) as doing:
        yield doing


def _user() -> str:
    with suppress(KeyError, OSError):
        return os.environ.get("SUDO_USER") or getpass.getuser()
    return str(os.getuid())


def _done(what: str, config: CoordinatorConfig, doing: Act) -> str:
    folder, now = trust_folder(config), time.time()
    match what:
        case "init":
            made = create(folder, config.fleet, now)
            doing.what = f"{config.fleet} {made.fingerprint}"
            return (
                f"The authority of fleet {config.fleet} is in {folder}; its fingerprint is {made.fingerprint}.\n"
                "Next: `fedpipe mosquitto-config --out DIR --host NAME`, then start the coordinator; "
                "keep a copy of the folder where nobody else can read it."
            )
        case "rotate":
            made = rotation.rotate(folder, now)
            doing.what = f"{config.fleet} {made.fingerprint}"
            return (
                f"The next authority of fleet {config.fleet} is in force once the coordinator is started again; "
                f"its fingerprint is {made.fingerprint}.\n"
                "Next: start it again; every agent learns of it with its next renewal, and `fedpipe-coordinator ca show` "
                "says who has yet to; then `fedpipe-coordinator ca retire`.  Make new join tokens; keep a copy of the folder."
            )
        case "retire":
            office = open_office(config)
            try:
                rotation.retire(office, now)
            finally:
                office.registry.close()
            return (
                "The authority before this one is no longer trusted.\n"
                "Next: start the coordinator again; a broker that reads its folder anew at SIGHUP then refuses what the old one issued."
            )
    ring = Keyring.load(folder).rotate()
    doing.what = f"{config.fleet} {ring.chain[-1].public}"
    return (
        f"Messages will be signed with key {ring.chain[-1].public[:16]} once the coordinator is started again; "
        "agents take the key before it as well, until the next rotation."
    )


def _shown(config: CoordinatorConfig) -> str:
    folder, now = trust_folder(config), time.time()
    known, ring = Authority.load(folder), Keyring.load(folder)
    soon = "; it is time for `fedpipe-coordinator ca rotate`" if known.ends_at - now < SOON_S else ""
    lines = [f"authority    {known.fingerprint}", f"valid until  {_day(known.ends_at)}{soon}"]
    if known.predecessor:
        left = _lagging(config, now)
        behind = f"agents that have yet to renew: {', '.join(left)}" if left else "every agent has renewed: `ca retire`"
        lines.append(f"predecessor  {keys.certificate_digest(known.predecessor)}, trusted yet; {behind}")
    for name, file in (("client", own.CLIENT_FILE), ("https", own.HTTPS_FILE)):
        with suppress(BadConfig):
            ends = keys.load_certificate(keys.read(folder / file), file).not_valid_after_utc.timestamp()
            lines.append(f"{name:<12} until {_day(ends)}, renewed by itself")
    return "\n".join([*lines, f"signing key  {ring.chain[-1].public}", f"folder       {folder}"])


def _lagging(config: CoordinatorConfig, now: float) -> list[str]:
    office = open_office(config)
    try:
        return rotation.lagging(office, now)
    except Unavailable:
        return []
    finally:
        office.registry.close()


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()
