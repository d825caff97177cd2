"""What mosquitto must know of the fleet: its configuration, who may say what where, and whose certificate is revoked.

    mosquitto.conf   one TLS listener; the certificate's common name is the user name and the client id     written once
    acl              an agent writes below its own up/, reads below its own down/ and what the coordinator says to all
    crl.pem          revoked certificates: they cannot connect again
    server.pem       the broker's key and certificate; ca.pem the authorities'

Measured with mosquitto 2.0.11: SIGHUP reads acl, ca.pem, crl.pem and server.pem anew.  A revoked certificate then cannot connect, but a
connection that is there stays and goes on; a `deny` in the acl silences it from that moment, both ways.  So a revocation writes both.
`use_username_as_clientid` keeps an agent from throwing out another by taking its client id.
"""

from __future__ import annotations

import contextlib
import grp
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509

from coordinator.trust.authority import SERVER_S, Authority, coordinator_name
from coordinator.trust.office import Office
from coordinator.trust.registry import Standing
from protocol import keys
from protocol.errors import BadConfig
from protocol.topics import Topics

PORT: Final = 8883
SERVER_FILE: Final = "server.pem"
GROUP: Final = "mosquitto"


def configuration(folder: Path, port: int) -> str:
    """The text of mosquitto.conf for the files in `folder`; it may also lie in another's include_dir."""
    return f"""\
# Written by `fedpipe mosquitto-config`; the files that it names are kept up to date by the coordinator (trust.broker_dir).
# After a change of any of them: systemctl reload mosquitto (SIGHUP).
per_listener_settings false
allow_anonymous false
acl_file {folder}/acl

listener {port}
cafile {folder}/ca.pem
certfile {folder}/{SERVER_FILE}
keyfile {folder}/{SERVER_FILE}
crlfile {folder}/crl.pem
tls_version tlsv1.2
require_certificate true
# the common name of the certificate is who one is; nobody can take another's client id
use_identity_as_username true
use_username_as_clientid true

set_tcp_nodelay true
# the largest message is 2 MiB; a chunk of an update is 256 KiB
max_packet_size 2162688
# for one slow client, beyond which its messages are dropped; fedpipe grants far less
max_queued_bytes 67108864
# beyond which mosquitto drops whatever it has for a client, acknowledgements too: ten for each agent, or its default of 1000
max_queued_messages 100000
persistent_client_expiration 1d
"""


def access(fleet: str, revoked: Iterable[str] = ()) -> str:
    """The text of the acl file.  A denial comes before every permission, also before a pattern."""
    root = Topics(fleet).root
    lines = [
        f"user {coordinator_name(fleet)}",
        f"topic read {root}/a/+/up/#",
        f"topic write {root}/a/+/down/#",
        f"topic write {root}/c/#",
        "",
        "# agents: %u is the common name of the certificate",
        f"pattern write {root}/a/%u/up/#",
        f"pattern read {root}/a/%u/down/#",
        f"pattern read {root}/c/#",
    ]
    for agent in sorted(revoked):
        lines += ["", f"user {agent}", "topic deny #"]
    return "\n".join(lines) + "\n"


def write(folder: Path, office: Office, names: Sequence[str], port: int, now: float) -> None:
    """Everything, into a folder that is made.  Raises BadConfig for names that are none, or a folder that cannot be written."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(f"{folder} cannot be made: {error.strerror}; name a folder of yours") from None
    with contextlib.suppress(KeyError, PermissionError):  # it reads its files anew after it has given up root's rights
        os.chown(folder, office.folder.stat().st_uid, grp.getgrnam(GROUP).gr_gid)
        folder.chmod(0o2755)
    folder = folder.resolve()
    _write_server(folder, office.authority, names, now)
    keys.write_public(folder / "mosquitto.conf", configuration(folder, port).encode())
    refresh(folder, office, now)


def refresh(folder: Path, office: Office, now: float) -> None:
    """What changes with time: the acl, authorities, the list of revocations, the broker's certificate.  Raises BadConfig."""
    revoked = [e.agent for e in office.enrolments() if e.state is Standing.REVOKED]
    for name, text in (("acl", access(office.fleet, revoked)), ("ca.pem", office.authority.pem)):
        if not (folder / name).exists() or keys.read(folder / name) != text.encode():
            keys.write_public(folder / name, text.encode())
    if not _is_complete(folder / "crl.pem", office):
        keys.write_public(folder / "crl.pem", office.revocations(now))
    server = folder / SERVER_FILE
    certificate = keys.load_certificate(keys.read(server), str(server))
    ends_soon = now > certificate.not_valid_after_utc.timestamp() - SERVER_S / 3
    if ends_soon or not office.authority.is_own(certificate):
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        _write_server(folder, office.authority, [str(name.value) for name in found], now)


def _is_complete(file: Path, office: Office) -> bool:
    """Whether the lists in `file` are of this authority and name every revoked certificate."""
    try:
        return office.authority.has_listed(file.read_bytes(), office.registry.revoked().keys())
    except (OSError, ValueError):
        return False


def _write_server(folder: Path, authority: Authority, names: Iterable[str], now: float) -> None:
    key = keys.new_key()
    certificate = authority.server(key.public_key(), names, now)
    place = folder / SERVER_FILE
    keys.write_private(place, authority.shown(key, certificate))
    if folder.stat().st_mode & stat.S_ISGID:
        place.chmod(0o640)
