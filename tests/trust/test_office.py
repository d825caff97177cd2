"""Who gets a certificate: every way a token, a request or an agent can be wrong has its answer, and the right ones may ask again."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from coordinator.trust.authority import DAY_S, Authority
from coordinator.trust.keyring import Keyring
from coordinator.trust.office import Office, Refused, create
from coordinator.trust.registry import Standing
from protocol import keys
from protocol.enrolment import Enrol, Enrolled, Renew, Token, parse_token
from protocol.errors import BadConfig

NOW = 1_800_000_000.0
LIFE_S = 90 * DAY_S
EnrolAgent = Callable[..., tuple[keys.Key, Enrolled]]


def token(office: Office, agent: str = "", uses: int = 1, ttl_s: float = 3600.0, *, auto: bool = True) -> str:
    return str(office.make_token(agent, uses, ttl_s, auto_accept=auto, now=NOW))


def ask(office: Office, word: str, agent: str = "", key: keys.Key | None = None, now: float = NOW) -> Enrolled:
    return office.enrol(
        Enrol(token=word, csr=keys.request(key or keys.new_key(), agent), agent=agent), "192.0.2.7", now
    )


def refusal(office: Office, *words: Any, **how: Any) -> str:
    with pytest.raises((Refused, BadConfig)) as error:
        ask(office, *words, **how)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ the good day


def test_an_accepted_server_gets_a_certificate_for_its_key_and_id(office: Office) -> None:
    key = keys.new_key()
    told = ask(office, token(office), "edge-1", key)
    made = keys.load_certificate(told.certificate.encode(), "it")
    made.verify_directly_issued_by(office.authority.certificate)
    assert (told.agent, told.state, keys.common_name(made)) == ("edge-1", "accepted", "edge-1")
    assert keys.certificate_digest(made) == keys.public_digest(key.public_key())
    assert made.not_valid_after_utc.timestamp() == NOW + LIFE_S
    assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert told.signing_keys == office.keyring.chain


def test_the_name_in_the_request_does_not_matter(office: Office) -> None:
    word, key = token(office, "edge-1"), keys.new_key()
    told = office.enrol(Enrol(token=word, csr=keys.request(key, "coordinator.main")), "", NOW)
    assert keys.common_name(keys.load_certificate(told.certificate.encode(), "it")) == "edge-1"


def test_pending_until_a_person_decides(office: Office) -> None:
    key, word = keys.new_key(), token(office, auto=False)
    assert ask(office, word, "a", key).state == "pending"
    assert ask(office, word, "a", key).certificate == ""
    assert office.barred() == {"a"}
    office.accept("a", "", NOW)
    assert ask(office, word, "a", key).certificate
    assert office.barred() == frozenset()
    assert office.accept("a", "", NOW).state is Standing.ACCEPTED


def test_a_lost_answer_is_asked_for_again_even_after_the_token_ended(office: Office) -> None:
    key, word = keys.new_key(), token(office, ttl_s=60.0)
    first = ask(office, word, "a", key)
    assert ask(office, word, "a", key, NOW + 1000).certificate == first.certificate


# ------------------------------------------------------------------------------------------------------------------ tokens


def test_a_used_token_is_refused_and_says_who_used_it(office: Office) -> None:
    word = token(office)
    ask(office, word, "a")
    assert "used already, by a" in refusal(office, word, "b")
    assert office.registry.enrolment("b") is None


def test_a_token_for_three_serves_three(office: Office) -> None:
    word = token(office, uses=3)
    for agent in "abc":
        ask(office, word, agent)
    assert "used already, by a, b, c" in refusal(office, word, "d")


def test_expired_unknown_and_wrong_tokens(office: Office) -> None:
    word = token(office, ttl_s=60.0)
    assert "expired" in refusal(office, word, "a", now=NOW + 60)
    found = parse_token(word)
    wrong = str(Token(found.id, "0" * 32, found.fingerprint))
    unknown = str(Token("0" * 8, found.secret, found.fingerprint))
    assert refusal(office, wrong, "a") == refusal(office, unknown, "a")
    assert "no join token" in refusal(office, "fp1.x", "a")
    ask(office, word, "a")


def test_a_token_for_one_agent_is_for_that_one(office: Office) -> None:
    word = token(office, "a")
    assert "for a only" in refusal(office, word, "b")
    assert ask(office, word).agent == "a"


def test_ids_that_are_none_and_tokens_that_make_no_sense(office: Office) -> None:
    for agent in ("", "A", "a/b", "+", "coordinator.main", "a" * 65):
        assert "64 of a-z" in refusal(office, token(office), agent)
    for how in ({"uses": 0}, {"uses": 2, "agent": "a"}, {"ttl_s": 0.0}, {"agent": "no.dots"}):
        with pytest.raises(BadConfig):
            token(office, **how)  # type: ignore[arg-type]


def test_the_secret_is_not_on_disk(office: Office) -> None:
    word = parse_token(token(office))
    office.registry.close()
    for file in office.folder.iterdir():
        assert word.secret.encode() not in file.read_bytes()


# ---------------------------------------------------------------------------------------------------------------- requests


def test_requests_that_are_malformed_or_prove_nothing(office: Office) -> None:
    word = token(office)
    name = x509.Name([])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    weak = builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256())
    other = builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
    good = keys.request(keys.new_key(), "a")
    body = bytearray(x509.load_pem_x509_csr(good.encode()).public_bytes(keys.serialization.Encoding.DER))
    body[-1] ^= 1
    unproven = x509.load_der_x509_csr(bytes(body)).public_bytes(keys.serialization.Encoding.PEM).decode()
    texts = [keys.serialization.Encoding.PEM]
    for csr in ("", "x" * 20_000, *(one.public_bytes(texts[0]).decode() for one in (weak, other)), unproven):
        with pytest.raises(BadConfig):
            office.enrol(Enrol(token=word, csr=csr, agent="a"), "", NOW)
    assert office.enrolments() == []


def test_a_name_that_is_taken(office: Office, enrol: EnrolAgent) -> None:
    enrol("a", NOW)
    assert "there is an agent a already" in refusal(office, token(office), "a")
    office.revoke("a", "", NOW)
    assert ask(office, token(office), "a").state == "pending", "who was sent away needs a person's word"


def test_a_token_for_an_agent_replaces_what_it_had(office: Office, enrol: EnrolAgent) -> None:
    _, before = enrol("a", NOW)
    _, after = enrol("a", NOW + 1)
    old = keys.load_certificate(before.certificate.encode(), "it").serial_number
    assert after.certificate != before.certificate
    assert old in office.registry.revoked()
    assert office.barred() == frozenset()


# ----------------------------------------------------------------------------------------------------------------- renewal


def renew(office: Office, present: keys.Key, told: Enrolled, following: keys.Key, now: float) -> Enrolled:
    csr = keys.request(following, told.agent)
    return office.renew(
        Renew(certificate=told.certificate, csr=csr, signature=keys.sign_renewal(present, csr).hex()), now
    )


def test_a_certificate_is_renewed_for_the_next_key_and_the_present_one_stays(office: Office, enrol: EnrolAgent) -> None:
    key, told = enrol("a", NOW)
    following = keys.new_key()
    again = renew(office, key, told, following, NOW + 60 * DAY_S)
    made = keys.load_certificate(again.certificate.encode(), "it")
    assert keys.certificate_digest(made) == keys.public_digest(following.public_key())
    assert made.not_valid_after_utc.timestamp() == NOW + 60 * DAY_S + LIFE_S
    assert office.registry.revoked() == {}
    assert renew(office, key, told, following, NOW + 61 * DAY_S).certificate == again.certificate
    renew(office, following, again, keys.new_key(), NOW + 120 * DAY_S)


def test_who_cannot_renew(office: Office, enrol: EnrolAgent, tmp_path: Path) -> None:
    key, told = enrol("a", NOW)
    thief = keys.new_key()
    with pytest.raises(Refused, match="not signed by the key"):
        renew(office, thief, told, thief, NOW)
    with pytest.raises(Refused, match="expired"):
        renew(office, key, told, keys.new_key(), NOW + LIFE_S)
    elsewhere = create(tmp_path / "other", "main", NOW)
    foreign = keys.pem(elsewhere.client(key.public_key(), "a", NOW, LIFE_S))
    with pytest.raises(Refused, match="not of this fleet"):
        renew(office, key, Enrolled(agent="a", state="accepted", certificate=foreign), keys.new_key(), NOW)
    office.revoke("a", "", NOW)
    with pytest.raises(Refused, match="revoked"):
        renew(office, key, told, keys.new_key(), NOW)


def test_a_certificate_that_was_replaced_cannot_renew_though_the_agent_is_accepted(
    office: Office, enrol: EnrolAgent
) -> None:
    key, told = enrol("a", NOW)
    enrol("a", NOW)
    with pytest.raises(Refused, match="revoked"):
        renew(office, key, told, keys.new_key(), NOW)


# ------------------------------------------------------------------------------------------------------- decisions, durable


def test_moves_that_there_are_not(office: Office, enrol: EnrolAgent) -> None:
    for move in (office.accept, office.revoke, office.reject):
        with pytest.raises(Refused, match="nobody asked"):
            move("ghost", "", NOW)
    enrol("a", NOW)
    with pytest.raises(Refused, match="is accepted"):
        office.reject("a", "", NOW)
    ask(office, token(office, auto=False), "b")
    with pytest.raises(Refused, match="is pending"):
        office.revoke("b", "", NOW)
    office.reject("b", "not ours", NOW)
    with pytest.raises(Refused, match="is rejected"):
        office.accept("b", "", NOW)


def test_who_is_rejected_reads_why(office: Office) -> None:
    key, word = keys.new_key(), token(office, auto=False)
    ask(office, word, "a", key)
    office.reject("a", "not ours", NOW)
    assert "rejected: not ours" in refusal(office, word, "a", key)


def test_everything_is_there_after_a_restart(office: Office, enrol: EnrolAgent) -> None:
    enrol("a", NOW)
    _, told = enrol("b", NOW)
    office.revoke("b", "stolen", NOW)
    again = Office(office.folder, "main", "mqtts://x")
    assert {e.agent: (e.state, e.reason) for e in again.enrolments()} == {
        "a": (Standing.ACCEPTED, ""),
        "b": (Standing.REVOKED, "stolen"),
    }
    listed = x509.load_pem_x509_crl(again.revocations(NOW))
    assert listed.is_signature_valid(office.authority._key.public_key())
    serial = keys.load_certificate(told.certificate.encode(), "it").serial_number
    assert [entry.serial_number for entry in listed] == [serial]
    again.registry.close()


def test_a_crash_in_the_middle_of_a_decision_decides_nothing(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    word = token(office)

    def dies(*_: object) -> None:
        raise sqlite3.DatabaseError("the disk is gone")

    monkeypatch.setattr(office.registry, "add_certificate", dies)
    key = keys.new_key()
    with pytest.raises(sqlite3.DatabaseError):
        ask(office, word, "a", key)
    monkeypatch.undo()
    assert office.enrolments() == []
    assert ask(office, word, "a", key).state == "accepted", "the token is not used up"


def test_private_files_are_private(office: Office) -> None:
    for name in ("ca.key", "signing.key", "registry.sqlite"):
        assert (office.folder / name).stat().st_mode & 0o077 == 0
    assert office.folder.stat().st_mode & 0o077 == 0


def test_a_second_authority_is_not_made_over_the_first(office: Office) -> None:
    with pytest.raises(BadConfig, match="already"):
        create(office.folder, "main", NOW)
    assert Authority.load(office.folder).fingerprint == office.authority.fingerprint


def test_keys_may_be_credentials_of_systemd(office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "credentials"
    given.mkdir()
    for name in ("ca.key", "signing.key"):
        (office.folder / name).rename(given / name)
    with pytest.raises(BadConfig, match=r"ca\.key cannot be read"):
        Authority.load(office.folder)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    assert Authority.load(office.folder).fingerprint == office.authority.fingerprint
    assert Keyring.load(office.folder).chain == office.keyring.chain
