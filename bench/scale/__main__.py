"""`make bench-scale`: a thousand real agents, ten thousand on the control plane, and how cost grows, with its exponents.

Every finished point is kept in bench/results/scale.json, from which the pictures and the tables are drawn; a call goes on with
what is missing, --only and --again name what to measure (once more).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from bench.scale import control, growth, plots

ROOT: Final = Path(__file__).parents[2]
RESULT: Final = ROOT / "bench" / "results" / "scale.json"
IMAGES: Final = ROOT / "docs" / "images"
CONTROL: Final = (100, 1000, 10_000)
KILLED: Final = ("coordinator", "broker")
N_ROUNDS: Final = 3
Point: TypeAlias = Callable[[Path], dict[str, Any]]


def points() -> dict[tuple[str, ...], Point]:
    """Everything that is measured, by its place in the results, the quick ones first."""
    found: dict[tuple[str, ...], Point] = {}
    for kept in growth.KEPT:
        found |= {("columns", str(kept), str(n)): partial(_columns, n, kept) for n in growth.COLUMNS_AGENTS}
    found |= {("control", str(n)): partial(_control, n) for n in CONTROL}
    found |= {("tensors", str(n)): partial(growth.tensors, n, N_ROUNDS) for n in growth.TENSORS}
    found |= {("bytes", str(n)): partial(growth.payload, n, N_ROUNDS) for n in growth.PAYLOAD_MIB}
    found |= {("heavy", str(n)): partial(growth.heavy, n, N_ROUNDS) for n in growth.HEAVY}
    return found | {("agents", str(n)): partial(growth.agents, n, N_ROUNDS) for n in growth.AGENTS}


def _columns(n_agents: int, kept: int, _folder: Path) -> dict[str, Any]:
    return growth.columns(n_agents, kept)


def _control(n_agents: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(asyncio.run(control.measured(folder, n_agents=n_agents, kills=KILLED)))
    return found


def main() -> None:
    """Measure what is missing, keep it, draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PART", help="as agents, agents.1000, control.10000, columns.32")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--images", type=Path, default=IMAGES)
    asked = parser.parse_args()
    _raise_limit()
    found: dict[str, Any] = msgspec.json.decode(asked.out.read_bytes()) if asked.out.exists() else {}
    for place, measure in points().items():
        name = ".".join(place)
        is_wanted = not asked.only or any(name == one or name.startswith(f"{one}.") for one in asked.only)
        if not is_wanted or (_at(found, place) is not None and not asked.again):
            continue
        print(f"{name} ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="fedpipe-scale-") as folder:
            _put(found, place, {"load": round(os.getloadavg()[0], 1)} | measure(Path(folder) / "fleet"))
        found["machine"] = {"n_cpus": os.cpu_count(), "python": platform.python_version()}
        found["exponents"] = plots.exponents(found)
        asked.out.write_bytes(msgspec.json.format(msgspec.json.encode(found, order="deterministic")) + b"\n")
    for path in plots.draw(found, asked.images):
        print(path)
    for name, lines in plots.exponents(found).items():
        print(f"{name:10}", ", ".join(f"{line} {value:.2f}" for line, value in lines.items()))


def _raise_limit() -> None:
    """Ten thousand connections are as many descriptors, in the broker and in the agents' process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _at(found: dict[str, Any], place: tuple[str, ...]) -> Any:
    inner: Any = found
    for key in place:
        inner = inner.get(key) if isinstance(inner, dict) else None
    return inner


def _put(found: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for key in place[:-1]:
        found = found.setdefault(key, {})
    found[place[-1]] = value


if __name__ == "__main__":
    main()
