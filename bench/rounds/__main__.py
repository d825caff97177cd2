"""`make bench-rounds`: what a round costs beside its training, and what Flower and NVFlare take for the same.

Everything in one call on one machine: bare publishes of the same bytes, fedpipe without and with TLS, with few and with many
tensors, with exact sums of products, at 10 and at 100 agents; Flower and NVFlare as they are deployed.  Each finished part is
kept in the result, so parts can be run one by one with --only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from bench.rounds import bare, own, peers, report
from bench.rounds.fleet import Payload, start_broker
from fedpipe.cluster import Cluster

RESULT: Final = Path(__file__).parents[1] / "results" / "rounds.json"
TENSORS: Final = (2, 448, 12_008)
CHUNK_BYTES: Final = 256 * 1024


MANY: Final = (100, 1000)


class Scale(NamedTuple):
    """How much is run."""

    n_agents: int
    n_rounds: int
    n_flower_rounds: int
    n_turns: int


FULL: Final = Scale(n_agents=10, n_rounds=10, n_flower_rounds=4, n_turns=4)
QUICK: Final = Scale(n_agents=10, n_rounds=3, n_flower_rounds=2, n_turns=2)
Part: TypeAlias = Callable[[Path, Scale], dict[str, Any]]


def _bare(folder: Path, scale: Scale) -> dict[str, Any]:
    async def measured() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for has_tls in (False, True):
            cluster = Cluster(folder / ("tls" if has_tls else "plain"))
            broker = await start_broker(cluster, has_tls=has_tls)
            asked = bare.Asked(broker.config, Payload().n_bytes, CHUNK_BYTES)
            for is_broadcast in (True, False):
                name = f"bare.{'broadcast' if is_broadcast else 'unicast'}{'.tls' if has_tls else ''}"
                seconds = await asyncio.to_thread(
                    bare.rounds, asked, scale.n_agents, scale.n_rounds + 1, is_broadcast=is_broadcast
                )
                found[name] = {"rounds_s": seconds[1:]}
            await cluster.stop()
        return found

    return asyncio.run(measured())


def _own(name: str, n_tensors: int = 64, *, n_agents: int = 0, **how: Any) -> Part:
    def part(folder: Path, scale: Scale) -> dict[str, Any]:
        n, payload = n_agents or scale.n_agents, Payload(n_tensors=n_tensors)
        n_rounds = scale.n_rounds if n == scale.n_agents else 2
        settings = {"method": "noop-average"} | how
        return {name: own.measured_now(folder, payload, n_agents=n, n_rounds=n_rounds, **settings)}

    return part


def _in_turn(folder: Path, scale: Scale) -> dict[str, Any]:
    numbers = (Payload().n_tensors, *TENSORS)
    found = asyncio.run(
        own.in_turn(
            folder,
            [Payload(n_tensors=n) for n in numbers],
            n_agents=scale.n_agents,
            n_turns=scale.n_turns,
            n_rounds=scale.n_rounds,
            method="noop-average",
        )
    )
    return {f"in-turn.{n}-tensors": {"rounds_s": rounds_s} for n, rounds_s in zip(numbers, found, strict=True)}


def _peer(name: str, run: Callable[..., peers.Peer], *, has_tls: bool) -> Part:
    def part(folder: Path, scale: Scale) -> dict[str, Any]:
        n, n_rounds = scale.n_agents, scale.n_flower_rounds if run is peers.flower else scale.n_rounds
        folder.mkdir(parents=True)
        return {name: msgspec.to_builtins(run(folder, Payload(), n_clients=n, n_rounds=n_rounds, has_tls=has_tls))}

    return part


PARTS: Final[dict[str, Part]] = {
    "bare": _bare,
    "fedpipe": _own("fedpipe"),
    "fedpipe.tls": _own("fedpipe.tls", has_tls=True),
    "fedpipe.product": _own("fedpipe.product", method="noop-product"),
    **{f"fedpipe.{n}-tensors": _own(f"fedpipe.{n}-tensors", n) for n in TENSORS},
    "in-turn": _in_turn,
    "nvflare": _peer("nvflare", peers.nvflare, has_tls=True),
    "flower": _peer("flower", peers.flower, has_tls=False),
    "flower.tls": _peer("flower.tls", peers.flower, has_tls=True),
    **{f"fedpipe.{n}-agents": _own(f"fedpipe.{n}-agents", n_agents=n, n_together=50) for n in MANY},
}


SLOW: Final = frozenset(f"fedpipe.{n}-agents" for n in MANY)


def main() -> None:
    """Run what was asked for, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.rounds", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no fleets of hundreds")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of: " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--keep", type=Path, help="an empty folder for state and logs, which stay")
    asked = parser.parse_args()
    if unknown := set(asked.only or ()) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: there is {', '.join(PARTS)}")
    scale = QUICK if asked.quick else FULL
    found: dict[str, Any] = msgspec.json.decode(asked.out.read_bytes()) if asked.out.exists() else {}
    with contextlib.nullcontext(asked.keep) if asked.keep else tempfile.TemporaryDirectory() as folder:
        for name in asked.only or (part for part in PARTS if not (asked.quick and part in SLOW)):
            print(f"{name} ...", flush=True)
            load = os.getloadavg()[0]  # of what else runs: before
            found |= {key: part | {"load": load} for key, part in PARTS[name](Path(folder) / name, scale).items()}
            found["machine"] = {"n_cpus": os.cpu_count(), "python": platform.python_version()}
            found["summary"] = report.summary(found)
            asked.out.parent.mkdir(exist_ok=True)
            asked.out.write_bytes(msgspec.json.format(msgspec.json.encode(found, order="deterministic")) + b"\n")
    print(report.table(found))


if __name__ == "__main__":
    main()
