from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedpipe.broker import embedded_command, free_port, mosquitto_command

START_S = 30.0


class BrokerProcess:
    """A broker that can die and come back on the same port."""

    def __init__(self, command: Callable[[int], list[str]]) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._command = command(self.port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self._process.poll() is not None:
                    pytest.fail(f"broker ended with {self._process.returncode}: {self._errors()}")
                time.sleep(0.01)
            else:
                return
        pytest.fail(f"broker does not listen after {START_S} s")

    def freeze(self) -> None:
        """It is still there but does nothing any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._errors()
            self._process = None

    def terminate(self) -> int:
        """Ask it to end; its exit status."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(START_S)
        self._errors()
        self._process = None
        return status

    def _errors(self) -> str:
        assert self._process is not None
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            return stream.read().decode(errors="replace")


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., BrokerProcess]]:
    """A function that starts a mosquitto; its arguments are further lines for mosquitto.conf."""
    started: list[BrokerProcess] = []

    def start(*lines: str) -> BrokerProcess:
        folder = tmp_path / f"mosquitto-{len(started)}"
        folder.mkdir()
        broker = BrokerProcess(lambda port: mosquitto_command(port, folder, lines))
        started.append(broker)
        broker.start()
        return broker

    yield start
    for broker in started:
        broker.kill()


@pytest.fixture
def mosquitto_broker(start_mosquitto: Callable[..., BrokerProcess]) -> BrokerProcess:
    """The reference broker, running: `.url`, `.port`, `.kill()`, `.start()`, `.freeze()`, `.terminate()`."""
    return start_mosquitto()


@pytest.fixture
def embedded_broker() -> Iterator[BrokerProcess]:
    """The embedded broker, running, as `mosquitto_broker`."""
    broker = BrokerProcess(embedded_command)
    broker.start()
    yield broker
    broker.kill()
