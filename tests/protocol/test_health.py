"""The watchdog hears of a real coordinator that hangs; who is refused by a real broker ends with 77, or goes on, for good reason."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.core.events import AgentJoined
from coordinator.daemon import Coordinator
from protocol.bus import BrokerConfig
from protocol.credentials import Credentials
from protocol.daemon import EX_NOPERM
from protocol.errors import NotAllowed
from protocol.health import LATE_S, LOOK_S, LOOKS, Health
from protocol.memory_bus import MemoryBroker
from protocol.mqtt_bus import MqttBus
from protocol.mqtt_link import NotWelcome

PATIENCE_S = 60.0


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that systemd listens on, for a service with a watchdog of 20 ms."""
    name = f"@fedpipe-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:])
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "20000")
        yield sock


class Asked(Health):
    """Counts how often the watchdog asked in vain."""

    n_refused = 0

    def ok(self) -> bool:
        fine = super().ok()
        self.n_refused += not fine
        return fine


async def test_a_stuck_consumer_is_not_fed(systemd: socket.socket, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()

    async def told(what: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not (await loop.sock_recv(systemd, 4096)).decode().startswith(what):
                pass

    one = Coordinator(CoordinatorConfig(state_dir=str(tmp_path)), MemoryBroker().bus("coordinator"))
    one.health = asked = Asked(one.disk.refusal, stuck_s=0.05)
    append, free = one.store.append, threading.Event()

    def hangs(events: Any) -> list[int]:
        assert free.wait(PATIENCE_S)
        return append(events)

    one.store.append = hangs  # type: ignore[method-assign]
    stop = asyncio.Event()
    running = asyncio.create_task(one.run(stop))
    await told("WATCHDOG=1")
    one.tell(AgentJoined(agent="a", session="0" * 16))
    await told("STATUS=not healthy: one piece of work has taken")
    asked.n_refused = 0
    while asked.n_refused < 5:  # noqa: ASYNC110 - five periods of the watchdog
        await asyncio.sleep(0.001)
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)
    free.set()
    await told("STATUS=healthy again")
    await told("WATCHDOG=1")
    stop.set()
    await running


def test_a_disk_that_refuses_is_no_illness() -> None:
    now, why = [0.0], [""]
    health = Health(lambda: why[0], stuck_s=10.0, clock=lambda: now[0])
    assert health.ok()
    with health.busy():
        assert health.is_busy
        now[0] = 9.0
        assert health.ok()
        now[0] = 11.0
        assert not health.ok()
        why[0] = "the disk is full"
        assert health.ok()
        why[0] = ""
        assert not health.ok()
    assert health.ok()
    with pytest.raises(ZeroDivisionError), health.busy():
        raise ZeroDivisionError
    assert health.is_busy, "broken off in the middle"


async def test_a_loop_that_is_always_late_is_ill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock runs fast, so that every second of the loop takes half a minute of it."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    health = Health(clock=lambda: (loop.time() - began_s) * 1000)
    monkeypatch.setattr("protocol.health.LOOK_S", 0.05)
    watching = asyncio.create_task(health.watch())
    while sum(health.lag_s.counts) < LOOKS:
        assert health.ok()
        await asyncio.sleep(0.01)
    assert "event loop comes" in health.fault
    assert not health.ok()
    watching.cancel()
    assert 0 < LOOK_S < LATE_S


# --------------------------------------------------------------------------------------------------------- credentials


def credentials(folder: Path, url: str = "mqtt://b:1", client: str = "a1") -> Credentials:
    return Credentials(folder / "welcomed", BrokerConfig(url=url), client)


def test_what_was_welcome_once_is_tried_for_ever(tmp_path: Path) -> None:
    fresh = credentials(tmp_path)
    fresh.refused("", "nothing listens there")
    with pytest.raises(NotAllowed, match="wrong password; it is no use"):
        fresh.refused("credentials", "wrong password")
    fresh.taken()
    fresh.refused("credentials", "wrong password")
    credentials(tmp_path).refused("credentials", "wrong password")
    for other in (credentials(tmp_path, url="mqtt://c:1"), credentials(tmp_path, client="a2")):
        with pytest.raises(NotAllowed):
            other.refused("credentials", "wrong password")
    with pytest.raises(NotAllowed):
        fresh.refused("revoked", "revoked")


def test_a_damaged_memory_is_none(tmp_path: Path) -> None:
    (tmp_path / "welcomed").write_bytes(b"\xff\xfe")
    with pytest.raises(NotAllowed):
        credentials(tmp_path).refused("credentials", "wrong password")
    one = Credentials(tmp_path / "no" / "folder", BrokerConfig(), "a1")
    one.taken()
    one.refused("credentials", "wrong password")


async def test_a_bus_ends_although_its_cancellation_meets_the_broker_s_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def answered(*_: object) -> None:
        """As asyncio.wait_for of Python 3.11 does when what it waits for ends at the moment of the cancellation."""
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise NotWelcome("not authorized", 135)

    monkeypatch.setattr(MqttBus, "_attempt", answered)
    async with asyncio.timeout(PATIENCE_S):
        async with MqttBus(BrokerConfig(protocol="5"), "one", lambda: None):
            await begun.wait()


@pytest.mark.parametrize("package", ["agent", "coordinator"])
def test_a_daemon_that_was_never_welcome_ends_with_77(
    package: str, tmp_path: Path, start_mosquitto: Callable[..., Any]
) -> None:
    broker = start_mosquitto("allow_anonymous false")
    config = tmp_path / "daemon.toml"
    mine = 'agent = "a1"\ndevice = "cpu"' if package == "agent" else ""
    config.write_text(
        f'{mine}\nstate_dir = "{tmp_path}/state"\n[broker]\nurl = "{broker.url}"\nusername = "me"\nreconnect_max_s = 0.05\n'
        + ("[web]\nport = 0\n" if package == "coordinator" else "")
    )
    command = [sys.executable, "-m", package, "run", "--config", str(config)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=os.environ | {"NOTIFY_SOCKET": ""}
    )
    assert done.returncode == EX_NOPERM, done.stderr
    assert "Traceback" not in done.stderr
    assert "not authorized: check the user name and password" in done.stderr.splitlines()[-1]
    assert done.stderr.count("no broker:") == 2, "once when it happened, once when the broker insisted"
