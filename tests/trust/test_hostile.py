"""What a stranger, a thief of a token and an agent that goes bad try at the windows, with real requests over real TLS."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from agent.identity import Refused, exchange
from coordinator.audit import lines_of, read, verify
from coordinator.config import CoordinatorConfig
from coordinator.trust.bounds import BURST, Rate, listening
from coordinator.trust.command import authority
from coordinator.trust.desk import desk
from coordinator.trust.office import Office, create
from coordinator.trust.registry import Standing
from protocol import enrolment, keys
from protocol.enrolment import Enrol, Enrolled, Renew
from protocol.errors import OutsideFault

N_AT_ONCE = 8
PATIENCE_S = 30.0

OpenDesk = Callable[..., Any]


def at_once(*doing: Callable[[], Any]) -> list[Any]:
    """What each returned or raised; all begin together."""
    found: list[Any] = [None] * len(doing)
    begin = threading.Barrier(len(doing))

    def run(number: int) -> None:
        begin.wait()
        try:
            found[number] = doing[number]()
        except OutsideFault as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(doing))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return found


def asks(window: Any, office: Office, path: str, asked: Any) -> Enrolled:
    return msgspec.json.decode(exchange(window.url, "POST", path, asked, window.context(office)), type=Enrolled)


# ------------------------------------------------------------------------------------------------------------- races


@pytest.mark.parametrize("auto_accept", [True, False])
def test_a_token_for_one_serves_one_of_many_that_come_at_once(
    office: Office, open_desk: OpenDesk, *, auto_accept: bool
) -> None:
    window, word = open_desk(), office.make_token("", 1, 60.0, auto_accept=auto_accept, now=time.time())

    def thief(name: str) -> Callable[[], Enrolled]:
        asked = Enrol(token=str(word), csr=keys.request(keys.new_key(), name), agent=name)
        return lambda: asks(window, office, enrolment.ENROL, asked)

    found = at_once(*(thief(f"t{i}") for i in range(N_AT_ONCE)))
    served = [one for one in found if isinstance(one, Enrolled)]
    assert len(served) == 1
    assert all("was used already" in str(one) for one in found if one is not served[0])
    assert [e.agent for e in office.enrolments()] == [served[0].agent]


def test_one_name_is_given_once_to_many_that_come_at_once(office: Office, open_desk: OpenDesk) -> None:
    window, word = open_desk(), office.make_token("", 100, 60.0, auto_accept=True, now=time.time())
    asked = [Enrol(token=str(word), csr=keys.request(keys.new_key(), "a"), agent="a") for _ in range(N_AT_ONCE)]
    found = at_once(*(lambda one=one: asks(window, office, enrolment.ENROL, one) for one in asked))
    assert sum(isinstance(one, Enrolled) for one in found) == 1
    assert len(office.registry.newest_certificates(time.time())) == 1
    assert office.registry.users(word.id)[0] == 1, "who was refused has not used the token"


def test_no_renewal_outlives_a_revocation(office: Office, open_desk: OpenDesk, enrol: Callable[..., Any]) -> None:
    window = open_desk()
    for number in range(5):
        agent = f"a{number}"
        key, told = enrol(agent)
        csrs = [keys.request(keys.new_key(), agent) for _ in range(3)]
        renewals = [
            Renew(certificate=told.certificate, csr=csr, signature=keys.sign_renewal(key, csr).hex()) for csr in csrs
        ]
        at_once(
            *(lambda one=one: asks(window, office, enrolment.RENEW, one) for one in renewals),
            lambda agent=agent: office.revoke(agent, "stolen", time.time()),
        )
        assert office.registry.newest_certificates(time.time()) == []
        held = office.registry._rows("SELECT revoked_at FROM certificates WHERE agent = ?", agent)
        assert all(at > 0 for (at,) in held)
        with pytest.raises(Refused, match="is revoked"):
            asks(window, office, enrolment.RENEW, renewals[0])


# ---------------------------------------------------------------------------------------------------------- requests


def test_a_request_that_asks_for_more_gets_what_it_was_accepted_for(office: Office, open_desk: OpenDesk) -> None:
    key, window = keys.new_key(), open_desk()
    names = [
        x509.NameAttribute(NameOID.COMMON_NAME, "coordinator.main"),
        x509.NameAttribute(NameOID.COMMON_NAME, "b"),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedpipe"),
    ]
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name(names))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hub.example.org")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    text = csr.public_bytes(serialization.Encoding.PEM).decode()
    word = office.make_token("a", 1, 60.0, auto_accept=True, now=time.time())
    found = asks(window, office, enrolment.ENROL, Enrol(token=str(word), csr=text))
    made = keys.load_certificate(found.certificate.encode(), "it")
    assert made.subject == x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    purposes = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        made.extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize(
    "agent", ["coordinator.main", "+", "#", "a/b", "A", "ä", "a\0", "a\n", "-a", " a", "$SYS", "a" * 65]
)
def test_names_that_would_be_somebody_else(office: Office, open_desk: OpenDesk, agent: str) -> None:
    window, word = open_desk(), office.make_token("", 1, 60.0, auto_accept=True, now=time.time())
    asked = Enrol(token=str(word), csr=keys.request(keys.new_key(), "a"), agent=agent)
    with pytest.raises(Refused):
        asks(window, office, enrolment.ENROL, asked)
    assert office.enrolments() == []
    assert office.registry.users(word.id)[0] == 0


def test_requests_of_absurd_size_and_kind(office: Office, open_desk: OpenDesk) -> None:
    window, word = open_desk(), str(office.make_token("a", 1, 60.0, auto_accept=True, now=time.time()))
    large = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])
    other = x509.CertificateSigningRequestBuilder().subject_name(name).sign(large, hashes.SHA256())
    texts = {
        "another kind than ECDSA P-256": other.public_bytes(serialization.Encoding.PEM).decode(),
        "cannot be read": "-----BEGIN CERTIFICATE REQUEST-----\n" + "A" * 16_000,
        "Expected `str` of length <=": "x" * 16_385,
        "at most 65536 bytes": "x" * 66_000,
    }
    for text, csr in texts.items():
        with pytest.raises(Refused, match=text):
            asks(window, office, enrolment.ENROL, Enrol(token=word, csr=csr))
    assert office.enrolments() == []


def test_a_word_about_where_a_request_comes_from_is_not_believed(office: Office, open_desk: OpenDesk) -> None:
    rate = Rate(lambda: 0.0)
    for _ in range(BURST):
        rate.take("127.0.0.1")
    window = open_desk(app=desk(office, rate))
    with httpx.Client(verify=window.context(office), trust_env=False) as http:
        for headers in ({}, {"x-forwarded-for": "192.0.2.7"}, {"forwarded": "for=192.0.2.7"}):
            assert http.get(window.url + enrolment.KEYS, headers=headers).status_code == 429


def test_a_network_of_one_machine_is_one_address() -> None:
    rate = Rate(lambda: 0.0)
    taken = [rate.take(f"2001:db8:0:1::{i:x}") for i in range(BURST + 1)]
    assert [wait_s > 0 for wait_s in taken] == [False] * BURST + [True]
    assert rate.take("2001:db8:0:2::1") == rate.take("::ffff:192.0.2.1") == rate.take("192.0.2.1") == 0.0


# -------------------------------------------------------------------------------------------------------- connections


def opened(window: Any, office: Office) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", window.port), PATIENCE_S)
    return window.context(office).wrap_socket(plain, server_hostname="127.0.0.1")


def is_ended(link: ssl.SSLSocket) -> bool:
    """Wait until the other side ends it."""
    try:
        return link.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


def test_connections_that_say_nothing_do_not_keep_others_out(office: Office, open_desk: OpenDesk) -> None:
    window = open_desk(settings=listening(max_from_one=2, patience_s=1.0))
    idle = [opened(window, office) for _ in range(2)]
    idle[0].sendall(b"POST /v1/enrol HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert is_ended(opened(window, office)), "one too many from there"
    assert all(map(is_ended, idle)), "and these are too old"
    assert exchange(window.url, "GET", enrolment.KEYS, None, window.context(office))


# ---------------------------------------------------------------------------------------------------------- operators


@pytest.fixture
def trusted(tmp_path: Path, served_kind: Callable[..., Any]) -> Iterator[Any]:
    """A served coordinator that has an authority, and a token."""
    folder = tmp_path / "coordinator"
    folder.mkdir()
    create(folder / "trust", "main", time.time())
    (tmp_path / "ops").write_text("secret")
    found = served_kind(folder, token_file=str(tmp_path / "ops"))
    yield found
    found.close()


def test_who_has_no_password_decides_nothing(trusted: Any) -> None:
    office: Office = trusted.coordinator.trust.office
    word = office.make_token("a", 1, 60.0, auto_accept=False, now=time.time())
    office.enrol(Enrol(token=str(word), csr=keys.request(keys.new_key(), "a")), "192.0.2.3", time.time())
    n_before = len(list(lines_of(trusted.folder / "audit.log")))
    paths = ["/v1/tokens", *(f"/v1/enrolments/a/{what}" for what in ("accept", "reject", "revoke"))]
    with httpx.Client(base_url=trusted.url, trust_env=False) as http:
        for given in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            assert {http.post(path, headers=given).status_code for path in paths} == {401}
            assert http.get("/v1/enrolments", headers=given).status_code == 401
        for path in ("//v1/enrolments/a/accept", "/v1/health/../enrolments/a/accept", "/v1/enrolments/a/accept/"):
            assert http.post(path).status_code in {401, 404}
    assert office.enrolments()[0].state is Standing.PENDING
    assert len(list(lines_of(trusted.folder / "audit.log"))) == n_before, "strangers do not fill the log"


def test_who_is_an_agent_is_not_decided_where_others_read_along(trusted: Any) -> None:
    headers = {"authorization": "Bearer secret"}
    with httpx.Client(base_url=trusted.url, headers=headers, trust_env=False) as http:
        for told, status in (
            ({}, 201),
            ({"x-forwarded-for": "192.0.2.7"}, 403),
            ({"x-forwarded-for": "192.0.2.7", "x-forwarded-proto": "https"}, 201),
        ):
            assert http.post("/v1/tokens", json={}, headers=told).status_code == status, told
        assert http.get("/v1/enrolments", headers={"x-forwarded-for": "192.0.2.7"}).status_code == 403
        assert http.get("/v1/agents", headers={"x-forwarded-for": "192.0.2.7"}).status_code == 200


def test_what_a_token_does_is_audited_beside_commands(trusted: Any) -> None:
    office: Office = trusted.coordinator.trust.office
    log, config = trusted.folder / "audit.log", CoordinatorConfig(state_dir=str(trusted.folder))
    with httpx.Client(base_url=trusted.url, headers={"authorization": "Bearer secret"}, trust_env=False) as http:
        word = http.post("/v1/tokens", json={"uses": 2, "auto_accept": True}).json()["token"]
        authority("rotate-signing-key", config)
        asked = Enrol(token=word, csr=keys.request(keys.new_key(), "a"), agent="a")
        for _ in range(2):
            office.enrol(asked, "192.0.2.3", time.time())
        with pytest.raises(OutsideFault, match="there is an agent a already"):
            office.enrol(Enrol(token=word, csr=keys.request(keys.new_key(), "a"), agent="a"), "192.0.2.4", time.time())
        authority("rotate", config)
        assert http.post("/v1/enrolments/a/revoke", json={"reason": "stolen"}).status_code == 200
        head = http.get("/v1/health").json()["audit"]
    name = enrolment.parse_token(word).id
    ended = [(e.actor.partition(":")[0], e.action, e.what.partition(" ")[0], e.outcome) for e in read(log) if e.of]
    assert ended == [
        ("token", "token", name, "201"),
        ("local", "ca rotate-signing-key", "main", "done"),
        ("token", "enrol", "a", "done"),
        ("local", "ca rotate", "main", "done"),
        ("token", "revoke", "a", "200"),
    ]
    (enrolled,) = [e for e in read(log) if e.action == "enrol" and not e.of]
    assert (enrolled.actor, enrolled.address) == (f"token:{name}", "192.0.2.3")
    assert enrolled.what.split()[1] == office.enrolments()[0].key
    assert str(verify(lines_of(log))) == head


def test_an_enrolment_that_cannot_be_audited_is_not_made(trusted: Any) -> None:
    office: Office = trusted.coordinator.trust.office
    word = office.make_token("a", 1, 60.0, auto_accept=True, now=time.time())
    trusted.coordinator.audit._path = Path("/dev/full")
    with pytest.raises(OutsideFault, match="make room"):
        office.enrol(Enrol(token=str(word), csr=keys.request(keys.new_key(), "a")), "192.0.2.3", time.time())
    assert office.enrolments() == []
