"""How fast, how fair and how complete bulk moves over a real broker: make bench-transfer (minutes; one part: --only broadcast).

Everything but the daemons around it is real: protocol/exchange.py on our MQTT bus, files on the disk, digests verified, and a
mosquitto with the configuration that we recommend.  Senders and receivers are processes of their own.  The parts:

- throughput: an update pulled from one agent, beside the same frames published at QoS 0 as fast as the bus takes them;
- fairness:   ten agents that upload at once;
- distance:   an agent behind a link of 100 ms and a given bandwidth (a relay that delays and paces each direction);
- narrow:     a hundred agents, each behind a link of 2 Mbit/s of its own: they should all upload at once
- broadcast:  one model to a hundred agents, a third of which want the first half of it; and once more with 5 % of the chunks
              lost, at each receiver on its own.

Ratios are what to look at: the machine is shared by broker, senders and receivers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from bench.transfer_live.parts import broadcast, distance, fairness, narrow, throughput
from bench.transfer_live.world import mosquitto

Part = Callable[[int, Path], Coroutine[Any, Any, dict[str, Any]]]
PARTS: Final = ("throughput", "fairness", "distance", "narrow", "broadcast")


async def measure(only: Sequence[str], n_agents: int) -> dict[str, Any]:
    """Every part that is asked for, each on a broker of its own."""
    found: dict[str, Any] = {}
    work: dict[str, list[Part]] = {
        "throughput": [lambda port, at: throughput(port, at, 64 * 2**20)],
        "fairness": [lambda port, at: fairness(port, at, 16 * 2**20)],
        "distance": [
            lambda port, at: distance(port, at, 20, 24 * 2**20),
            lambda port, at: distance(port, at, 200, 192 * 2**20),
            lambda port, at: distance(port, at, 1000, 384 * 2**20),
        ],
        "narrow": [lambda port, at: narrow(port, at, 2, 2 * 2**20, n_agents)],
        "broadcast": [
            lambda port, at: broadcast(port, at, 32 * 2**20, n_agents, 0.0),
            lambda port, at: broadcast(port, at, 32 * 2**20, n_agents, 0.05),
        ],
    }
    for part in only:
        found[part] = []
        for one in work[part]:
            with tempfile.TemporaryDirectory() as folder, mosquitto(Path(folder)) as port:
                found[part].append(await one(port, Path(folder)))
            print(part, found[part][-1], flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.transfer_live")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--agents", type=int, default=100, help="of the broadcast")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.only or PARTS, arguments.agents))
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg()} | found, indent=1))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
