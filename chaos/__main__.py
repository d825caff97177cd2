"""`python -m chaos`: a soak under random faults; the table at the end, exit code 1 for a broken promise."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chaos.soak import Account, plain_say, soak
from fedpipe import corpus, pretrain


def main() -> int:
    """Run one soak."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description="A real fleet under random faults.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, help="default: a new one, which is printed")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--gap-s", type=float, default=8.0, help="mean time between two faults")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what happened into this file")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
    print(f"seed {seed}, logs below {folder}", file=sys.stderr)
    base, texts = material(folder, arguments.agents)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the fleet then, too
    account = asyncio.run(
        soak(
            folder / "fleet",
            base,
            texts,
            seed=seed,
            minutes=arguments.minutes,
            say=plain_say,
            mean_gap_s=arguments.gap_s,
        )
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(account.plain(), indent=1, default=str) + "\n", encoding="utf-8")
    show(account, Console())
    return 1 if account.broken else 0


def material(folder: Path, n_agents: int) -> tuple[Path, dict[str, Path]]:
    """The tiny base (cached) and one text per agent."""
    texts = {}
    for agent, pairs in corpus.shards(n_agents, limit=400).items():
        texts[agent] = folder / f"{agent}.jsonl"
        corpus.write_jsonl(pairs, texts[agent])
    return pretrain.base_model(recipe=pretrain.TINY), texts


def show(account: Account, console: Console) -> None:
    """The account as tables."""
    kinds = Table("fault", "times", "recovered", "median s", "max s", title=f"seed {account.seed}")
    said = account.plain()["recoveries_s"]
    for kind, n in account.faults.most_common():
        found = said.get(kind, {"n": 0, "median": "", "max": ""})
        kinds.add_row(kind, str(n), str(found["n"]), str(found["median"]), str(found["max"]))
    console.print(kinds)
    facts = Table(show_header=False)
    for name in ("networks", "jobs", "equal", "rounds", "restarts", "books"):
        value = getattr(account, name)
        facts.add_row(name, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
    rss = ", ".join(f"{name} {n / 2**20:.0f} MiB" for name, n in sorted(account.max_rss_bytes.items()))
    facts.add_row("most memory", rss)
    console.print(facts)
    for line in account.broken:
        console.print(f"BROKEN: {line}", style="bold red", markup=False)
    console.print(
        f"{len(account.broken)} promises broken: python -m chaos --seed {account.seed}; logs below {account.folder}"
        if account.broken
        else "every promise was kept"
    )


if __name__ == "__main__":
    sys.exit(main())
