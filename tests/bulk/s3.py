"""A real S3 server, as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

import httpx
import pytest

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
