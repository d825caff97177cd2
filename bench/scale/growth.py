"""Cost as one thing grows and the rest stays: real rounds for agents, tensors and bytes, the exact sum alone for its columns.

Cost is processor time, which other work on the machine lengthens far less than time; the exponent is that of a power law through
all points, by least squares in logarithms.  Below 1 something fixed is shared, above 1 something is done more than once.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from bench import aggregation
from bench.rounds import own
from bench.rounds.fleet import Payload
from coordinator.aggregators.product import Product

MIB: Final = 2**20
N_PROCESSES: Final = 4
"""That all agents of a fleet share: more than this machine has cores, few enough for a thousand agents to fit in memory."""
AGENTS: Final = (10, 30, 100, 300, 1000)
HEAVY: Final = (10, 100)
TENSORS: Final = (2, 64, 448, 12_008)
PAYLOAD_MIB: Final = (1, 4, 16, 64, 256)
COLUMNS_AGENTS: Final = (5, 10, 20, 40, 80, 160)
"""Agents whose ranks are 4, 8, 16, 32, 64 in turn, so 25 columns each."""
KEPT: Final = (8, 32, 128)
"""Components of the sum that are wanted."""
N_SUMS: Final = 5


def agents(n: int, n_rounds: int, folder: Path) -> dict[str, Any]:
    """Rounds of 1 MiB each way."""
    return _rounds(folder, Payload(n_bytes=MIB, n_tensors=64), n, n_rounds)


def heavy(n: int, n_rounds: int, folder: Path) -> dict[str, Any]:
    """Rounds of 16 MiB each way, beside which what is kept of each agent is little."""
    return _rounds(folder, Payload(n_bytes=16 * MIB, n_tensors=64), n, n_rounds)


def tensors(n: int, n_rounds: int, folder: Path) -> dict[str, Any]:
    """Ten agents, 8 MiB each way."""
    return _rounds(folder, Payload(n_bytes=8 * MIB, n_tensors=n), 10, n_rounds)


def payload(n_mib: int, n_rounds: int, folder: Path) -> dict[str, Any]:
    """Three agents, 64 tensors."""
    return _rounds(folder, Payload(n_bytes=n_mib * MIB, n_tensors=64), 3, n_rounds)


def _rounds(folder: Path, payload: Payload, n_agents: int, n_rounds: int) -> dict[str, Any]:
    n_together = max(2, math.ceil(n_agents / N_PROCESSES))
    return own.measured_now(
        folder, payload, n_agents=n_agents, n_rounds=n_rounds, method="noop-average", n_together=n_together
    )


def columns(n_agents: int, n_kept: int) -> dict[str, float]:
    """The exact sum of one 4096 x 4096 matrix of so many agents, cut to so many components; the median of N_SUMS."""
    with tempfile.TemporaryDirectory(prefix="fedpipe-columns-") as folder:
        files = aggregation.write_fleet(Path(folder), n_agents, "1", "nf4", ["q"])
        given = aggregation.weighted(files, n_agents, 1)
        cpu_s = [aggregation.cost(lambda: Product().aggregate({}, given, max_rank=n_kept))[0] for _ in range(N_SUMS)]
    return {"columns": sum(file.ranks["q"] for file in files), "cpu_s": median(cpu_s)}


def exponent(points: Mapping[float, float]) -> float:
    """The p of the power law y = c x^p nearest to all points in logarithms (ordinary least squares).  Needs two x."""
    x, y = ([math.log(value) for value in values] for values in (points.keys(), points.values()))
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((one - mean_x) ** 2 for one in x)
    return sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True)) / spread
