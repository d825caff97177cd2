"""In which type an agent's updates travel: bf16, int8 or NF4, by what its link makes of the bytes.

Rounding to fewer bits is noise in the update.  To send more bits is time in which nothing is trained.  Both cost progress:

    cost(dtype)  =  seconds of the upload / seconds of a round  +  share of the update's squared norm that is noise

and the cheapest is taken.  The noise is that of a normal distribution in components of 4096 (measured: docs/benchmarks.md);
the upload is that of a share of rank RANK on every matrix, because the type is settled before the ranks are.  While
nobody has measured the link it is int8: a quarter of fp32's bytes for next to no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from coordinator.core.spec import JobSpec
from protocol.messages import Matrix, Report, UpdateDtype
from protocol.widths import component_bytes

NOISE: Final[dict[UpdateDtype, float]] = {"bf16": 6e-6, "int8": 1.6e-4, "nf4": 0.017}
"""||sent - meant||^2 / ||meant||^2 of a product B A with both factors rounded; from the most exact to the smallest."""
RANK: Final = 8
PLAIN: Final[tuple[UpdateDtype, ...]] = ("fp32", "fp16", "bf16")
"""What every agent can send."""
UNMEASURED: Final[UpdateDtype] = "int8"


def update_dtype(spec: JobSpec, matrices: Sequence[Matrix], report: Report | None, round_s: float) -> UpdateDtype:
    """What the job pins, else the cheapest; bf16 where an agent cannot send it.  `round_s` is how long a round lasts, roughly."""
    known = {*PLAIN, *(report.update_dtypes if report else ())}
    pinned, up_bytes_per_s = spec.adapter.update_dtype, report.up_bytes_per_s if report else 0.0
    if pinned or not up_bytes_per_s:
        wanted = pinned or UNMEASURED
        return wanted if wanted in known else "bf16"
    seconds = {dtype: RANK * side_bytes(matrices, dtype) / up_bytes_per_s for dtype in NOISE if dtype in known}
    return min(seconds, key=lambda dtype: seconds[dtype] / round_s + NOISE[dtype])


def side_bytes(matrices: Sequence[Matrix], dtype: UpdateDtype) -> int:
    """Bytes of one component of every matrix."""
    return sum(component_bytes(m.d_in, dtype) + component_bytes(m.d_out, dtype) for m in matrices)


def typical_s(spec: JobSpec) -> float:
    """Seconds of a round, before its length is settled."""
    return spec.round.train_s or math.sqrt(spec.plan.min_train_s * spec.plan.max_train_s)
