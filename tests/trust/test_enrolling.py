"""`fedpipe enrol` and an agent's renewal against the real window over real TLS, with everything that can stand in between."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import AgentConfig
from agent.identity import Identity, Refused, exchange
from coordinator.trust.bounds import BURST, Rate
from coordinator.trust.desk import desk
from coordinator.trust.office import Office, create
from fedpipe.enrolling import Done, Place, enrol
from protocol import enrolment, keys
from protocol.enrolment import Token
from protocol.errors import BadConfig, Unavailable
from protocol.signing import Signer, Untrusted

OpenDesk = Callable[..., Any]


def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "etc" / "agent.toml", tmp_path / "state")


def token(office: Office, agent: str = "a", *, auto: bool = True) -> Token:
    return office.make_token(agent, 1, 3600.0, auto_accept=auto, now=time.time())


def joined(office: Office, open_desk: OpenDesk, tmp_path: Path, **how: Any) -> Done:
    return enrol(open_desk().url, token(office), "", place(tmp_path), lambda _: None, 5.0, **how)


def test_a_server_becomes_an_agent(office: Office, open_desk: OpenDesk, tmp_path: Path) -> None:
    done = joined(office, open_desk, tmp_path)
    config = msgspec.convert(tomllib.loads(Path(done.config).read_text()), AgentConfig)
    identity = Identity(Path(config.identity_dir))
    assert (config.agent, identity.agent, config.fleet) == ("a", "a", "main")
    assert config.broker.url == "mqtts://127.0.0.1:8883"
    made = keys.load_certificate(Path(config.broker.cert_file).read_bytes(), "it")
    made.verify_directly_issued_by(keys.load_certificate(Path(config.broker.ca_file).read_bytes(), "it"))
    for file in identity.folder.iterdir():
        private = b"PRIVATE KEY" in file.read_bytes()
        assert bool(file.stat().st_mode & 0o077) is not private
    assert sorted(file.name for file in identity.folder.iterdir()) == ["agent.pem", "ca.pem", "trust.json"]


def test_somebody_in_between_is_noticed_before_the_token_is_said(
    office: Office, open_desk: OpenDesk, tmp_path: Path
) -> None:
    create(tmp_path / "other", "main", time.time())
    other = Office(tmp_path / "other", "main", "mqtts://evil")
    word = other.make_token("a", 1, 3600.0, auto_accept=True, now=time.time())
    with pytest.raises(Refused, match="not the coordinator that made this token"):
        enrol(open_desk().url, word, "", place(tmp_path), lambda _: None, 5.0)
    other.registry.close()
    assert office.enrolments() == []


def test_a_name_that_the_coordinator_does_not_have(office: Office, open_desk: OpenDesk, tmp_path: Path) -> None:
    url = open_desk().url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(Unavailable, match=r"certificate does not hold|no coordinator answers"):
        enrol(url, token(office), "", place(tmp_path), lambda _: None, 5.0)


def test_pending_then_accepted_while_it_waits(office: Office, open_desk: OpenDesk, tmp_path: Path) -> None:
    said: list[str] = []

    def hears(text: str) -> None:
        said.append(text)
        threading.Thread(target=office.accept, args=("a", "", time.time())).start()

    done = enrol(open_desk().url, token(office, auto=False), "", place(tmp_path), hears, 30.0)
    assert done.agent == "a"
    assert "fedpipe accept a" in said[0]


def test_giving_up_and_coming_again_goes_on_with_the_same_key(
    office: Office, open_desk: OpenDesk, tmp_path: Path
) -> None:
    url, word = open_desk().url, token(office, auto=False)
    with pytest.raises(Unavailable, match="waits to be accepted"):
        enrol(url, word, "", place(tmp_path), lambda _: None, 0.0)
    before = office.enrolments()[0].key
    office.accept("a", "", time.time())
    enrol(url, word, "", place(tmp_path), lambda _: None, 0.0)
    found = Identity(place(tmp_path).identity)
    assert keys.certificate_digest(found.certificate) == before


def test_an_identity_is_replaced_only_on_purpose(office: Office, open_desk: OpenDesk, tmp_path: Path) -> None:
    joined(office, open_desk, tmp_path)
    before = Identity(place(tmp_path).identity).certificate.serial_number
    with pytest.raises(BadConfig, match="--again"):
        joined(office, open_desk, tmp_path)
    config = place(tmp_path).config
    config.write_text(config.read_text() + "# mine\n")
    joined(office, open_desk, tmp_path, anew=True)
    assert Identity(place(tmp_path).identity).certificate.serial_number != before
    assert config.read_text().endswith("# mine\n"), "a configuration that is there stays"


def test_a_configuration_of_another_agent_stops_it_before_the_token_is_used(
    office: Office, open_desk: OpenDesk, tmp_path: Path
) -> None:
    config = place(tmp_path).config
    config.parent.mkdir()
    config.write_text('agent = "other"\n')
    with pytest.raises(BadConfig, match="of agent other, not of a"):
        enrol(open_desk().url, token(office), "a", place(tmp_path), lambda _: None, 5.0)
    with pytest.raises(BadConfig, match="identity_dir"):
        enrol(open_desk().url, token(office), "", place(tmp_path), lambda _: None, 5.0)
    assert office.enrolments() == []


# ----------------------------------------------------------------------------------------------------------------- renewal


@pytest.fixture
def identity(office: Office, open_desk: OpenDesk, tmp_path: Path) -> Identity:
    joined(office, open_desk, tmp_path)
    return Identity(place(tmp_path).identity)


def test_a_renewal_replaces_key_and_certificate_in_one_file(identity: Identity) -> None:
    before = (identity.folder / "agent.pem").read_bytes()
    identity.renew()
    after = (identity.folder / "agent.pem").read_bytes()
    assert keys.public_digest(keys.load_key(after, "it").public_key()) != keys.public_digest(
        keys.load_key(before, "it").public_key()
    )
    assert Identity(identity.folder).expires_at == identity.expires_at
    assert not (identity.folder / "next.key").exists()
    identity.renew()


@pytest.mark.parametrize("dies_at", ["the answer", "the certificate"])
def test_a_restart_in_the_middle_of_a_renewal_loses_nothing(
    identity: Identity, office: Office, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    class DeadError(Exception):
        pass

    def dies(*_: object, **__: object) -> None:
        raise DeadError

    keys.write_private(identity.folder / "next.key", keys.key_pem(keys.new_key()))
    owner, name = {"the answer": (Identity, "_take"), "the certificate": (keys, "write_private")}[dies_at]
    monkeypatch.setattr(owner, name, dies)
    with pytest.raises(DeadError):
        identity.renew()
    monkeypatch.undo()
    again = Identity(identity.folder)
    assert again.certificate == identity.certificate, "the present one is in force"
    again.renew()
    assert Identity(identity.folder).certificate == again.certificate != identity.certificate
    assert n_issued(office) == 2, "the same request got the same certificate"


def n_issued(office: Office) -> int:
    return int(office.registry._rows("SELECT COUNT(*) FROM certificates")[0][0])


def test_a_key_that_is_in_force_already_is_not_taken_for_the_next(identity: Identity, office: Office) -> None:
    """As after a crash between the last two steps."""
    present = keys.load_key((identity.folder / "agent.pem").read_bytes(), "it")
    keys.write_private(identity.folder / "next.key", keys.key_pem(present))
    before = identity.certificate
    identity.renew()
    assert identity.certificate != before
    assert n_issued(office) == 2


def test_a_revoked_agent_is_told_so(identity: Identity, office: Office) -> None:
    office.revoke("a", "", time.time())
    with pytest.raises(Refused, match="a is revoked"):
        identity.renew()
    Identity(identity.folder)


def test_signing_keys_follow_the_chain(office: Office, open_desk: OpenDesk, tmp_path: Path) -> None:
    joined(office, open_desk, tmp_path)
    identity, old = Identity(place(tmp_path).identity), office.keyring
    office.keyring = old.rotate()
    topic = "fed/v1/main/a/a/down/grant"
    said = Signer(office.keyring._key)(topic, b"")
    assert identity.verifier.is_unknown(said)
    with pytest.raises(Untrusted):
        identity.verifier.open(topic, said, 0.0)
    assert identity.refresh_keys()
    assert not identity.refresh_keys()
    assert not identity.verifier.is_unknown(said)
    assert not identity.verifier.is_unknown(Signer(old._key)(topic, b"")), "two keys are valid"
    assert Identity(identity.folder).trust == identity.trust


def test_a_damaged_identity_says_so(identity: Identity) -> None:
    pem = identity.folder / "agent.pem"
    other = keys.key_pem(keys.new_key()) + pem.read_bytes()[pem.read_bytes().index(b"-----BEGIN CERT") :]
    for content in (b"", b"nonsense", other):
        pem.write_bytes(content)
        with pytest.raises(BadConfig, match=r"agent\.pem"):
            Identity(identity.folder)
    (identity.folder / "trust.json").unlink()
    with pytest.raises(BadConfig, match="fedpipe enrol"):
        Identity(identity.folder)


# -------------------------------------------------------------------------------------------------------------- the window


def post(office: Office, desk_: Any, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    link = http.client.HTTPSConnection("127.0.0.1", desk_.port, timeout=10, context=desk_.context(office))
    link.request("POST", path, body)
    answer = link.getresponse()
    found = answer.status, json.loads(answer.read())
    link.close()
    return found


def test_what_a_stranger_may_send_is_bounded(office: Office, open_desk: OpenDesk) -> None:
    window = open_desk()
    assert post(office, window, enrolment.ENROL, b"x" * (enrolment.MAX_BODY_BYTES + 1))[0] == 413
    for body in (b"", b"[]", b"\xff", b'{"token": 5, "csr": ""}', b'{"token": "' + b"x" * 500 + b'", "csr": ""}'):
        status, text = post(office, window, enrolment.ENROL, body)
        assert status == 400, body
        assert "error" in text
    assert post(office, window, enrolment.ENROL, b'{"token": "", "csr": ""}')[0] == 422
    assert post(office, window, "/v1/tokens", b"{}")[0] == 404, "nothing for operators is here"
    assert post(office, window, "/v1/enrolments/a/accept", b"{}")[0] == 404
    status, text = post(
        office, window, enrolment.RENEW, b'{"certificate": "", "csr": "", "signature": "0000000000000000"}'
    )
    assert status == 422


def test_whoever_enrols_has_another_standing_from_then_on(office: Office, open_desk: OpenDesk, tmp_path: Path) -> None:
    """As an agent that was revoked and comes back by a token that names it."""
    seen: list[frozenset[str]] = []

    async def looks() -> None:
        seen.append(office.barred())

    window = open_desk(app=desk(office, decided=looks))
    enrol(window.url, token(office), "", place(tmp_path), lambda _: None, 5.0)
    office.revoke("a", "", time.time())
    assert office.barred() == {"a"}
    enrol(window.url, token(office), "", place(tmp_path), lambda _: None, 5.0, anew=True)
    assert seen == [frozenset(), frozenset()]


def test_too_many_requests_are_told_when_to_come_again(office: Office, open_desk: OpenDesk) -> None:
    rate = Rate(lambda: 0.0)
    for _ in range(BURST - 1):
        rate.take("127.0.0.1")
    window = open_desk(app=desk(office, rate))
    assert post(office, window, enrolment.ENROL, b"{}")[0] == 400
    assert post(office, window, enrolment.ENROL, b"{}")[0] == 429
    with pytest.raises(Unavailable, match="too many requests"):
        exchange(window.url, "GET", enrolment.KEYS, None, window.context(office))


def test_the_bucket_fills_again_and_forgets_the_quiet() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    assert [rate.take("a") for _ in range(BURST)] == [0.0] * BURST
    assert rate.take("a") == 0.5
    assert rate.take("b") == 0.0
    now = 0.5
    assert rate.take("a") == 0.0
    assert rate.take("a") == 0.5
    for i in range(20_000):
        rate.take(f"x{i}")
    assert len(rate._buckets) <= 10_000


def test_a_renewed_certificate_is_shown_to_the_next_who_connects(office: Office, open_desk: OpenDesk) -> None:
    window = open_desk()
    exchange(window.url, "GET", enrolment.KEYS, None, window.context(office))
    from coordinator.trust import own

    own.https_certificate(office.folder, office.authority, ["renewed.example"], time.time())
    window.server.renewed()
    pem = ssl.get_server_certificate(("127.0.0.1", window.port))
    assert own._names(keys.load_certificate(pem.encode(), "it"))[0] == "renewed.example"


@pytest.mark.skipif("os.geteuid() != 0", reason="only root makes files for others")
def test_an_identity_that_root_makes_belongs_to_whom_the_state_folder_belongs(
    office: Office, open_desk: OpenDesk, tmp_path: Path
) -> None:
    state = place(tmp_path).state_dir
    state.mkdir()
    os.chown(state, 12_345, 12_346)
    joined(office, open_desk, tmp_path)
    made = [place(tmp_path).identity, *place(tmp_path).identity.iterdir()]
    assert len(made) > 3
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12_345, 12_346)}
