"""What operators do about enrolments, through the API, the client and the commands, and what follows in the coordinator."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coordinator.config import CoordinatorConfig, Trust, Web
from coordinator.trust import open_trust
from coordinator.trust.command import authority
from coordinator.trust.office import Office, create
from coordinator.web import speaks_tls
from fedpipe.__main__ import app
from fedpipe.client import Coordinator
from protocol import keys
from protocol.bus import BrokerConfig
from protocol.enrolment import Enrol
from protocol.errors import BadConfig
from protocol.messages import Presence
from protocol.outgoing import Outgoing
from protocol.signing import Verifier
from protocol.topics import Topics

topics = Topics("main")
START_S = 30.0


@pytest.fixture
def trusted(tmp_path: Path, served_kind: Callable[..., Any]) -> Iterator[Any]:
    """A served coordinator that has an authority."""
    folder = tmp_path / "coordinator"
    folder.mkdir()
    create(folder / "trust", "main", time.time())
    found = served_kind(folder)
    yield found
    found.close()


def office(served: Any) -> Office:
    found: Office = served.coordinator.trust.office
    return found


def ask(served: Any, word: str, agent: str) -> None:
    csr = keys.request(keys.new_key(), agent)
    office(served).enrol(Enrol(token=word, csr=csr, agent=agent), "192.0.2.3", time.time())


def says_birth(served: Any, agent: str, session: str = "1" * 16) -> None:
    outgoing = Outgoing(time.time)
    outgoing.session = session
    body = Presence(session=session, online=True, methods=["qlora"])
    served.loop.call_soon_threadsafe(served.broker.route, topics.up(agent, "state"), outgoing.encode(body))


def settled(served: Any) -> None:
    """Everything that was published before has been heard."""
    says_birth(served, "last", f"{time.monotonic_ns() % 16**16:016x}")
    session = f"{time.monotonic_ns() % 16**16:016x}"
    says_birth(served, "last", session)
    served.until(lambda state: "last" in state.agents and state.agents["last"].session == session)


def test_from_token_to_revocation(trusted: Any) -> None:
    with Coordinator(trusted.url) as client:
        made = client.make_token("", 2, 60.0, auto_accept=False)
        assert made.url.startswith("https://")
        ask(trusted, made.token, "a")
        ask(trusted, made.token, "b")
        assert [(e.agent, e.state, e.address) for e in client.enrolments()] == [
            ("a", "pending", "192.0.2.3"),
            ("b", "pending", "192.0.2.3"),
        ]
        assert client.decide("a", "accept").state == "accepted"
        assert client.decide("b", "reject", "who?").reason == "who?"
        says_birth(trusted, "a")
        trusted.until(lambda state: "a" in state.agents and state.agents["a"].online)
        assert client.decide("a", "revoke", "stolen").state == "revoked"
        says_birth(trusted, "a", "2" * 16)
        settled(trusted)
        agent = trusted.coordinator.fleet.state.agents["a"]
        assert (agent.online, agent.reason, agent.session) == (False, "revoked: stolen", "1" * 16)
        with pytest.raises(BadConfig, match="nobody asked"):
            client.decide("ghost", "accept")
        word = client.make_token("a", 1, 60.0, auto_accept=True).token
        ask(trusted, word, "a")
        client.decide("a", "accept")  # tells the daemon; whoever renews or enrols meanwhile is looked up at the next
        says_birth(trusted, "a", "3" * 16)
        trusted.until(lambda state: state.agents["a"].online)


def test_a_revocation_that_a_crash_cut_short_is_finished_at_the_next_start(
    trusted: Any, served_kind: Callable[..., Any]
) -> None:
    word = office(trusted).make_token("a", 1, 60.0, auto_accept=True, now=time.time())
    ask(trusted, str(word), "a")
    says_birth(trusted, "a")
    trusted.until(lambda state: "a" in state.agents and state.agents["a"].online)
    office(trusted).revoke("a", "stolen", time.time())
    trusted.close()
    again = served_kind(trusted.folder)
    try:
        again.until(lambda state: not state.agents["a"].online and state.agents["a"].reason == "revoked")
    finally:
        again.close()


def test_what_the_coordinator_says_is_signed(trusted: Any) -> None:
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), trusted.loop).result(START_S)
    settled(trusted)
    payload = trusted.broker.retained[topics.coordinator_state()]
    verifier = Verifier([office(trusted).keyring.chain[-1].public])
    assert verifier.open(topics.coordinator_state(), payload, time.time()).b.online  # type: ignore[union-attr]


def test_without_an_authority_the_answer_says_how_to_make_one(served: Any) -> None:
    with Coordinator(served.url) as client, pytest.raises(BadConfig, match="fedpipe-coordinator ca init"):
        client.enrolments()
    says_birth(served, "a")
    served.until(lambda state: "a" in state.agents)


def test_when_the_api_is_https() -> None:
    class Seen:
        def __init__(self, trust: object, **how: Any) -> None:
            self.config, self.trust = CoordinatorConfig(web=Web(**how)), trust

    public = {"host": "192.0.2.1", "token_file": "x"}
    asked: Any = speaks_tls
    assert asked(Seen(object(), **public))
    assert not asked(Seen(None, **public))
    assert not asked(Seen(object()))
    assert asked(Seen(object(), tls="on"))
    assert not asked(Seen(object(), **public, tls="off"))
    with pytest.raises(BadConfig, match="ca init"):
        asked(Seen(None, tls="on"))


def test_the_coordinator_connects_with_its_own_certificate(tmp_path: Path) -> None:
    config = CoordinatorConfig(
        state_dir=str(tmp_path), broker=BrokerConfig(url="mqtts://b:8883"), trust=Trust(names=["c.example"])
    )
    assert open_trust(config) is None
    assert "ca init" not in authority("init", config)
    trust = open_trust(config)
    assert trust is not None
    assert trust.public_url == "https://c.example:8443"
    made = keys.load_certificate(Path(trust.broker.cert_file).read_bytes(), "it")
    assert keys.common_name(made) == "coordinator.main"
    assert trust.broker.ca_file == str(tmp_path / "trust" / "ca.pem")
    ssl.create_default_context(cafile=trust.broker.ca_file).load_cert_chain(trust.https_file)
    assert trust.office.authority.fingerprint in authority("show", config)
    before = trust.office.keyring.chain
    authority("rotate-signing-key", config)
    again = open_trust(config)
    assert again is not None
    assert again.office.keyring.chain[:-1] == before
    for one in (trust, again):
        one.office.registry.close()


# --------------------------------------------------------------------------------------------------------------- commands


def test_the_commands(trusted: Any, tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, [*words, "--url", trusted.url])

    made = run("token", "--agent", "a", "--ttl", "30m", "--json")
    word = json.loads(made.stdout)["token"]
    assert "nobody has asked yet" in run("enrolments").stdout
    ask(trusted, word, "a")
    assert "pending" in run("enrolments").stdout
    assert run("accept", "a").stdout == "a is accepted\n"
    assert run("revoke", "a", "--reason", "lost").stdout == "a is revoked\n"
    assert json.loads(run("enrolments", "--json").stdout)[0]["reason"] == "lost"
    assert run("revoke", "nobody").exit_code == 78
    assert run("token", "--ttl", "soon").exit_code == 78
    assert CliRunner().invoke(app, ["enrol", "https://x"]).exit_code == 78
    config = tmp_path / "c.toml"
    config.write_text(f'state_dir = "{trusted.folder}"\n')
    out = tmp_path / "mosquitto"
    words = ["mosquitto-config", "--out", str(out), "--host", "b.example", "--config", str(config)]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0
    assert f'broker_dir = "{out}"' in told.stdout
    assert "user a\ntopic deny #" in (out / "acl").read_text()


def test_the_acl_follows_the_registry(trusted: Any) -> None:
    from coordinator.trust import mosquitto

    out = trusted.folder / "mosquitto"
    mosquitto.write(out, office(trusted), ["b.example"], 8883, time.time())
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    mosquitto.refresh(out, office(trusted), time.time())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before, "nothing is written for nothing"
    mosquitto.refresh(out, office(trusted), time.time() + 800 * 86_400)
    assert (out / "server.pem").read_bytes() != before["server.pem"], "the broker's certificate is renewed"
    assert (out / "acl").read_bytes() == before["acl"]
    with pytest.raises(BadConfig, match="no DNS name"):
        mosquitto.write(out, office(trusted), ["https://b"], 8883, time.time())
