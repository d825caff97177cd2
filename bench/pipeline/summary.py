"""Who reaches the best baseline's loss when, and for how many bytes; as numbers and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from bench.pipeline.running import Point, Result
from bench.pipeline.systems import EVERY, FEDPIPE

FORMAT: Final = 1


class Line(msgspec.Struct, frozen=True):
    """One system over all seeds.  Ratios are the best baseline's time (bytes) over this system's, to the same loss.

    None where the target was missed on some seed; `n_reached` says on how many it was not.
    """

    system: str
    rate: float
    mode: str
    n_seeds: int
    n_reached: int
    final_loss: float
    final_loss_sd: float
    time_ratio: float | None
    bytes_ratio: float | None
    under_training_rate: float
    rounds: float
    up_bytes: float


class Target(msgspec.Struct, frozen=True):
    """Of one seed: the lowest loss that a baseline ends with, which one it is, and when it first had it."""

    seed: int
    baseline: str
    loss: float
    time_s: float
    up_bytes: int


class Summary(msgspec.Struct, frozen=True):
    """What fedpipe does beside the best baseline of each seed."""

    time_to_target_ratio: float | None
    bytes_to_target_ratio: float | None
    under_training_rate: float
    final_loss: float
    best_baseline_loss: float
    base_loss: float


class Report(msgspec.Struct, frozen=True):
    """bench/results/pipeline.json."""

    format: int
    budget_s: float
    seeds: list[int]
    summary: Summary
    targets: list[Target]
    systems: list[Line]
    runs: list[Result]


def report(results: Sequence[Result]) -> Report:
    """Everything that the runs say.  Needs fedpipe and a baseline on every seed."""
    seeds = sorted({r.seed for r in results})
    targets = {seed: _target([r for r in results if r.seed == seed]) for seed in seeds}
    lines = [_line(group, targets) for group in _by_system(results)]
    ours = next(line for line in lines if line.system == FEDPIPE.name)
    return Report(
        format=FORMAT,
        budget_s=results[0].budget_s,
        seeds=seeds,
        summary=Summary(
            time_to_target_ratio=ours.time_ratio,
            bytes_to_target_ratio=ours.bytes_ratio,
            under_training_rate=ours.under_training_rate,
            final_loss=ours.final_loss,
            best_baseline_loss=statistics.mean(t.loss for t in targets.values()),
            base_loss=statistics.mean(r.points[0].loss for r in results),
        ),
        targets=list(targets.values()),
        systems=lines,
        runs=list(results),
    )


def reached(points: Sequence[Point], loss: float) -> Point | None:
    """The first round that ended at this loss or below; a version counts when its round is over."""
    return next((p for p in points if p.loss <= loss), None)


def _target(results: Sequence[Result]) -> Target:
    best = min((r for r in results if EVERY[r.system].is_baseline), key=lambda r: r.points[-1].loss)
    loss = best.points[-1].loss
    first = reached(best.points, loss)
    assert first is not None
    return Target(best.seed, best.system, loss, first.time_s, first.up_bytes)


def _by_system(results: Sequence[Result]) -> list[list[Result]]:
    groups = [[r for r in results if r.system == name] for name in EVERY]
    return [group for group in groups if group]


def _line(group: Sequence[Result], targets: dict[int, Target]) -> Line:
    hits = [(targets[r.seed], reached(r.points, targets[r.seed].loss)) for r in group]
    losses = [r.points[-1].loss for r in group]

    def ratio(of: Callable[[Target | Point], float]) -> float | None:
        return _mean_ratio(of(target) / max(of(hit), 1e-9) if hit and hit.round else None for target, hit in hits)

    return Line(
        system=group[0].system,
        rate=group[0].rate,
        mode=group[0].mode,
        n_seeds=len(group),
        n_reached=sum(hit is not None for _, hit in hits),
        final_loss=statistics.mean(losses),
        final_loss_sd=statistics.stdev(losses) if len(losses) > 1 else 0.0,
        time_ratio=ratio(lambda p: p.time_s),
        bytes_ratio=ratio(lambda p: p.up_bytes),
        under_training_rate=statistics.mean(r.under_training for r in group),
        rounds=statistics.mean(r.points[-1].round for r in group),
        up_bytes=statistics.mean(r.points[-1].up_bytes for r in group),
    )


def _mean_ratio(found: Iterable[float | None]) -> float | None:
    """Geometric mean; None if one is missing."""
    ratios = list(found)
    known = [ratio for ratio in ratios if ratio is not None]
    return math.exp(statistics.mean(map(math.log, known))) if len(known) == len(ratios) else None


def table(found: Report) -> str:
    """For a terminal."""
    titles = ("rate", "mode", "loss", "± sd", "time x", "bytes x", "under", "rounds", "MB up", "reached")
    rows = ["{:<26} {:>7} {:<9} {:>7} {:>6} {:>7} {:>8} {:>6} {:>6} {:>6} {:>8}".format("system", *titles)]
    rows += [
        f"{line.system:<26} {line.rate:>7.1e} {line.mode:<9} {line.final_loss:7.4f} {line.final_loss_sd:6.4f} "
        f"{_number(line.time_ratio):>7} {_number(line.bytes_ratio):>8} {line.under_training_rate:6.1%} "
        f"{line.rounds:6.1f} {line.up_bytes / 1e6:6.2f} {f'{line.n_reached}/{line.n_seeds}':>8}"
        for line in found.systems
    ]
    targets = ", ".join(f"seed {t.seed}: {t.loss:.4f} by {t.baseline} at {t.time_s:.0f} s" for t in found.targets)
    head = f"{found.budget_s:.0f} virtual seconds; the base's loss is {found.summary.base_loss:.4f}; target {targets}"
    return "\n".join([head, *rows])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
