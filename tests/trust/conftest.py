"""A fleet's trust in a folder, and clients of a real mosquitto with its generated configuration."""

from __future__ import annotations

import getpass
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from coordinator.https import Server
from coordinator.trust import mosquitto, own
from coordinator.trust.authority import Authority
from coordinator.trust.bounds import listening
from coordinator.trust.desk import desk
from coordinator.trust.office import Office, create
from fedpipe.broker import free_port, mosquitto_command
from protocol import keys
from protocol.bus import BrokerConfig
from protocol.enrolment import Enrol, Enrolled

START_S = 30.0


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    folder = tmp_path / "trust"
    create(folder, "main", time.time())
    found = Office(folder, "main", "mqtts://127.0.0.1:8883")
    yield found
    found.registry.close()


def enrolled(office: Office, agent: str, now: float | None = None) -> tuple[keys.Key, Enrolled]:
    """An accepted agent: its key and what it was told."""
    now = time.time() if now is None else now
    token = office.make_token(agent, 1, 3600.0, auto_accept=True, now=now)
    key = keys.new_key()
    return key, office.enrol(Enrol(token=str(token), csr=keys.request(key, agent)), "192.0.2.1", now)


@pytest.fixture
def enrol(office: Office) -> Callable[..., tuple[keys.Key, Enrolled]]:
    return lambda agent, now=None: enrolled(office, agent, now)


class World:
    """A mosquitto under the fleet's generated configuration, and everybody's files."""

    def __init__(self, folder: Path, office: Office) -> None:
        self.folder, self.office, self.port = folder, office, free_port()
        self.files = folder / "mosquitto"
        mosquitto.write(self.files, office, ["127.0.0.1"], self.port, time.time())
        own.client_certificate(office.folder, office.authority, office.fleet, time.time())
        conf, self.log = folder / "broker.conf", folder / "broker.log"
        text = (self.files / "mosquitto.conf").read_text()
        conf.write_text(f"user {getpass.getuser()}\nlog_dest file {self.log}\n{text}")
        *command, _ = mosquitto_command(self.port, folder)
        self._command = [*command, str(conf)]
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert time.monotonic() < end, "the broker does not listen"
                assert self.process.poll() is None, self.log.read_text()
            else:
                break

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def restart(self) -> None:
        self.close()
        self._start()

    def reload(self) -> None:
        """What deploy/mosquitto's units do after a change; returns when mosquitto has read its files."""
        mosquitto.refresh(self.files, self.office, time.time())
        n_before = self._n_reloads()
        self.process.send_signal(signal.SIGHUP)
        while self._n_reloads() == n_before:
            assert self.process.poll() is None
            time.sleep(0.01)

    def _n_reloads(self) -> int:
        return self.log.read_text().count("Reloading config")

    def agent(self, name: str) -> Path:
        """Key and certificate of an accepted agent, as one file."""
        key, told = enrolled(self.office, name)
        return self.keep(name, key, told.certificate)

    def issued(self, name: str, authority: Authority, now: float, life_s: float) -> Path:
        """Key and certificate by any authority, valid at any time."""
        key = keys.new_key()
        return self.keep(name, key, keys.pem(authority.client(key.public_key(), name, now, life_s)))

    def keep(self, name: str, key: keys.Key, certificate: str) -> Path:
        path = self.folder / f"{name}-{len(list(self.folder.iterdir()))}.pem"
        keys.write_private(path, keys.key_pem(key) + certificate.encode())
        return path

    @property
    def coordinator(self) -> Path:
        return self.office.folder / own.CLIENT_FILE

    def broker(self, certificate: Path | None, host: str = "127.0.0.1", authority: Path | None = None) -> BrokerConfig:
        return BrokerConfig(
            url=f"mqtts://{host}:{self.port}",
            ca_file=str(authority or self.files / "ca.pem"),
            cert_file=str(certificate) if certificate else "",
            reconnect_max_s=0.2,
        )


@pytest.fixture
def world(tmp_path: Path, office: Office) -> Iterator[World]:
    found = World(tmp_path, office)
    yield found
    found.close()


class Desk:
    """The window for servers on a real port with TLS, in a thread of its own."""

    def __init__(
        self, office: Office, names: list[str], app: Starlette | None, settings: dict[str, Any] | None
    ) -> None:
        import asyncio
        import threading

        own.https_certificate(office.folder, office.authority, names, time.time())
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}"
        self.server = Server(app or desk(office), office.folder / own.HTTPS_FILE, **(settings or listening()))
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self._listening])), daemon=True)
        self._thread.start()

    def context(self, office: Office) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=office.authority.pem)

    def close(self) -> None:
        self.server.should_exit = True
        self._thread.join(START_S)


@pytest.fixture
def open_desk(office: Office) -> Iterator[Callable[..., Desk]]:
    opened: list[Desk] = []

    def made(names: tuple[str, ...] = (), app: Starlette | None = None, settings: dict[str, Any] | None = None) -> Desk:
        opened.append(Desk(office, list(names), app, settings))
        return opened[-1]

    yield made
    for one in opened:
        one.close()
