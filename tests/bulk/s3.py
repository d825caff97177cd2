"""A real S3 server, which checks signatures and lengths: OpenStack Swift with its S3 interface, on one disk."""

from __future__ import annotations

import contextlib
import getpass
import subprocess
import sys
import time
from pathlib import Path

import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

from fedpipe.broker import free_port

KEY_ID, SECRET = "test:tester", "secret"
BUCKET = "bulk"
START_S = 60.0
STORAGE = ("account", "container", "object")

RING = """
import sys
from swift.common.ring import RingBuilder
ring, port = RingBuilder(part_power=4, replicas=1, min_part_hours=0), int(sys.argv[2])
place = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
ring.add_dev({"id": 0, "region": 1, "zone": 1, "device": "disk", "weight": 1.0, "meta": "", **place})
ring.rebalance()
ring.get_ring().save(sys.argv[1])
"""

DAEMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}
mount_check = false
workers = 0
user = {user}
[pipeline:main]
pipeline = {filters} {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY = """
account_autocreate = true
error_suppression_limit = 1000000
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
"""


class S3:
    """A server with a bucket, which can die and come back on the same port."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("swift", reason="its erasure codes have wheels for Linux on x86-64 alone")
        self._folder = folder
        self._ports = {name: free_port() for name in (*STORAGE, "proxy")}
        self._processes: list[subprocess.Popen[bytes]] = []
        self.endpoint = f"http://127.0.0.1:{self._ports['proxy']}"
        self._client = get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=5),
        )

    def start(self) -> None:
        if not (self._folder / "disk").exists():
            self._install()
        for name in self._ports:
            with (self._folder / f"{name}.log").open("ab") as log:
                command = [sys.executable, _command(f"swift-{name}-server"), str(self._folder / f"{name}.conf")]
                self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                with contextlib.suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
                    self._client.create_bucket(Bucket=BUCKET)
                self.overwrite("ready", b"")
                self._client.delete_object(Bucket=BUCKET, Key="ready")
            except (BotoCoreError, ClientError):
                dead = [process for process in self._processes if process.poll() is not None]
                assert not dead, f"the S3 server ended: {dead[0].args}"
                time.sleep(0.05)
            else:
                return
        pytest.fail("the S3 server does not listen")

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def names(self) -> list[str]:
        """Every object."""
        return [found["Key"] for found in self._client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def overwrite(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def empty(self) -> None:
        for name in self.names():
            self._client.delete_object(Bucket=BUCKET, Key=name)

    def _install(self) -> None:
        (self._folder / "disk").mkdir(parents=True)
        (self._folder / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = fedpipe\n[storage-policy:0]\nname = one\ndefault = yes\n"
        )
        for name in STORAGE:
            ring = self._folder / f"{name}.ring.gz"
            subprocess.run([sys.executable, "-c", RING, str(ring), str(self._ports[name])], check=True)
        for name, port in self._ports.items():
            filters = "catch_errors cache s3api tempauth" if name == "proxy" else ""
            text = DAEMON.format(name=name, port=port, folder=self._folder, filters=filters, user=getpass.getuser())
            more = PROXY.format(secret=SECRET) if name == "proxy" else ""
            (self._folder / f"{name}.conf").write_text(text + more)


def _command(name: str) -> str:
    return str(Path(sys.executable).parent / name)
