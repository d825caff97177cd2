"""`fedpipe doctor`: every fault here is a real one, of a broker, a file or a clock, and the report names it and what to do."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from coordinator.core.events import AgentLeft
from coordinator.trust.authority import Authority
from fedpipe.__main__ import app
from fedpipe.broker import free_port
from fedpipe.doctor.findings import Series, Status, examine, ok
from fedpipe.doctor.machine import judged
from protocol import codec, keys
from protocol.bus import BrokerConfig, Connected, Received, mqtt_bus
from protocol.errors import BadConfig
from protocol.messages import CoordinatorState
from protocol.topics import Topics

Start = Callable[..., Any]
Finding = dict[str, str]
topics = Topics("main")
ALLOWED = f"topic readwrite {topics.root}/a/edge-a/#\ntopic read {topics.root}/c/#\n"


def doctor(*arguments: object) -> tuple[int, dict[str, Finding]]:
    """Exit code and findings by check."""
    done = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"])
    (report,) = json.loads(done.stdout)
    assert report["exit_code"] == done.exit_code
    return done.exit_code, {one["check"]: one for one in report["findings"]}


@pytest.fixture
def agent(tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    """Examine an agent with a data set and a model, whose configuration differs in what is given."""
    data, model = tmp_path / "notes.jsonl", tmp_path / "models" / "small"
    data.write_text('{"text": "one"}\n{"text": "two"}\n')
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")

    def examined(broker: dict[str, Any] | None = None, *, quick: bool = True, **changed: Any) -> dict[str, Finding]:
        settings = {
            "agent": "edge-a",
            "state_dir": str(tmp_path),
            "device": "cpu",
            "broker": broker or {"url": "mqtt://127.0.0.1:1"},
            "data": {"default": {"path": str(data)}},
            "base": {"model_dirs": [str(model.parent)]},
        }
        file = tmp_path / "agent.toml"
        file.write_text(tomli_w.dumps(settings | changed))
        return doctor("agent", "--config", file, *["--quick"] * quick)[1]

    return examined


def at(broker: Any, **fields: Any) -> dict[str, Any]:
    return {"url": broker.url, **fields}


def say(url: str, state: CoordinatorState, ahead_s: float = 0.0) -> None:
    """The coordinator's birth lies on the broker."""

    async def publish() -> None:
        async with mqtt_bus(BrokerConfig(url=url), "c", lambda: None) as bus:
            assert isinstance(await bus.next(), Connected)
            payload = codec.encode(state, session="c" * 16, seq=1, now=time.time() + ahead_s)
            await bus.publish(topics.coordinator_state(), payload, retain=True)

    asyncio.run(publish())


@pytest.fixture(autouse=True)
def _no_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a retained message: it comes before the answers that are awaited anyway."""
    monkeypatch.setattr("fedpipe.doctor.session.HEARD_S", 0.5)


BIRTH = CoordinatorState(session="c" * 16, online=True, software="fedpipe 1")


# ------------------------------------------------------------------------------------------------------------ all well


def test_where_all_is_well_nothing_fails(agent: Any, start_mosquitto: Start, tmp_path: Path) -> None:
    (tmp_path / "acl").write_text(f"{ALLOWED}user c\ntopic write {topics.root}/c/#\n")
    broker = start_mosquitto(f"acl_file {tmp_path}/acl")
    say(broker.url.replace("//", "//c@"), BIRTH)
    found = agent(at(broker))
    assert {check: one["found"] for check, one in found.items() if one["status"] == "failed"} == {}
    passed = {check for check, one in found.items() if one["status"] == "ok"}
    session = {"mqtt", "packet-size", "receive-maximum", "publish", "acl", "subscribe", "round-trip", "coordinator"}
    assert session | {"dns", "tcp", "state-dir", "disk", "memory", "models", "data", "gpu"} <= passed
    assert found["data"]["found"] == "default has 2 examples"
    assert found["models"]["found"] == "small"


# ------------------------------------------------------------------------------------------------- on the way to the broker


def test_a_wrong_port(agent: Any) -> None:
    found = agent({"url": f"mqtt://127.0.0.1:{free_port()}"})
    assert found["tcp"]["status"] == "failed"
    assert "start the broker" in found["tcp"]["next_step"]
    assert found["mqtt"] == {"check": "mqtt", "status": "skipped", "found": "needs tcp first", "next_step": ""}
    assert found["data"]["status"] == "ok"  # one failure hides no other look


def test_a_name_that_does_not_resolve(agent: Any) -> None:
    found = agent({"url": "mqtt://no-such-host.invalid"})
    assert found["dns"]["status"] == "failed"
    assert "DNS" in found["dns"]["next_step"]


@pytest.fixture
def secured(tmp_path: Path, start_mosquitto: Start) -> Callable[..., dict[str, Any]]:
    """A mosquitto with a certificate of one's own choice; what an agent must write to reach it."""

    def made(name: str = "127.0.0.1", begins_s: float = 0.0, life_s: float = 1e7, url: str = "mqtts") -> dict[str, Any]:
        authority = Authority.create(tmp_path / "trust", "main", time.time())
        key, pem = keys.new_key(), tmp_path / "server.pem"
        certificate = authority.server(key.public_key(), [name], time.time() + begins_s, life_s)
        keys.write_private(pem, keys.key_pem(key) + keys.pem(certificate).encode())
        broker = start_mosquitto(f"certfile {pem}", f"keyfile {pem}")
        return {"url": f"{url}://127.0.0.1:{broker.port}", "ca_file": str(tmp_path / "trust" / "ca.pem")}

    return made


def test_an_authority_that_is_not_ours(agent: Any, secured: Any, tmp_path: Path) -> None:
    settings = secured()
    Authority.create(tmp_path / "foreign", "main", time.time())
    assert agent(settings)["tls"]["status"] == "ok"
    found = agent(settings | {"ca_file": str(tmp_path / "foreign" / "ca.pem")})["tls"]
    assert (found["status"], found["next_step"]) == ("failed", "set broker.ca_file to the authority that issued it")


def test_a_broker_whose_certificate_has_expired(agent: Any, secured: Any) -> None:
    assert "has expired" in agent(secured(begins_s=-1000, life_s=10))["tls"]["found"]


def test_a_broker_whose_certificate_soon_ends(agent: Any, secured: Any) -> None:
    found = agent(secured(life_s=86_400))["tls"]
    assert (found["status"], found["next_step"].partition(":")[0]) == ("warning", "renew the broker's certificate")


def test_a_certificate_for_another_host(agent: Any, secured: Any) -> None:
    assert "for another host name" in agent(secured(name="broker.example"))["tls"]["found"]


def test_a_port_that_speaks_no_tls(agent: Any, mosquitto_broker: Any) -> None:
    found = agent({"url": f"mqtts://127.0.0.1:{mosquitto_broker.port}"})["tls"]
    assert (found["status"], "mqtt://" in found["next_step"]) == ("failed", True)


def test_our_own_certificate_has_expired(agent: Any, tmp_path: Path) -> None:
    authority, key, pem = Authority.create(tmp_path / "t", "main", time.time()), keys.new_key(), tmp_path / "own.pem"
    certificate = authority.client(key.public_key(), "edge-a", time.time() - 1000, 10)
    keys.write_private(pem, keys.key_pem(key) + keys.pem(certificate).encode())
    found = agent({"url": "mqtts://127.0.0.1:1", "cert_file": str(pem)})
    assert "has expired" in found["certificate"]["found"]
    assert "fedpipe enrol --again" in found["certificate"]["next_step"]
    assert found["private-files"]["status"] == "ok"


# -------------------------------------------------------------------------------------------------------- at the broker


def test_a_broker_that_wants_a_password(agent: Any, start_mosquitto: Start) -> None:
    found = agent(at(start_mosquitto("allow_anonymous false")))
    assert found["mqtt"]["status"] == "failed"
    assert "broker.password_file" in found["mqtt"]["next_step"]


def test_access_that_is_denied(agent: Any, start_mosquitto: Start, tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic readwrite elsewhere/#\n")
    found = agent(at(start_mosquitto(f"acl_file {tmp_path}/acl")))
    assert found["publish"]["status"] == "failed"
    assert f"topic write {topics.root}/a/edge-a/up/#" in found["publish"]["next_step"]
    assert found["coordinator"]["status"] == "failed"


def test_access_that_is_not_controlled(agent: Any, mosquitto_broker: Any) -> None:
    found = agent(at(mosquitto_broker))
    assert (found["acl"]["status"], found["publish"]["status"]) == ("warning", "ok")
    assert "mosquitto-config" in found["acl"]["next_step"]


def test_packets_that_are_too_large_for_the_broker(agent: Any, start_mosquitto: Start) -> None:
    found = agent(at(start_mosquitto("max_packet_size 65536")))
    assert found["packet-size"]["status"] == "failed"
    assert "broker.chunk_bytes = 64512" in found["packet-size"]["next_step"]
    assert agent(at(start_mosquitto("max_packet_size 65536"), chunk_bytes=64_512))["publish"]["status"] == "ok"


def test_messages_that_the_broker_does_not_want(agent: Any, start_mosquitto: Start) -> None:
    found = agent(at(start_mosquitto("message_size_limit 10000")))
    assert found["publish"]["status"] == "failed"


def test_few_messages_in_flight(agent: Any, start_mosquitto: Start) -> None:
    assert agent(at(start_mosquitto("max_inflight_messages 2")))["receive-maximum"]["status"] == "warning"


def test_a_broker_of_the_older_protocol(agent: Any, embedded_broker: Any) -> None:
    found = agent(at(embedded_broker))
    assert "MQTT 3.1.1 only" in found["mqtt"]["found"]
    assert found["acl"]["status"] == "skipped"
    assert found["publish"]["status"] == "ok"


def test_a_coordinator_that_is_not_there(agent: Any, mosquitto_broker: Any) -> None:
    assert agent(at(mosquitto_broker))["coordinator"]["status"] == "failed"
    say(mosquitto_broker.url, CoordinatorState(session="c" * 16, online=False))
    assert agent(at(mosquitto_broker))["coordinator"]["status"] == "warning"


def test_a_clock_that_is_behind(agent: Any, mosquitto_broker: Any) -> None:
    say(mosquitto_broker.url, BIRTH, ahead_s=7200)
    found = agent(at(mosquitto_broker))["clock"]
    assert (found["status"], "7200 s" in found["found"] or "7199 s" in found["found"]) == ("failed", True)


def test_a_broker_that_never_answers(agent: Any, mosquitto_broker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpipe.doctor.session.PATIENCE_S", 0.5)
    mosquitto_broker.freeze()
    assert agent(at(mosquitto_broker))["mqtt"]["status"] == "failed"


async def test_a_daemon_that_runs_is_not_thrown_out(agent: Any, mosquitto_broker: Any, tmp_path: Path) -> None:
    await asyncio.to_thread(agent, at(mosquitto_broker))  # writes agent.toml
    (tmp_path / "copy.toml").write_text((tmp_path / "agent.toml").read_text())
    (tmp_path / "fedpipe-agent").write_text("import sys; print(flush=True); sys.stdin.read()")
    command = [sys.executable, tmp_path / "fedpipe-agent", "run", "--config", "agent.toml"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: ASYNC220 - milliseconds
        assert process.stdout is not None
        process.stdout.readline()
        async with mqtt_bus(BrokerConfig(url=mosquitto_broker.url), "edge-a", lambda: None) as daemon:
            assert isinstance(await daemon.next(), Connected)
            _, found = await asyncio.to_thread(doctor, "agent", "--config", tmp_path / "copy.toml", "--quick")
            assert found["mqtt"]["status"] == "ok"
            await daemon.subscribe("t")
            await daemon.publish("t", b"still here")
            assert await daemon.next() == Received("t", b"still here", retained=False)
        process.communicate()


# --------------------------------------------------------------------------------------------------------- this machine


def test_a_password_that_everybody_may_read(agent: Any, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hush")
    secret.chmod(0o644)
    found = agent({"url": "mqtt://127.0.0.1:1", "password_file": str(secret)})["private-files"]
    assert (found["status"], f"chmod 0600 {secret}" in found["next_step"]) == ("failed", True)


def test_a_password_that_is_not_there(agent: Any) -> None:
    found = agent({"url": "mqtt://127.0.0.1:1", "password_file": "/nowhere/password"})
    assert (found["broker"]["status"], found["private-files"]["status"]) == ("failed", "failed")


def test_a_folder_that_cannot_be_written(agent: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert agent(state_dir=str(tmp_path / "file" / "state"))["state-dir"]["status"] == "failed"
    assert agent(state_dir="/proc/self")["state-dir"]["status"] == "failed"


def test_a_disk_without_room(tmp_path: Path) -> None:
    config = tmp_path / "coordinator.toml"
    config.write_text(f'state_dir = "{tmp_path}"\nkeep.min_free_bytes = {2**59}\nbroker.url = "mqtt://127.0.0.1:1"\n')
    code, found = doctor("coordinator", "--config", config, "--quick")
    assert (code, found["disk"]["status"]) == (1, "failed")
    assert found["api"]["status"] == "failed"


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({"models": {"llama": "/nowhere"}}, "/nowhere does not exist"),
        ({"model_dirs": ["/nowhere"]}, "/nowhere does not exist"),
        ({"models": {"llama": "/etc"}}, "has no config.json"),
    ],
)
def test_a_model_that_is_not_there(agent: Any, base: dict[str, Any], words: str) -> None:
    found = agent(base=base)["models"]
    assert (found["status"], words in found["found"]) == ("failed", True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', "broken.jsonl line 2"),
        ("other.jsonl", b'{"question": "?"}\n', "other.jsonl line 1"),
        ("latin.txt", b"na\xefve", "not UTF-8"),
        ("empty.jsonl", b"", "holds no example"),
        ("page.html", b"<p>", "unknown kind of file"),
    ],
)
def test_data_that_cannot_be_used(agent: Any, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = agent(data={"default": {"path": str(tmp_path / name)}})["data"]
    assert (found["status"], words in found["found"] + found["next_step"]) == ("failed", True), found


def test_a_gpu_that_is_wanted_and_not_there(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = agent(device="cuda")["gpu"]
    assert (found["status"], 'device = "cuda" needs one' in found["found"]) == ("failed", True)


def test_a_torch_that_reaches_no_gpu_and_a_broken_bitsandbytes(
    agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bitsandbytes.py").write_text("raise RuntimeError('libbitsandbytes_cuda124.so: not found')")
    found = agent(device="cuda", quick=False)
    assert [found[check]["status"] for check in ("torch", "cuda", "bitsandbytes")] == ["ok", "failed", "warning"]
    assert "reaches no GPU" in found["cuda"]["found"]
    assert "libbitsandbytes_cuda124.so" in found["bitsandbytes"]["found"]
    assert "limits.bits" in found["bitsandbytes"]["next_step"]


def test_a_torch_that_cannot_be_imported(agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    found = agent(quick=False)
    assert (found["torch"]["status"], found["bitsandbytes"]["status"]) == ("failed", "skipped")
    assert "libcudart.so.12" in found["torch"]["found"]


@pytest.mark.parametrize("text", ["agent = ", "agent = 'Edge A'", "agent = 'a'\nbrocker.url = ''"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    code, found = doctor("agent", "--config", file)
    assert (code, list(found)) == (78, ["configuration"])


# ------------------------------------------------------------------------------------------------------ the coordinator


def test_an_operator_with_the_wrong_token(serve: Any, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for file in (right, wrong):
        file.write_text(file.name)
        file.chmod(0o600)
    url = serve(token_file=str(right)).url
    code, found = doctor("operator", "--url", url, "--token-file", right)
    assert (code, {one["status"] for one in found.values()}) == (0, {"ok"}), found
    code, found = doctor("operator", "--url", url, "--token-file", wrong)
    assert (code, found["api"]["status"]) == (1, "failed")
    assert "--token-file" in found["api"]["next_step"]


def test_a_coordinator_in_another_time(served: Any) -> None:
    served.coordinator.clock._offset += 100.0
    assert doctor("operator", "--url", served.url)[1]["clock"]["status"] == "warning"


def test_agents_that_are_missing(served: Any) -> None:
    served.join("anna", "berta")
    assert doctor("operator", "--url", served.url)[1]["fleet"]["status"] == "ok"
    served.post(AgentLeft(agent="berta", session="b" * 16, reason="unplugged"))
    found = doctor("operator", "--url", served.url)[1]["fleet"]
    assert (found["status"], "berta" in found["found"], "anna" in found["found"]) == ("warning", True, False)


def test_something_else_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def answer() -> None:
            link, _ = listening.accept()
            with link:
                link.recv(4096)
                link.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")

        threading.Thread(target=answer, daemon=True).start()
        assert doctor("operator", "--url", url)[1]["api"]["status"] == "failed"


# ----------------------------------------------------------------------------------------------------------- the runner


def test_a_look_that_hangs_or_breaks_hides_no_other() -> None:
    never = threading.Event()

    def hangs() -> Any:
        yield ok("a", "fine")
        never.wait()

    def breaks() -> Any:
        yield from ()
        raise KeyError("x")

    def refuses() -> Any:
        yield from ()
        raise BadConfig("what is wrong: what to do")

    series = [
        Series(("a", "b", "c"), hangs, limit_s=0.2),
        Series(("d", "e"), breaks),
        Series(("f",), refuses),
        Series(("g",), lambda: [ok("g", "fine")]),
    ]
    found = {one.check: (one.status, one.found, one.next_step) for one in examine(series)}
    never.set()
    assert list(found) == list("abcdefg")
    assert (found["a"][0], found["b"][0], found["c"]) == (
        Status.OK,
        Status.FAILED,
        (Status.SKIPPED, "needs b first", ""),
    )
    assert found["d"][1] == "KeyError: 'x'"
    assert found["e"][0] is Status.SKIPPED
    assert found["f"] == (Status.FAILED, "what is wrong", "what to do")
    assert found["g"][0] is Status.OK


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ({}, Status.WARNING, "no unit"),
        ({"LoadState": "loaded", "ActiveState": "failed", "Result": "watchdog"}, Status.FAILED, "watchdog"),
        ({"LoadState": "loaded", "ActiveState": "inactive"}, Status.WARNING, "inactive"),
        ({"LoadState": "loaded", "ActiveState": "active", "NRestarts": "9"}, Status.WARNING, "9 restarts"),
        ({"LoadState": "loaded", "ActiveState": "active", "WatchdogUSec": "0"}, Status.WARNING, "without a watchdog"),
        ({"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "disabled"}, Status.WARNING, "not start"),
        ({"LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled"}, Status.OK, "runs"),
    ],
)
def test_what_systemd_says(state: dict[str, str], status: Status, words: str) -> None:
    found = judged("fedpipe-agent", state)
    assert (found.status, words in found.found) == (status, True)


def test_for_people(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("agent = ")
    done = CliRunner().invoke(app, ["doctor", "agent", "--config", str(file)], env={"COLUMNS": "200"})
    assert done.exit_code == 78
    assert "configuration  failed" in done.stdout
    assert "fedpipe init" in done.stdout
    wrong = CliRunner().invoke(app, ["doctor", "janitor"])
    assert (wrong.exit_code, "agent, coordinator, operator" in wrong.stderr) == (78, True)
