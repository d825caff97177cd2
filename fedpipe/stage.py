"""What the demo needs before it can begin: private text per agent, a base model, a job file.

Without options nothing is downloaded: the text is mined from packages that are installed on this machine, one package per
agent, and the base is a small Llama made once from the standard library and then cached.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import tomli_w
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from agent.bases import BasesConfig, resolve
from agent.data import DataConfig
from coordinator.core.spec import JobSpec
from coordinator.submission import parse_job
from fedpipe.demo_options import DemoOptions
from protocol.errors import BadConfig
from protocol.messages import Base
from protocol.topics import is_id

JOB: Final = "demo"
N_PAIRS: Final = 3000
HELD_OUT_RATIO: Final = 0.08

VARIETY: Final[list[dict[str, object]]] = [
    {},
    {"max_rank": 8, "max_batch": 8},
    {"bits": ["nf4"]},
]
"""No two servers are alike, so neither are the limits of the demo's agents: all it has, little memory, only a 4-bit base."""


def private_text(options: DemoOptions, bar: Progress) -> dict[str, DataConfig]:
    """One data set per agent.  Raises BadConfig when the given folder does not hold enough of them."""
    if options.data != "auto":
        return _given_text(Path(options.data), options.agents)
    from fedpipe import corpus

    task = bar.add_task("mining private text from installed packages", total=options.agents)
    found = corpus.shards(
        options.agents,
        limit=N_PAIRS,
        seed=options.seed,
        progress=lambda done, of: bar.update(task, completed=done, total=of),
    )
    for agent, pairs in found.items():
        corpus.write_jsonl(pairs, options.out / "data" / f"{agent}.jsonl")
    bar.update(task, description=f"private text: {', '.join(f'{a} {len(p)} pairs' for a, p in found.items())}")
    return {agent: DataConfig(path=str((options.out / "data" / f"{agent}.jsonl").resolve())) for agent in found}


def _given_text(folder: Path, n: int) -> dict[str, DataConfig]:
    if not folder.is_dir():
        raise BadConfig(f"--data {folder}: not a folder; it must hold one file or folder per agent")
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if len(entries) < n:
        raise BadConfig(f"--data {folder} has {len(entries)} data sets for {n} agents: add some, or lower --agents")
    chosen = {_agent_name(path): DataConfig(path=str(path.resolve())) for path in entries[:n]}
    if len(chosen) < n:
        raise BadConfig(f"--data {folder}: two entries give the same agent name; rename one")
    return chosen


def _agent_name(path: Path) -> str:
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in path.stem.lower()).strip("-")[:60]
    if not is_id(name):
        raise BadConfig(f"{path.name}: no agent name can be made of this; use letters and digits")
    return name


def base_model(options: DemoOptions, bar: Progress) -> Path:
    """The folder of the base model: given, downloaded from the hub, or made here once.  Raises BadConfig, Unavailable."""
    if options.model != "auto":
        folder = Path(options.model).expanduser()
        if not folder.is_dir() and options.model.startswith((".", "/", "~")):
            raise BadConfig(f"--model {options.model}: there is no such folder; give one with config.json, or a hub id")
        found = folder if folder.is_dir() else resolve(Base(source=options.model), BasesConfig(allow_hub=True))
        return found.resolve()
    from fedpipe import pretrain

    task = bar.add_task("making the base model (once, then cached)", total=None)

    def step(done: int, of: int, loss: float) -> None:
        bar.update(task, completed=done, total=of, description=f"pretraining the base model, loss {loss:.2f}")

    path = pretrain.base_model(step)
    bar.update(task, completed=1, total=1, description=f"base model: {path}")
    return path.resolve()


def progress_bar(console: object) -> Progress:
    """The bar under which all this happens."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)  # type: ignore[arg-type]


@contextlib.contextmanager
def hushed(log: Path) -> Iterator[None]:
    """Send what libraries say on stderr (warnings, progress bars of their own) to a file instead of over our picture."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file), warnings.catch_warnings():
        yield


def job_file(options: DemoOptions, base: Path, agents: Mapping[str, DataConfig]) -> tuple[str, JobSpec]:
    """The job as a TOML file that a user could have written, and what it means.  What it leaves open is planned."""
    small = options.model == "auto"
    table = {
        "job": {"name": JOB, "seed": options.seed},
        "model": {"source": str(base)},
        "adapter": {"max_rank": 32},
        "train": {
            "learning_rate": 3e-3 if small else 2e-4,
            "max_tokens": 96 if small else 512,
        },
        "round": {
            "n_rounds": options.rounds,
            "start_agents": len(agents),
            "start_wait_s": 120.0,
            "min_agents": max(1, min(2, len(agents))),
            "grace_s": 30.0,
            "offline_grace_s": 25.0,
            "survey_s": 240.0 if small else 1800.0,
        },
        "plan": {"calibrate_s": 90.0 if small else 600.0, "max_train_s": 30.0 if small else 1800.0},
        "evaluate": {"held_out_ratio": HELD_OUT_RATIO, "max_samples": 200},
    }
    text = tomli_w.dumps(table)
    return text, parse_job(text, "the demo's job file")
