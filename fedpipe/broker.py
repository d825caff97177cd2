"""Brokers to start by hand: mosquitto, the reference, and an embedded one for machines that have none.

Both run as processes of their own, on the loopback interface only, without persistence and without authentication: right for the
demo and for tests, wrong for anything that another machine can reach (see deploy/mosquitto/ for that).

    python -m fedpipe.broker --port 1883        # the embedded one; says "ready" on stdout, ends with 0 on SIGTERM
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import getpass
import os
import random
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from protocol.errors import Unavailable

MALLOC: Final = {"MALLOC_TRIM_THRESHOLD_": 4 * 2**20, "MALLOC_MMAP_THRESHOLD_": 2**20}
"""mallopt(3), for mosquitto: else glibc gives each chunk's pages back, and the kernel zeroes them for the next; that is half of
its processor time.  deploy/mosquitto/service.conf says the same to systemd."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at this moment.

    Below the range from which clients get theirs: who knocks at a closed port of that range may end up connected to itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def embedded_command(port: int, host: str = "127.0.0.1") -> list[str]:
    """The command line of the embedded broker."""
    return [sys.executable, "-m", "fedpipe.broker", "--host", host, "--port", str(port)]


def mosquitto_command(port: int, folder: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command line of a mosquitto for `port`, which ends with its configuration, written into `folder`, `extra` lines last.

    Raises Unavailable when mosquitto is not installed.
    """
    # Debian installs it where only root's PATH looks.
    binary = shutil.which(
        "mosquitto", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    )
    if binary is None:
        raise Unavailable("mosquitto is not installed: apt-get install mosquitto (or choose the embedded broker)")
    lines = [
        f"listener {port} 127.0.0.1",
        "allow_anonymous true",
        f"user {getpass.getuser()}",
        "set_tcp_nodelay true",
        "max_queued_bytes 67108864",
        "max_queued_messages 100000",
        "max_packet_size 1048576",
        "persistence false",
        "log_dest stdout",
        *extra,
    ]
    conf = folder / "mosquitto.conf"
    conf.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["env", *(f"{name}={n_bytes}" for name, n_bytes in MALLOC.items()), binary, "-c", str(conf)]


def main() -> None:
    """Run the embedded broker until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m fedpipe.broker", description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1883)
    arguments = parser.parse_args()
    try:
        from fedpipe.embedded import serve
    except ImportError:
        sys.exit("the embedded broker needs amqtt: pip install 'fedpipe[demo]'")
    asyncio.run(serve(arguments.host, arguments.port))


if __name__ == "__main__":
    main()
