"""A configuration read anew: what the comparison promises, and both real daemons under a real SIGHUP."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe.broker import free_port
from protocol.reloading import Live, changes, merged

PATIENCE_S = 60.0


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    a: int = 0
    b: int = 0


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    x: int = 0
    inner: Inner = Inner()
    table: dict[str, int] = {}


KEYS = ["x", "inner.a", "inner.b", "table"]
few = st.integers(0, 1)
outers = st.builds(
    Outer, x=few, inner=st.builds(Inner, a=few, b=few), table=st.dictionaries(st.sampled_from("kl"), few)
)


@given(outers, outers, st.sets(st.sampled_from([*KEYS, "inner"])), st.sets(st.sampled_from(KEYS)))
def test_what_may_change_does_and_the_rest_stays(old: Outer, new: Outer, names: set[str], but: set[str]) -> None:
    live = Live(names, but)
    found = merged(old, new, live)
    assert changes(old, found) == [key for key in changes(old, new) if key in live]
    assert changes(found, new) == [key for key in changes(old, new) if key not in live]
    assert (changes(old, new) == []) == (old == new)


@pytest.mark.parametrize("key", KEYS)
def test_a_name_stands_for_what_is_below_it(key: str) -> None:
    assert (key in Live(["inner"])) == key.startswith("inner.")
    assert (key in Live(["inner"], but=["inner.b"])) == (key == "inner.a")
    assert key not in Live(["in", "tab"])


class Systemd:
    """The socket that systemd listens on, with the daemon that it started."""

    def __init__(self, folder: Path, package: str, config: Path) -> None:
        name = f"@fedpipe-{secrets.token_hex(8)}"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + name[1:])
        self.sock.settimeout(PATIENCE_S)
        self.log = (folder / f"{package}.log").open("w+b")
        command = [sys.executable, "-m", package, "run", "--config", str(config)]
        self.process = subprocess.Popen(command, stderr=self.log, env=os.environ | {"NOTIFY_SOCKET": name})

    def told(self, key: str) -> dict[str, str]:
        """The next message with this key."""
        while True:
            fields = dict(line.split("=", 1) for line in self.sock.recv(65_536).decode().splitlines())
            if key in fields:
                return fields

    def reload(self) -> str:
        """What systemd hears of a reload: its status at the end."""
        before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.process.send_signal(signal.SIGHUP)
        assert int(self.told("RELOADING")["MONOTONIC_USEC"]) >= before_us
        return self.told("READY")["STATUS"]

    def lines(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.sock.close()
        self.log.close()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    running: list[Systemd] = []

    def start(package: str, config: Path) -> Systemd:
        running.append(Systemd(tmp_path, package, config))
        running[-1].told("READY")
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_a_coordinator_under_sighup(tmp_path: Path, started: Any) -> None:
    config, token, state = tmp_path / "coordinator.toml", tmp_path / "token", tmp_path / "state"
    nobody = f"mqtt://127.0.0.1:{free_port()}"

    def write(more: str = "", *, url: str = nobody) -> None:
        config.write_text(
            f'state_dir = "{state}"\n{more}\n[broker]\nurl = "{url}"\n[web]\nport = 0\ntoken_file = "{token}"\n'
        )

    token.write_text("first")
    write()
    systemd = started("coordinator", config)
    place = state / "api.json"
    while not place.exists():
        assert systemd.process.poll() is None, systemd.lines()
        time.sleep(0.01)
    url = msgspec.json.decode(place.read_bytes())["url"]

    def status_with(word: str) -> int:
        return httpx.get(f"{url}/v1/fleet", headers={"authorization": f"Bearer {word}"}).status_code

    assert (status_with("first"), status_with("second")) == (200, 401)
    token.write_text("second")
    write('max_agents = 7\nlog_level = "DEBUG"', url="mqtt://127.0.0.1:1")
    assert systemd.reload() == "restart for: broker.url"
    assert (status_with("first"), status_with("second")) == (401, 200)
    assert "applied=max_agents,log_level" in systemd.lines()

    write("max_agents = 'many'")
    assert "max_agents" in systemd.reload()
    assert status_with("second") == 200, "the old configuration holds"
    token.unlink()
    write("max_agents = 8")
    assert "token" in systemd.reload()
    assert status_with("second") == 200
    token.write_text("third")
    assert systemd.reload() == "configuration read anew"
    assert status_with("third") == 200

    systemd.process.terminate()
    assert systemd.process.wait(PATIENCE_S) == 0, systemd.lines()
    assert "Traceback" not in systemd.lines()


def test_an_agent_under_sighup(tmp_path: Path, started: Any) -> None:
    config, port = tmp_path / "agent.toml", free_port()

    def write(hours: str, name: str = "a1") -> None:
        config.write_text(
            f'agent = "{name}"\nstate_dir = "{tmp_path}"\ndevice = "cpu"\nmetrics = "127.0.0.1:{port}"\n'
            f'[broker]\nurl = "mqtt://127.0.0.1:{free_port()}"\n[limits]\nhours = [{hours}]\n[limits.yield_to]\nmin_free_bytes = 0\n'
        )

    def level() -> str:
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        (found,) = [line for line in lines if line.startswith("fedpipe_host_level") and line.endswith(" 1.0")]
        return found.split('"')[1]

    write("")
    systemd = started("agent", config)
    while "metrics at" not in systemd.lines():
        assert systemd.process.poll() is None, systemd.lines()
        time.sleep(0.01)
    assert level() == "run"
    hour = time.localtime().tm_hour
    write(f'"{(hour + 12) % 24:02}:00-{(hour + 12) % 24:02}:01"', name="a2")
    assert systemd.reload() == "restart for: agent, broker.url"
    while level() != "pause":
        assert systemd.process.poll() is None, systemd.lines()
        time.sleep(0.01)
    systemd.process.terminate()
    assert systemd.process.wait(PATIENCE_S) == 0, systemd.lines()
    assert "Traceback" not in systemd.lines()
