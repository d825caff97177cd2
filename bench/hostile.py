"""What a flooding client costs: the same job with and without it, in turn, on one real fleet.

    python -m bench.hostile [--jobs 3] [--rate 2000]

Broker, coordinator, three agents and the client are processes (the client a thread) of this machine, so what it prints holds
the processor time that the client itself and the broker take from the agents.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from statistics import median

from chaos.fleet import CLOUD, Fleet, masters
from chaos.hostile import NAME, Hostile, access
from coordinator.views import JobView
from fedpipe import corpus, pretrain

LIMIT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=3, help="of each kind")
    parser.add_argument("--rate", type=float, default=2000.0, help="publications per second")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(compare(Path(folder), asked.jobs, asked.rate))


async def compare(folder: Path, n_jobs: int, per_s: float) -> None:
    recipe = pretrain.Recipe(hidden=64, intermediate=128, n_layers=2, vocabulary=512, n_steps=60, n_pairs=1500)
    base = pretrain.base_model(recipe=recipe, cache=folder / "bases")
    texts = {}
    for agent, pairs in corpus.shards(3, limit=400).items():
        texts[agent] = folder / f"{agent}.jsonl"
        corpus.write_jsonl(pairs, texts[agent])
    honest = tuple(sorted(texts))
    rights = folder / "rights"
    rights.write_text("\n".join(access(honest)) + "\n", encoding="utf-8")
    async with Fleet(folder / "fleet", base, texts, broker_lines=[f"acl_file {rights}"]) as fleet:
        calm, stormy = [], []
        n_sent = 0
        await run(fleet, "first", honest)  # processes and caches are warm afterwards
        for number in range(n_jobs):
            calm.append(await run(fleet, f"calm-{number}", honest))
            with Hostile(
                fleet.broker_port, job=f"stormy-{number}", seed=number, victims=honest, per_s=per_s
            ) as hostile:
                stormy.append(await run(fleet, f"stormy-{number}", honest))
            n_sent += sum(hostile.n_sent.values())
        (coordinator,) = fleet.processes(CLOUD)
        peak_mib = coordinator.memory_info().rss / 2**20
    same = {tuple(masters(job)) for job in [*calm, *stormy]}
    without, beside = median(rounds_s(calm)), median(rounds_s(stormy))
    print(
        f"{n_sent} publications at up to {per_s:g}/s; the models are {'the same' if len(same) == 1 else 'NOT the same'}"
    )
    print(f"median round {without:.2f} s without, {beside:.2f} s with: {beside / without:.2f} times")
    print(f"the coordinator holds {peak_mib:.0f} MiB")


async def run(fleet: Fleet, name: str, honest: tuple[str, ...]) -> JobView:
    await fleet.submit(fleet.job_text(name, job={"name": name, "seed": 3, "only": [*honest, NAME]}))
    job = await fleet.ended(name, LIMIT_S)
    assert job.phase == "completed", job.text
    return job


def rounds_s(jobs: list[JobView]) -> list[float]:
    return [record.wall_s for job in jobs for record in job.history if record.purpose == "train"]


if __name__ == "__main__":
    main()
