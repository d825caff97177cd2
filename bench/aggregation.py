"""What aggregating a round costs at the shape of Llama-7B: time, memory and error, beside the exact and the dense sum.

    make bench-aggregation          or: OPENBLAS_NUM_THREADS=1 python -m bench.aggregation [--agents 100] [--layers 32] ...

Agents have ranks 4 to 64 and send NF4 or what `--dtype` says.  An agent's delta is a random mixture of a signal that all share,
with singular values 0.95^j, and as much noise of its own as signal (`--noise`); `white` is noise alone, the worst case.  Files
hold one layer, and all layers read it: decoding costs what it would, reading comes from the page cache.  A model
before the round is part of the sum only with `--model`.

Error, per shape of matrix, against the exact result: `excess` is how much further from the whole sum the found components are
than the best ones, relative to the norm of the sum; `kept` is the distance to the best ones, relative to their norm.  The dense
side, with `--dense`, is forming the sum and its full SVD in float32, for one square matrix.

With `--coming 2 5 20` one agent of rank 16 sends at so many Mbit/s while the sum is under way, as the coordinator has it when
everyone else has sent (coordinator/ahead.py); what is left after its last byte, with the model written and synced, stands beside
all of it done afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import numpy as np

from coordinator.aggregators import Weighted
from coordinator.aggregators.product import Product
from protocol.adapters import ALL, F64, Factors, Rows, Stack, principal
from protocol.arriving import Arriving, Source
from protocol.messages import UpdateDtype
from protocol.models import StoredModel, write_model
from protocol.updates import LoraUpdate, write_update

RANKS = (4, 8, 16, 32, 64)
SIGNAL = 128
LAYER = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
LAYER |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
RESULTS = Path(__file__).parent / "results" / "aggregation.json"


@dataclass(frozen=True)
class Layers:
    """An update of one layer, said to be one of many: every layer reads the same records."""

    one: LoraUpdate
    ranks: Mapping[str, int]

    def factors(self, name: str) -> Factors:
        """Those of the one layer."""
        return self.one.factors(name.split(".")[1])

    def shape(self, name: str) -> tuple[int, int]:
        """That of one matrix."""
        return self.one.shape(name.split(".")[1])

    def stack(self, names: Sequence[str], rows: Rows = ALL) -> Stack:
        """Those of some."""
        return Stack.of([self.factors(name) for name in names]).rows(rows)


def write_fleet(folder: Path, n_agents: int, noise: str, dtype: UpdateDtype, only: list[str]) -> list[LoraUpdate]:
    """The files of a fleet, in the order of the agents."""
    shared = np.random.default_rng(0)
    bases = {name: [_orthonormal(shared, d) for d in LAYER[name]] for name in only}
    found = []
    for i in range(n_agents):
        rng, rank = np.random.default_rng(i + 1), RANKS[i % len(RANKS)]
        adapter = {name: _delta(rng, bases[name], rank, noise) for name in only}
        path = folder / f"{noise}-{i}"
        size = write_update(path, adapter, job="bench", round=1, attempt=0, dtype=dtype)
        found.append(LoraUpdate.open(path, max_bytes=size))
    return found


def _orthonormal(rng: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, SIGNAL), dtype=np.float32))[0]


def _delta(rng: np.random.Generator, bases: list[np.ndarray], rank: int, noise: str) -> Factors:
    mixture = rng.standard_normal((SIGNAL, rank), dtype=np.float32)
    sides = []
    for base, scale in zip(bases, (0.95 ** np.arange(SIGNAL, dtype=np.float32), 1.0), strict=True):
        own = rng.standard_normal((len(base), rank), dtype=np.float32)
        if noise != "white":
            signal = (base * scale) @ mixture
            own = signal + np.float32(noise) * own * np.linalg.norm(signal, axis=0) / np.linalg.norm(own, axis=0)
        sides.append(own)
    return Factors(np.ascontiguousarray(sides[1].T), sides[0])


def write_old(path: Path, one: LoraUpdate, told: argparse.Namespace) -> StoredModel:
    """A model of all layers and `--max-rank` components, as the coordinator reads it: one matrix at a time."""
    rng = np.random.default_rng(0)
    layer = {
        name: Factors(
            *(rng.standard_normal(shape, dtype=np.float32) for shape in ((told.max_rank, d_in), (d_out, told.max_rank)))
        )
        for name, (d_out, d_in) in ((name, LAYER[name]) for name in one.ranks)
    }
    whole = {f"{i:02}.{name}": factors for i in range(told.layers) for name, factors in layer.items()}
    levels = write_model(path, whole, version=1, dtype="fp32")
    return StoredModel(path, max_bytes=levels[-1].size)


def weighted(files: list[LoraUpdate], n_agents: int, n_layers: int) -> list[Weighted]:
    """As many agents as asked, the files again and again."""
    layers = [f"{i:02}." for i in range(n_layers)]
    updates = [Layers(file, {layer + k: rank for layer in layers for k, rank in file.ranks.items()}) for file in files]
    return [
        Weighted(f"agent-{i:04}", 1, 50.0 + 37 * i % 450, update)
        for i, update in zip(range(n_agents), itertools.cycle(updates), strict=False)
    ]


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def errors(given: list[Weighted], found: Factors, name: str) -> dict[str, float]:
    """How far the components found are from the best ones of as many, see above; the exact sum as the reference."""
    total = math.fsum(u.weight for u in given)
    factors = [u.update.factors(name) for u in given]
    b: F64 = np.hstack([f.b * np.float64(u.weight / total) for u, f in zip(given, factors, strict=True)])
    a: F64 = np.vstack([f.a.astype(np.float64) for f in factors])
    began = time.process_time()
    best = principal(b, a, found.rank)
    exact_s = time.process_time() - began
    ours, theirs = (found.b.astype(np.float64), found.a.astype(np.float64)), (best.b, best.a)
    kept = inner(ours, ours) - 2 * inner(ours, theirs) + inner(theirs, theirs)
    left = best.energy - 2 * inner(ours, (b, a)) + inner(ours, ours)
    norm = math.sqrt(best.energy)
    return {
        "excess": (math.sqrt(max(left, 0.0)) - math.sqrt(best.dropped_energy)) / norm,
        "kept": math.sqrt(max(kept, 0.0) / (best.energy - best.dropped_energy)),
        "dropped_ratio": best.dropped_energy / best.energy,
        "exact_cpu_s": exact_s,
    }


def inner(one: tuple[F64, F64], two: tuple[F64, F64]) -> float:
    """The inner product of two products."""
    return float(np.sum((one[0].T @ two[0]) * (one[1] @ two[1].T)))


def overlap(
    given: list[Weighted], n_layers: int, max_rank: int, speeds: Sequence[float], folder: Path
) -> list[dict[str, object]]:
    """Sum and write with everything here, and with one update that comes at each of these speeds (Mbit/s)."""
    late = next(i for i in range(len(given) - 1, -1, -1) if RANKS[i % len(RANKS)] == 16)
    one = given[late].update
    assert isinstance(one, Layers)
    layer = {name: one.one.factors(name) for name in one.one.ranks}
    adapter = {f"{i:02}.{name}": factors for i in range(n_layers) for name, factors in layer.items()}
    path = folder / "late"
    size = write_update(path, adapter, job="bench", round=1, attempt=0, dtype=one.one.header.dtype)

    def whole(source: Source) -> str:
        update = LoraUpdate.open(source, max_bytes=size)
        updates = [*given[:late], replace(given[late], update=update), *given[late + 1 :]]
        made = Product().aggregate({}, updates, max_rank=max_rank)
        return write_model(folder / "model", made.adapter, version=1, dtype="fp32")[-1].sha256

    digests: list[str] = []
    cpu_s, wall_s = cost(lambda: digests.append(whole(path)))
    found: list[dict[str, object]] = [
        {"coming_mbit_s": None, "left_s": round(wall_s, 1), "left_cpu_s": round(cpu_s, 1)}
    ]
    for speed in speeds:
        coming, ended = Arriving(size), []

        def send(coming: Arriving = coming, n_bytes_s: float = speed * 1e6 / 8, ended: list[float] = ended) -> None:
            began = time.perf_counter()
            while (n_bytes := int((time.perf_counter() - began) * n_bytes_s)) < size:
                coming.reached(n_bytes, path)
                time.sleep(0.02)
            coming.reached(size, path)
            ended.extend((time.process_time(), time.perf_counter()))

        sender, began = Thread(target=send), time.perf_counter()
        sender.start()
        digests.append(whole(coming))
        cpu, wall = time.process_time(), time.perf_counter()
        sender.join()
        figures = {
            "coming_mbit_s": speed,
            "coming_s": ended[1] - began,
            "left_s": wall - ended[1],
            "left_cpu_s": cpu - ended[0],
        }
        found.append({name: round(value, 1) for name, value in figures.items()})
        assert len(set(digests)) == 1, "another model"
    return found


def dense(given: list[Weighted], name: str) -> None:
    """What would be done without factors."""
    total = sum(f.b @ f.a for f in (u.update.factors(name) for u in given))
    np.linalg.svd(total, full_matrices=False)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--files", type=int, default=100, help="different updates; more agents repeat them")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--matrices", nargs="+", default=list(LAYER), choices=list(LAYER))
    parser.add_argument("--max-rank", type=int, default=32)
    parser.add_argument("--noise", default="1", help="own noise over shared signal, or: white")
    parser.add_argument("--dtype", default="nf4")
    parser.add_argument(
        "--exact", nargs="*", default=["q", "gate"], help="compare these with the exact result (minutes)"
    )
    parser.add_argument("--model", action="store_true", help="also a model before the round; then nothing is compared")
    parser.add_argument("--dense", action="store_true", help="also the dense sum of one square matrix (minutes)")
    parser.add_argument("--coming", nargs="*", type=float, default=[], help="Mbit/s at which the last update comes")
    parser.add_argument("--write", metavar="NAME", help=f"keep the figures under this name in {RESULTS.name}")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedpipe-aggregation-") as folder:
        files = write_fleet(Path(folder), min(told.files, told.agents), told.noise, told.dtype, told.matrices)
        given = weighted(files, told.agents, told.layers)
        model = write_old(Path(folder) / "model", files[0], told) if told.model else {}
        result = []
        cpu_s, wall_s = cost(lambda: result.append(Product().aggregate(model, given, max_rank=told.max_rank)))
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        dropped = result[0].dropped_ratio
        figures: dict[str, object] = {
            "agents": told.agents,
            "matrices": len(dropped),
            "max_rank": told.max_rank,
            "model": told.model,
            "noise": told.noise,
            "dtype": told.dtype,
            "columns": sum(u.update.ranks[min(dropped)] for u in given),
            "cpu_s": round(cpu_s, 1),
            "wall_s": round(wall_s, 1),
            "load": round(os.getloadavg()[0], 1),
            "peak_mib": round(peak_mib),
            "dropped_ratio": round(sum(dropped.values()) / len(dropped), 4),
        }
        for name in [] if told.model else told.exact:
            figures[name] = errors(given, result[0].adapter[f"00.{name}"], f"00.{name}")
        if told.coming:
            figures["overlap"] = overlap(given, told.layers, told.max_rank, told.coming, Path(folder))
        if told.dense:
            square = [
                Weighted(u.agent, 1, u.weight, Layers(f, {"00.q": f.ranks["q"]}))
                for u, f in zip(given, files, strict=False)
            ]
            ours, _ = cost(lambda: Product().aggregate({}, square, max_rank=told.max_rank))
            theirs, _ = cost(lambda: dense(square, "00.q"))
            figures["one_square_cpu_s"], figures["one_square_dense_cpu_s"] = round(ours, 2), round(theirs, 1)
    print(json.dumps(figures, indent=1))
    if told.write:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {told.write: figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
