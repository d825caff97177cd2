"""From one authority to the next on a real mosquitto: both are trusted, then one; nobody has to enrol again."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from agent.identity import Identity
from coordinator.audit import lines_of, read, verify
from coordinator.config import CoordinatorConfig
from coordinator.trust import own, rotation
from coordinator.trust.authority import AUTHORITY_S, DAY_S, Authority
from coordinator.trust.command import authority
from coordinator.trust.office import Office, create
from fedpipe.doctor.findings import Status
from fedpipe.doctor.roles import How, coordinator
from fedpipe.enrolling import Place, enrol
from protocol import keys
from protocol.bus import Connected, Disconnected, mqtt_bus
from protocol.errors import BadConfig, Unavailable

if TYPE_CHECKING:
    from tests.trust.conftest import World

NOW = 1_900_000_000.0
PATIENCE_S = 20.0


def start_again(office: Office, window: Any) -> None:
    """As a coordinator does with what is on its disk now; its own certificates are made anew where they have to be."""
    now = time.time()
    office.authority = Authority.load(office.folder)
    own.client_certificate(office.folder, office.authority, office.fleet, now)
    own.https_certificate(office.folder, office.authority, [], now)
    window.server.renewed()


async def outcome(world: World, certificate: Path, trusted: Path) -> str:
    """How a broker answers who comes with this certificate, and trusts those authorities."""
    async with mqtt_bus(world.broker(certificate, authority=trusted), "x", lambda: None) as bus:
        async with asyncio.timeout(PATIENCE_S):
            happening = await bus.next()
        assert isinstance(happening, Connected | Disconnected)
        return "in" if isinstance(happening, Connected) else happening.reason


def join(url: str, word: Any, folder: Path) -> Identity:
    place = Place(folder / "agent.toml", folder)
    enrol(url, word, "", place, lambda _: None, 5.0)
    return Identity(place.identity)


async def test_one_fleet_under_two_authorities_then_under_the_new_one(
    world: World, office: Office, open_desk: Callable[..., Any], tmp_path: Path
) -> None:
    window = open_desk()
    words = {
        name: office.make_token(name, 1, 3600.0, auto_accept=True, now=time.time()) for name in ("a", "lost", "late")
    }

    async def joins(name: str) -> Identity:
        word = words.get(name) or office.make_token(name, 1, 3600.0, auto_accept=True, now=time.time())
        return await asyncio.to_thread(join, window.url, word, tmp_path / name)

    a, lost = await joins("a"), await joins("lost")
    before = tmp_path / "before.pem"
    before.write_bytes((a.folder / "agent.pem").read_bytes())
    rotation.rotate(office.folder, time.time())
    start_again(office, window)
    assert await outcome(world, world.coordinator, office.folder / "ca.pem") == "in", "the broker knows nothing of it"
    world.reload()

    bare = world.issued("bare", office.authority, time.time(), 100.0)
    assert await outcome(world, bare, office.folder / "ca.pem") == "in", "at SIGHUP it reads anew whom it trusts"

    # old and new side by side, on both sides of TLS, and one with a token of before
    b, late = await joins("b"), await joins("late")
    for one in (a, lost, b, late):
        assert await outcome(world, one.folder / "agent.pem", one.folder / "ca.pem") == "in", one.agent
    assert await outcome(world, world.coordinator, office.folder / "ca.pem") == "in"
    assert [n_authorities(one) for one in (a, b, late)] == [1, 1, 2], "the token names one"
    assert rotation.lagging(office, time.time()) == ["a", "lost"]
    with pytest.raises(BadConfig, match="a, lost would be shut out"):
        rotation.retire(office, time.time())

    # who is revoked is out, by whichever authority
    for one in (lost, late):
        office.revoke(one.agent, "stolen", time.time())
    world.reload()
    for one in (lost, late):
        assert "our certificate is revoked" in await outcome(world, one.folder / "agent.pem", one.folder / "ca.pem")

    await asyncio.to_thread(a.renew)
    assert n_authorities(a) == 2
    rotation.retire(office, time.time())
    start_again(office, window)
    world.reload()
    for one in (a, b):
        assert await outcome(world, one.folder / "agent.pem", one.folder / "ca.pem") == "in"
    assert "does not know the authority" in await outcome(world, before, office.folder / "ca.pem")
    await asyncio.to_thread(a.renew)
    assert n_authorities(a) == 1, "an agent drops it with its next renewal"


def n_authorities(one: Identity) -> int:
    return len(keys.load_certificates((one.folder / "ca.pem").read_bytes(), "it"))


class DeadError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("n_written", range(4))
def test_a_crash_in_a_rotation_leaves_the_one_or_the_other_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    folder, left = tmp_path / "trust", n_written
    first = create(folder, "main", NOW)
    write = keys._write

    def dies(*arguments: Any) -> None:
        nonlocal left
        if not left:
            raise DeadError
        left -= 1
        write(*arguments)

    monkeypatch.setattr(keys, "_write", dies)
    if n_written < 3:
        with pytest.raises(DeadError):
            rotation.rotate(folder, NOW)
    else:
        rotation.rotate(folder, NOW)
    monkeypatch.undo()
    found = Authority.load(folder)
    assert (found.fingerprint == first.fingerprint) is (n_written < 3)
    assert (found.predecessor is None) is (n_written < 3)
    if n_written < 3:
        assert rotation.rotate(folder, NOW).predecessor == first.certificate, "it is done again"
    with pytest.raises(BadConfig, match="ca retire"):
        rotation.rotate(folder, NOW)


def test_a_crash_before_the_old_key_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "trust"
    create(folder, "main", NOW)
    office = Office(folder, "main", "mqtts://x")
    with pytest.raises(BadConfig, match="nothing is to be retired"):
        rotation.retire(office, NOW)
    rotation.rotate(folder, NOW)
    office.authority = Authority.load(folder)
    key = (folder / "ca-old.key").read_bytes()
    rotation.retire(office, NOW)
    assert not (folder / "ca-old.key").exists()
    (folder / "ca-old.key").write_bytes(key)
    assert Authority.load(folder).predecessor is None
    assert rotation.rotate(folder, NOW).predecessor == Authority.load(folder).predecessor is not None
    office.registry.close()


def test_a_key_that_is_kept_elsewhere_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, folder, credentials = create(tmp_path / "trust", "main", NOW), tmp_path / "trust", tmp_path / "credentials"
    credentials.mkdir()
    (folder / "ca.key").rename(credentials / "ca.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    with pytest.raises(BadConfig, match="kept elsewhere"):
        rotation.rotate(folder, NOW)
    keys.write_private(folder / "ca.key", keys.key_pem(keys.new_key()))
    with pytest.raises(BadConfig, match="kept elsewhere"):
        rotation.rotate(folder, NOW)
    assert Authority.load(folder).fingerprint == first.fingerprint


def test_whom_an_agent_follows(tmp_path: Path) -> None:
    first, foreign = create(tmp_path / "a", "main", NOW), create(tmp_path / "b", "main", NOW)
    second = rotation.rotate(tmp_path / "a", NOW)
    rotation.rotate(tmp_path / "b", NOW)
    stolen, key = Authority.load(tmp_path / "b"), keys.new_key()

    def follows(*texts: str) -> list[str]:
        offered = keys.load_certificates("".join(texts).encode(), "it")
        return list(map(keys.certificate_digest, keys.follow_authorities([first.certificate], offered)))

    assert follows(second.pem, second.link) == [second.fingerprint, first.fingerprint]
    assert follows(first.pem, foreign.pem, stolen.pem, stolen.link) == [first.fingerprint]
    assert follows(second.pem) == [first.fingerprint], "nobody vouches for it"
    assert follows(foreign.pem) == []
    leaf = keys.pem(first.client(key.public_key(), "fedpipe main", NOW, DAY_S))
    assert follows(first.pem, leaf) == [first.fingerprint], "what an authority issued is no authority"


def test_nothing_lasts_longer_than_its_authority(tmp_path: Path) -> None:
    made, late = create(tmp_path / "a", "main", NOW), NOW + AUTHORITY_S - DAY_S
    issued = made.client(keys.new_key().public_key(), "a", late, 90 * DAY_S)
    assert issued.not_valid_after_utc == made.certificate.not_valid_after_utc
    assert rotation.rotate(tmp_path / "a", made.ends_at + DAY_S).link == "", "one that has ended vouches for nobody"


# ------------------------------------------------------------------------------------------------------- the operator


def test_the_commands_are_audited_and_say_what_is_next(tmp_path: Path) -> None:
    config = CoordinatorConfig(state_dir=str(tmp_path / "state"))
    first = authority("init", config)
    assert "ca retire" in authority("rotate", config)
    shown = authority("show", config)
    assert "predecessor" in shown
    assert "every agent has renewed" in shown
    with pytest.raises(BadConfig, match="ca retire"):
        authority("rotate", config)
    assert "start the coordinator again" in authority("retire", config)
    assert "predecessor" not in authority("show", config)
    log = tmp_path / "state" / "audit.log"
    verify(lines_of(log))
    ended = [(entry.action, entry.outcome.partition(":")[0]) for entry in read(log) if entry.of]
    assert ended == [("ca init", "done"), ("ca rotate", "done"), ("ca rotate", "refused"), ("ca retire", "done")]
    assert {entry.actor.partition(":")[0] for entry in read(log)} == {"local"}
    told = [entry.what for entry in read(log) if entry.action == "ca init" and entry.of]
    assert told[0].split()[1] in first, "which key it was"


def test_what_cannot_be_audited_is_not_done(tmp_path: Path) -> None:
    config = CoordinatorConfig(state_dir=str(tmp_path / "state"))
    (tmp_path / "state" / "audit.log").mkdir(parents=True)
    with pytest.raises(Unavailable):
        authority("init", config)
    assert not (tmp_path / "state" / "trust").exists()


def test_the_figures_tell_when_both_end(tmp_path: Path, served_kind: Callable[..., Any]) -> None:
    create(tmp_path / "trust", "main", time.time() - DAY_S)
    rotation.rotate(tmp_path / "trust", time.time())
    served = served_kind(tmp_path)
    text = httpx.get(f"{served.url}/metrics", trust_env=False).text
    served.close()
    ends = dict(
        re.findall(r'^fedpipe_certificate_expiry_timestamp_seconds{certificate="(\w+)"} (\S+)$', text, re.MULTILINE)
    )
    assert 0 <= float(ends["authority"]) - float(ends["predecessor"]) - DAY_S < 60.0


def test_the_doctor_warns_a_year_before_the_end(tmp_path: Path) -> None:
    def found(begin: float) -> tuple[Status, str]:
        folder = tmp_path / str(begin)
        create(folder / "trust", "main", begin)
        series = coordinator(CoordinatorConfig(state_dir=str(folder)), tmp_path, How(quick=True))
        (one,) = next(one for one in series if one.checks == ("authority",)).looks()
        return one.status, one.next_step

    now = time.time()
    assert found(now) == (Status.OK, "")
    soon = found(now - AUTHORITY_S + 200 * DAY_S)
    assert soon[0] is Status.WARNING
    assert "ca rotate" in soon[1]
    assert found(now - AUTHORITY_S - DAY_S)[0] is Status.FAILED
