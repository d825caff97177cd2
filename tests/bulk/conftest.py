from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from coordinator.bucket import Bucket, BulkConfig
from fedpipe.broker import free_port

START_S = 60.0


class S3:
    """A real S3 server (moto), which can die and come back empty on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-c",
            "from moto.server import main; main()",
            "-H",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                self._ask("PUT", "/bulk")
            except httpx.TransportError:
                assert self._process.poll() is None, "the S3 server ended"
                time.sleep(0.05)
            else:
                return
        pytest.fail("the S3 server does not listen")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def names(self) -> list[str]:
        """Every object."""
        found = self._ask("GET", "/bulk?list-type=2")
        return [part.partition("</Key>")[0] for part in found.split("<Key>")[1:]]

    def overwrite(self, name: str, data: bytes) -> None:
        self._ask("PUT", f"/bulk/{name}", data)

    def empty(self) -> None:
        for name in self.names():
            self._ask("DELETE", f"/bulk/{name}")

    def _ask(self, method: str, path: str, data: bytes | None = None) -> str:
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20261120/us-east-1/s3/aws4_request"}
        return httpx.request(method, self.endpoint + path, content=data, headers=headers).raise_for_status().text


@pytest.fixture(scope="session")
def running_s3() -> Iterator[S3]:
    server = S3()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3(running_s3: S3) -> Iterator[S3]:
    """A real S3 server with an empty bucket "bulk"."""
    yield running_s3
    running_s3.empty()


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every tool of AWS finds it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bucket(s3: S3) -> Callable[..., Bucket]:
    """The coordinator's account there."""

    def made(**changes: object) -> Bucket:
        return Bucket(BulkConfig(url="s3://bulk/lab", endpoint=s3.endpoint, **changes))  # type: ignore[arg-type]

    return made
