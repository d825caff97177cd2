"""Ranks as a grid of layers and kinds of matrix: where each matrix of a base belongs, and what its cell says.

A name such as "model.layers.3.self_attn.q_proj" is layer 3 and kind "q": the first number in a name is its layer, and what
follows is shortened as far as it stays unambiguous.  Matrices that differ only in a later number (experts) share a cell.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Final, NamedTuple

USUAL: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Order of the usual kinds: as the data flow.  Others come after them, as they appear."""

Place = tuple[int | None, str]
"""Layer (None for a matrix outside the layers) and kind."""


class Grid(NamedTuple):
    """The rows and columns of a base model, and which matrices each cell holds."""

    layers: list[int | None]
    kinds: list[str]
    names: dict[Place, list[str]]


class Cell(NamedTuple):
    """Mean rank of a cell's matrices, 0 for one that is not trained; n of the agents train something in it."""

    rank: float
    n: int


def grid(names: Iterable[str]) -> Grid:
    """Lay out the matrices of a base model.  Cost: linear in matrices."""
    split = {name: _split(name) for name in names}
    kinds = _kinds(list(dict.fromkeys(rest for _, rest in split.values())))
    places: dict[Place, list[str]] = {}
    for name, (layer, rest) in split.items():
        places.setdefault((layer, kinds[rest]), []).append(name)
    layers = sorted({layer for layer, _ in places}, key=lambda layer: math.inf if layer is None else layer)
    order = {kind.removesuffix("_proj"): i for i, kind in enumerate(USUAL)}
    columns = sorted(dict.fromkeys(kinds.values()), key=lambda kind: order.get(kind.removesuffix("_proj"), len(order)))
    return Grid(layers, columns, places)


def cells(found: Grid, plans: Sequence[Mapping[str, int]]) -> dict[Place, Cell]:
    """What the plans (matrix -> rank, one per agent) give each cell; the mean counts what is not trained as 0."""
    return {
        place: Cell(
            rank=fmean(plan.get(name, 0) for plan in plans for name in names) if plans else 0.0,
            n=sum(any(name in plan for name in names) for plan in plans),
        )
        for place, names in found.names.items()
    }


def level(rank: float, top: float) -> float:
    """How strongly a rank is coloured, 0 to 1 for the largest: logarithmic, because ranks are planned in powers of two."""
    return math.log2(1 + rank) / math.log2(1 + top) if top > 0 else 0.0


def rank_text(rank: float) -> str:
    """A mean rank in at most four characters."""
    return "·" if rank <= 0 else f"{rank:.0f}" if rank >= 100 or rank == round(rank) else f"{rank:.1f}"


def _split(name: str) -> tuple[int | None, tuple[str, ...]]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    layer = None if at is None else int(parts[at])
    rest = tuple(part for part in parts[0 if at is None else at + 1 :] if not part.isdecimal())
    return layer, rest or (name,)


def _kinds(rests: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest end of each path that no other path has."""
    ends = Counter(rest[-n:] for rest in rests for n in range(1, len(rest) + 1))
    short = {rest: next((rest[-n:] for n in range(1, len(rest)) if ends[rest[-n:]] == 1), rest) for rest in rests}
    bare = {rest: ".".join(end).removesuffix("_proj") for rest, end in short.items()}
    clear = len(set(bare.values())) == len(bare) and all(rest[-1].endswith("_proj") for rest in rests)
    return bare if clear else {rest: ".".join(end) for rest, end in short.items()}
