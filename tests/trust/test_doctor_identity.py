"""`fedpipe doctor` on a server that is enrolled, at a broker under the generated configuration: all well, then revoked."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from typer.testing import CliRunner

from fedpipe.__main__ import app
from fedpipe.broker import free_port
from fedpipe.enrolling import Place, enrol
from protocol import codec
from protocol.bus import Connected, mqtt_bus
from protocol.messages import CoordinatorState
from protocol.topics import Topics

if TYPE_CHECKING:
    from tests.trust.conftest import World

topics = Topics("main")


def doctor(config: Path, *more: str) -> dict[str, dict[str, str]]:
    done = CliRunner().invoke(app, ["doctor", "agent", "--config", str(config), "--quick", "--json", *more])
    (report,) = json.loads(done.stdout)
    return {one["check"]: one for one in report["findings"]}


def be_born(world: World, seal: Callable[[str, bytes], bytes]) -> None:
    """The coordinator's signed birth lies on the broker."""

    async def say() -> None:
        async with mqtt_bus(world.broker(world.coordinator), "c", lambda: None) as bus:
            assert isinstance(await bus.next(), Connected)
            birth = CoordinatorState(session="c" * 16, online=True, software="fedpipe 1")
            payload = codec.encode(birth, session="c" * 16, seq=1, now=time.time())
            await bus.publish(topics.coordinator_state(), seal(topics.coordinator_state(), payload), retain=True)

    asyncio.run(say())


def test_an_enrolled_agent(world: World, open_desk: Any, tmp_path: Path) -> None:
    office = world.office
    token = office.make_token("a", 1, 3600.0, auto_accept=True, now=time.time())
    place = Place(tmp_path / "agent.toml", tmp_path / "state")
    enrol(open_desk().url, token, "", place, lambda _: None, 5.0)
    place.config.write_text(place.config.read_text().replace(":8883", f":{world.port}"))
    be_born(world, office.keyring.sign)

    found = doctor(place.config)
    assert {check for check, one in found.items() if one["status"] == "failed"} == set()
    session = ("tls", "mqtt", "publish", "acl", "subscribe", "coordinator", "clock")
    assert {check: found[check]["status"] for check in session} == dict.fromkeys(session, "ok")
    here = ("certificate", "private-files", "identity", "enrolment")
    assert {check: found[check]["status"] for check in here} == dict.fromkeys(here, "ok")
    assert not (place.identity / "heard.json").exists()  # the daemon's memory of orders is not touched

    pinned = place.identity / "trust.json"
    trust = pinned.read_bytes()
    pinned.write_bytes(
        msgspec.json.encode(msgspec.json.decode(trust) | {"coordinator": f"https://127.0.0.1:{free_port()}"})
    )
    silent = doctor(place.config)["enrolment"]
    assert (silent["status"], "open its port" in silent["next_step"]) == ("failed", True)
    pinned.write_bytes(trust)

    be_born(world, lambda _, payload: payload)
    assert "not to be trusted" in doctor(place.config)["coordinator"]["found"]

    (tmp_path / "fedpipe-agent").write_text("import sys; print(flush=True); sys.stdin.read()")
    command = [sys.executable, tmp_path / "fedpipe-agent", "run", "--config", place.config]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        left_alone = doctor(place.config)["mqtt"]
        assert (left_alone["status"], "--take-over" in left_alone["next_step"]) == ("skipped", True)
        assert doctor(place.config, "--take-over")["mqtt"]["status"] == "ok"
        daemon.communicate()

    office.revoke("a", "", time.time())
    world.reload()
    found = doctor(place.config)
    assert "revoked" in found["mqtt"]["found"] + found["mqtt"]["next_step"]
    assert found["certificate"]["status"] == "ok"
