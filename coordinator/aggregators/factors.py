"""Averages of the factors themselves: FedAvg over A and B, and HetLoRA's zero-padding where ranks differ.

Published baselines, here to be compared with.  An update holds the VALUES of an agent's adapter, not a change:

    A  <-  sum p_i pad(A_i),     B  <-  sum p_i pad(B_i),     pad: rows of A and columns of B up to the largest rank are zero

- By samples, p_i ~ n_i: FedAvg (McMahan et al., 2017, arXiv 1602.05629) of LoRA factors, as federated instruction tuning
  does it at equal ranks.  Where ranks differ, this is plain zero-padding.  FFA-LoRA (Sun et al., 2024, arXiv 2403.12313) is
  the same sum with an A that no agent trains, so that only B is averaged and the average is exact in the product.
- By norm, p_i ~ n_i ||B_i A_i||: the sparsity weights of HetLoRA (Cho et al., 2024, arXiv 2401.06432), by which adapters
  that are mostly zero count less.  The factor n_i is ours: late updates and small shares count less too.  HetLoRA's
  pruning of an agent's own rank is not built.

An agent of rank r takes the first r rows and columns, which is HetLoRA's truncation and the prefix of a model file.  The
mean of products is not the product of means: sum p_i B_i times sum p_i A_i has cross terms that nobody trained.

Cost per matrix: O((d_out + d_in) r) per update; norms O((d_out + d_in) r^2).  Memory: the next model, and a few matrices in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import ClassVar, TypeAlias

import numpy as np

from coordinator.aggregators import Aggregate, Weighted
from coordinator.aggregators.product import check_range, in_order, trained_names
from protocol.adapters import ALL, F64, Factors, Run, Stack, Stacks, alike, bands, few, truncate

_Table: TypeAlias = tuple[Mapping[str, int], Callable[[str], tuple[int, int]]]
"""What an update lists: ranks, and a shape for a name."""


@dataclass(frozen=True, slots=True)
class Average:
    """Weighted mean of A and of B, padded with zeros to the largest rank.  See the head of this file."""

    accepts: ClassVar[str] = "lora-values"
    by_norm: bool = False

    def aggregate(
        self, model: Mapping[str, Factors], updates: Sequence[Weighted], *, max_rank: int, server_lr: float = 1.0
    ) -> Aggregate:
        """See Aggregator.aggregate; server_lr moves the model that part of the way to the mean."""
        ordered = in_order(updates)
        names = trained_names(ordered)
        untouched = ((name, model[name]) for name in sorted(set(model).difference(names)))
        found: list[Run] = [([name], Stack.of([factors])) for name, factors in untouched]
        dropped_ratio: dict[str, float] = {}
        kept = model if server_lr != 1.0 else {}
        for run in _alike(names, kept, ordered):
            whole = self._mean(run, kept, [u for u in ordered if run[0] in u.update.ranks], server_lr)
            found.append((run, whole.truncate(max_rank)))
            cut = map(_dropped, whole, repeat(max_rank)) if whole.rank > max_rank else repeat(0.0)
            dropped_ratio |= zip(run, cut, strict=False)
        return Aggregate(Stacks(run for run in found if run[1].rank), dropped_ratio)

    def _mean(
        self, run: Sequence[str], kept: Mapping[str, Factors], trained: Sequence[Weighted], server_lr: float
    ) -> Stack:
        """Of matrices of one shape, which the same agents trained at the same ranks.  Raises BadUpdate as check_range."""
        old = [(1.0 - server_lr, Stack.of([kept[name] for name in run]))] if run[0] in kept else []
        shares = server_lr * self._shares(run, trained)
        rank = max([*(u.update.ranks[run[0]] for u in trained), *(stack.rank for _, stack in old)])
        d_out, d_in = shape = trained[0].update.shape(run[0])
        found = Stack(np.empty((len(run), rank, d_in), np.float32), np.empty((len(run), d_out, rank), np.float32))
        for rows in bands(rank, shape) if len(run) == 1 else [ALL]:
            part = found.rows(rows)
            a, b = np.zeros(part.a.shape), np.zeros(part.b.shape)
            kept_part = ((scale, stack.rows(rows)) for scale, stack in old)
            terms = (
                (share[:, None, None], u.update.stack(run, rows)) for share, u in zip(shares, trained, strict=True)
            )
            for scale, stack in chain(kept_part, terms):
                a[:, : stack.a.shape[1]] += scale * stack.a.astype(np.float64)
                b[:, :, : stack.b.shape[2]] += scale * stack.b.astype(np.float64)
            with np.errstate(over="ignore"):
                part.a[:], part.b[:] = a, b
        if not (np.isfinite(found.a).all() and np.isfinite(found.b).all()):
            for name, factors in zip(run, found, strict=True):
                check_range(name, factors, trained)
        return found

    def _shares(self, run: Sequence[str], trained: Sequence[Weighted]) -> F64:
        """What each agent counts in each matrix, (agents, matrices or 1 for all of them); they sum to one."""
        weights = np.array([[u.weight] for u in trained])
        if self.by_norm:
            norms = np.array([[factors.norm() for factors in u.update.stack(run)] for u in trained])
            # Before anything has moved all norms are zero, and then only the samples can decide.
            weights = weights * np.where(norms.any(axis=0), norms, 1.0)
        return weights / [math.fsum(column) for column in weights.T]


def _alike(names: Sequence[str], kept: Mapping[str, Factors], ordered: Sequence[Weighted]) -> Iterator[Sequence[str]]:
    """Runs of matrices of one shape, which the same agents trained at the same ranks and the model holds at one rank."""
    listed = [(u.update.ranks, u.update.shape) for u in ordered]
    tables = list({id(ranks): (ranks, shape) for ranks, shape in listed}.values())  # like updates have one in common
    shape_of = tables[0][1] if len(tables) == 1 else partial(_shape, tables)
    held = (kept[name].rank if name in kept else None for name in names) if kept else repeat(None)
    columns = [list(map(ranks.get, names, repeat(-1))) for ranks, _ in tables]
    sorts = list(zip(map(shape_of, names), held, *columns, strict=False))
    for whole in alike(range(len(names)), sorts.__getitem__):
        for part in few(whole, sum(sorts[whole.start][0]) * max(column[whole.start] for column in columns)):
            yield names[part]


def _shape(tables: Sequence[_Table], name: str) -> tuple[int, int]:
    return next(shape(name) for ranks, shape in tables if name in ranks)


def _dropped(whole: Factors, rank: int) -> float:
    """Share of the squared norms on the cut side, 0 to 1; the two sides need not be orthogonal."""
    kept = truncate(whole, rank).norm() ** 2
    cut = Factors(a=whole.a[rank:], b=whole.b[:, rank:]).norm() ** 2
    return cut / (kept + cut) if cut else 0.0
