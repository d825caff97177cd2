"""What an update may lose on its way: bytes beside final loss, for every type of value and share of its energy.

    OMP_NUM_THREADS=1 python -m bench.wire            some fifteen minutes; --quick: two types, one seed
    python -m bench.wire --json                       the figures as JSON on standard output

The demo's base and the demo's three texts; for each seed the same rounds with the real trainer, real update files and the real
aggregator, once per format.  `loss` is that of the last version on everybody's held-out text, unquantized; bytes are those of
the update files, all rounds together; `fewer` is fp32's beside them; `deflate` is what a general compressor takes off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import zlib
from collections.abc import Generator
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch

from agent import loading
from agent.child import TrainTask
from agent.data import DataConfig, split
from agent.evaluation import evaluate
from agent.trainers import load as load_trainer
from agent.trainers.lora import adapted
from coordinator.aggregators import Weighted
from coordinator.aggregators.product import Product
from fedpipe import corpus, pretrain
from protocol.adapters import Adapter
from protocol.messages import Base, Evaluation, Plan, Training, UpdateDtype
from protocol.models import write_model
from protocol.updates import open_update

N_ROUNDS, N_STEPS, BATCH, RANK, MAX_RANK, MAX_TOKENS = 4, 25, 8, 16, 32, 96
RATE: Final = 3e-3
HELD_OUT_RATIO: Final = 0.08
N_HELD_OUT: Final = 240

T = TypeVar("T")


class Format(NamedTuple):
    """How updates travel."""

    dtype: UpdateDtype
    kept_energy_ratio: float = 1.0

    def __str__(self) -> str:
        """As the table shows it."""
        return f"{self.dtype}, {self.kept_energy_ratio:.1%} of the energy" if self.kept_energy_ratio < 1 else self.dtype


FORMATS: Final = [
    Format("fp32"),
    Format("bf16"),
    Format("int8"),
    Format("nf4"),
    Format("int8", 0.99),
    Format("nf4", 0.99),
    Format("nf4", 0.95),
    Format("nf4", 0.9),
    Format("nf4", 0.88),
]


class Run(NamedTuple):
    """One format on one seed."""

    loss: float
    n_bytes: int
    n_deflated: int


class Fleet:
    """The demo's agents on one seed: the same text, drawn and split for that seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.base, self.seed, self.folder = pretrain.base_model(), seed, folder
        self.loaded = loading.load(self.base, "none", torch.device("cpu"))
        self.ranks = {m.name: min(RANK, m.d_in, m.d_out) for m in loading.matrices(self.loaded.model)}
        self.trainer = load_trainer("qlora")()
        self.data: dict[str, DataConfig] = {}
        for name, pairs in corpus.shards(3, seed=seed).items():
            corpus.write_jsonl(pairs, folder / f"{name}.jsonl")
            self.data[name] = DataConfig(path=str(folder / f"{name}.jsonl"))
        parts = [split.load(data, seed, HELD_OUT_RATIO) for data in self.data.values()]
        self.held_out = sorted((e for p in parts for e in p.held_out), key=attrgetter("key"))[:N_HELD_OUT]

    def run(self, sent: Format) -> Run:
        """All rounds with updates in one format."""
        model: Adapter = {}
        n_bytes = n_deflated = 0
        for number in range(1, N_ROUNDS + 1):
            file = self.folder / "model"
            if model:
                write_model(file, model, version=number - 1, dtype="bf16")
            updates = []
            for name in self.data:
                update, packed = self._update(name, number, sent, file if model else None)
                updates.append(update)
                n_bytes += len(packed)
                n_deflated += len(zlib.compress(packed))
            model = Product().aggregate(model, updates, max_rank=MAX_RANK).adapter
        return Run(self._loss(model), n_bytes, n_deflated)

    def _update(self, name: str, number: int, sent: Format, model_file: Path | None) -> tuple[Weighted, bytes]:
        training = Training(
            n_steps=N_STEPS, batch=BATCH, learning_rate=RATE, max_tokens=MAX_TOKENS, seed=self.seed * 1000 + number
        )
        plan = Plan(
            job="bench",
            round=number,
            attempt=0,
            purpose="train",
            method="fedpipe",
            base=Base(source=str(self.base)),
            held_out_ratio=HELD_OUT_RATIO,
            data_seed=self.seed,
            bits="none",
            version=number - 1,
            ranks=self.ranks,
            train=training,
            update_dtype=sent.dtype,
            kept_energy_ratio=sent.kept_energy_ratio,
            issued_at=0.0,
            stop_after_s=3600.0,
            ttl_s=3600.0,
        )
        out = self.folder / f"{name}.update"
        task = TrainTask(
            plan=plan,
            base_folder=str(self.base),
            data=self.data[name],
            model_file=str(model_file) if model_file else None,
            out_file=str(out),
            digest_cache=str(self.folder / "digests.json"),
            device="cpu",
        )
        finished: Any = _drained(self.trainer.train(task))
        packed = out.read_bytes()
        update = open_update(out, "lora", job="bench", round=number, attempt=0, max_bytes=len(packed))
        return Weighted(name, number, finished.samples, update), packed

    def _loss(self, model: Adapter) -> float:
        wanted = Evaluation(max_samples=len(self.held_out))
        with adapted(self.loaded.model, model, {}, 2.0, 0) as whole:
            scored: Any = _drained(
                evaluate(whole.model, self.loaded.tokenizer, self.held_out, wanted, batch=16, max_tokens=MAX_TOKENS)
            )
        return float(scored.loss)


def _drained(running: Generator[Any, Any, T]) -> T:
    try:
        while True:
            next(running)
    except StopIteration as end:
        result: T = end.value
        return result


def main() -> None:
    options = _options()
    formats = [FORMATS[0], FORMATS[3]] if options.quick else FORMATS
    found: dict[Format, list[Run]] = {sent: [] for sent in formats}
    for seed in range(1, 2 if options.quick else 1 + options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            fleet = Fleet(Path(folder), seed)
            for sent in formats:
                found[sent].append(fleet.run(sent))
                print(f"seed {seed}, {sent}: loss {found[sent][-1].loss:.4f}", file=sys.stderr, flush=True)
    rows = [_row(sent, runs, found[formats[0]]) for sent, runs in found.items()]
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    print("| sent as | loss | beside fp32 | worst seed | bytes | fewer | deflate |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['format']} | {row['loss']:.4f} | {row['loss_ratio'] - 1:+.2%} | {row['worst_ratio'] - 1:+.2%} "
            f"| {row['bytes'] / 1e6:.2f} MB | {row['fewer']:.2f} | {row['deflate_ratio'] - 1:+.0%} |"
        )


def _row(sent: Format, runs: list[Run], exact: list[Run]) -> dict[str, Any]:
    ratios = [run.loss / one.loss for run, one in zip(runs, exact, strict=True)]
    n_bytes = sum(run.n_bytes for run in runs)
    return {
        "format": str(sent),
        "loss": statistics.fmean(run.loss for run in runs),
        "loss_ratio": statistics.fmean(ratios),
        "worst_ratio": max(ratios),
        "bytes": n_bytes,
        "fewer": sum(run.n_bytes for run in exact) / n_bytes,
        "deflate_ratio": sum(run.n_deflated for run in runs) / n_bytes,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two formats, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
