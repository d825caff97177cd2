"""python -m bench.pipeline: tune every system, run all of them on all seeds, write results and pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from bench.pipeline import plots, summary, world
from bench.pipeline.jobs import Job, run_all
from bench.pipeline.systems import ABLATIONS, BASELINES, EVERY, FEDPIPE, RATES, Mode, System
from fedpipe.pretrain import cache_folder

ROOT: Final = Path(__file__).parents[2]
BUDGET_STEPS: Final = 1200
"""The budget in steps of the fastest server."""
TUNING_RATIO: Final = 0.6
"""Share of the budget that a run for tuning has."""
N_ABLATED: Final = 1
"""Fleets on which fedpipe without one of its parts is run: they cost most."""
TUNING_SEED: Final = 0
"""Its fleet is not one of those that are compared."""


def main() -> None:
    options = _options()
    began = time.monotonic()
    seeds = list(range(1, 2 if options.quick else 1 + options.seeds))
    main_systems = [FEDPIPE, EVERY["uniform LoRA"]] if options.quick else [FEDPIPE, *BASELINES]
    for seed in [TUNING_SEED, *seeds][options.quick :]:
        print(f"fleet of seed {seed}", flush=True)
        fleet = world.load(options.cache, seed, n_measurements=1 if options.quick else 3)
    budget_s = BUDGET_STEPS * fleet.step_s
    if options.quick:
        wanted = [Job(s.name, 3e-3, s.modes[0], 1, budget_s, 2) for s in main_systems]
    else:
        tuned = _tuned(main_systems, budget_s, options)
        ablations = [Job(s.name, *tuned[FEDPIPE.name], seed, budget_s) for s in ABLATIONS for seed in seeds[:N_ABLATED]]
        wanted = [Job(s.name, *tuned[s.name], seed, budget_s) for s in main_systems for seed in seeds] + ablations
    found = summary.report(run_all(wanted, options.cache, options.workers))
    print(summary.table(found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    print(options.out, *plots.draw(found, options.images), f"{time.monotonic() - began:.0f} s", sep="\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two systems, two rounds, nothing tuned; results elsewhere"
    )
    parser.add_argument("--seeds", type=int, default=3, help="fleets to compare on (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "bench-pipeline", help="finished runs")
    parser.add_argument("--out", type=Path, help="default bench/results/pipeline.json")
    parser.add_argument("--images", type=Path, help="default docs/images")
    options = parser.parse_args()
    if options.quick:
        options.cache /= "quick"
    options.out = options.out or (options.cache if options.quick else ROOT / "bench/results") / "pipeline.json"
    options.images = options.images or (options.cache if options.quick else ROOT / "docs/images")
    return options


def _tuned(systems: Sequence[System], budget_s: float, options: argparse.Namespace) -> dict[str, tuple[float, Mode]]:
    """Learning rate, then mode by system: those with the lowest loss after a shorter run on a fleet of its own."""
    tuning_s = TUNING_RATIO * budget_s
    rates = _best([Job(s.name, rate, s.modes[0], TUNING_SEED, tuning_s) for s in systems for rate in RATES], options)
    modes = _best(
        [Job(s.name, rates[s.name].rate, mode, TUNING_SEED, tuning_s) for s in systems for mode in s.modes], options
    )
    return {name: (job.rate, job.mode) for name, job in modes.items()}


def _best(jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, Job]:
    """Of each system's runs the one with the lowest loss at its end."""
    found: dict[str, tuple[float, Job]] = {}
    for result, job in zip(run_all(jobs, options.cache, options.workers), jobs, strict=True):
        loss = result.points[-1].loss
        print(f"{job.system}: rate {job.rate:.1e}, {job.mode}: loss {loss:.4f}", flush=True)
        if job.system not in found or loss < found[job.system][0]:
            found[job.system] = loss, job
    return {system: job for system, (_, job) in found.items()}


if __name__ == "__main__":
    main()
