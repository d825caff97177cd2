"""How far the importance of matrices can be trusted, and what it costs to measure: seeds, probe ranks, warm-up, agents, widths.

    python bench/importance.py           about three minutes; OMP_NUM_THREADS=1 on a shared machine

The set is the eight matrices with the largest gain.  Each line compares the sets of its variants with that of the default scorer
(gradient, probe rank 8, eight mini-batches, unquantized base, seed 0) by Jaccard's index, and says what one scoring costs
in CPU seconds, and in steps of training of the same batch.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Final, NamedTuple, TypeVar

import torch
from msgspec.structs import replace

from agent import loading
from agent.batches import endless
from agent.data import DataConfig, split
from agent.data.split import Split
from agent.loading import Loaded
from agent.trainers import importance
from agent.trainers.loop import MicroBatch, fit
from agent.trainers.lora import adapted
from fedpipe import corpus, pretrain
from fedpipe.pretrain import cache_folder
from protocol.messages import Bits, Calibration, Training

TOP: Final = 8
BATCH: Final = 8
MAX_TOKENS: Final = 96
DEFAULT: Final = Calibration(max_tokens=MAX_TOKENS, learning_rate=3e-3)

T = TypeVar("T")


class Scored(NamedTuple):
    """The chosen matrices, the share of the whole score that they have, and what it took."""

    chosen: frozenset[str]
    share: float
    seconds: float


def score(base: Loaded, parts: Split, ask: Calibration) -> Scored:
    """One scoring of one agent's text."""
    training = Training(n_steps=1, batch=BATCH, max_tokens=MAX_TOKENS)
    began = time.process_time()
    found = drained(importance.score(base, endless(parts.train, base.tokenizer, training, ask.seed), ask))
    seconds = time.process_time() - began
    assert found is not None
    whole = dict(zip([m.name for m in loading.matrices(base.model)], found.scores.sum(axis=1), strict=True))
    chosen = sorted(whole, key=whole.__getitem__, reverse=True)[:TOP]
    return Scored(frozenset(chosen), sum(whole[name] for name in chosen) / sum(whole.values()), seconds)


def step_s(base: Loaded, parts: Split, n: int = 12) -> float:
    """CPU seconds of a training step of the same batch, all matrices at rank 8."""
    training = Training(n_steps=n, batch=BATCH, max_tokens=MAX_TOKENS)
    ranks = {m.name: 8 for m in loading.matrices(base.model)}
    with adapted(base.model, {}, ranks, 2.0, 0) as model:
        batches = endless(parts.train, base.tokenizer, training, 0)
        began = time.process_time()
        drained(
            fit(
                model.model,
                batches,
                model.parameters,
                training,
                micro_batch=MicroBatch(BATCH),
                after_forward=lambda: None,
            )
        )
    return (time.process_time() - began) / n


def drained(running: Generator[object, bool, T]) -> T:
    """What a generator returns."""
    try:
        while True:
            next(running)
    except StopIteration as end:
        result: T = end.value
        return result


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Shared matrices as a share of all that either set has."""
    return len(a & b) / len(a | b)


def main() -> None:
    folder, cpu = pretrain.base_model(), torch.device("cpu")
    agents: dict[str, Split] = {}
    for name, pairs in corpus.shards(3, limit=1500).items():
        path = cache_folder() / f"importance-{name}.jsonl"
        corpus.write_jsonl(pairs, path)
        agents[name] = split.load(DataConfig(path=str(path)), 0, 0.1)
    parts = next(iter(agents.values()))
    base = loading.load(folder, "none", cpu)
    default, one_step = score(base, parts, DEFAULT), step_s(base, parts)
    print(
        f"default: {default.share:.0%} of the score in {TOP} of {len(loading.matrices(base.model))} matrices, ", end=""
    )
    print(f"{default.seconds:.2f} s or {default.seconds / one_step:.0f} training steps of {one_step:.3f} s")
    print(f"{', '.join(sorted(default.chosen))}\n\n{'':34} {'Jaccard':>8} {'least':>6} {'s':>6} {'steps':>6}")

    def line(name: str, asks: list[Calibration], *, of: Split = parts, on: Loaded = base) -> None:
        found = [score(on, of, ask) for ask in asks]
        same, seconds = [jaccard(f.chosen, default.chosen) for f in found], sum(f.seconds for f in found) / len(found)
        print(
            f"{name:34} {sum(same) / len(same):8.2f} {min(same):6.2f} {seconds:6.2f} {seconds / one_step:6.0f}",
            flush=True,
        )

    line("five other seeds", [replace(DEFAULT, seed=seed) for seed in range(1, 6)])
    for rank in (1, 2, 4, 16):
        line(f"probe rank {rank}, two seeds", [replace(DEFAULT, probe_rank=rank, seed=seed) for seed in (0, 1)])
    for n in (1, 2, 4, 32):
        line(f"{n} mini-batches, two seeds", [replace(DEFAULT, n_batches=n, seed=seed) for seed in (0, 1)])
    for warmup in (0, 8, 24, 64):
        asks = [replace(DEFAULT, scorer="triplet", warmup_steps=warmup, seed=seed) for seed in (0, 1)]
        line(f"triplet, {warmup} steps of warm-up", asks)
    for name, other in list(agents.items())[1:]:
        line(f"another agent: {name}", [DEFAULT], of=other)
    widths: tuple[Bits, ...] = ("int8", "nf4")
    for bits in widths:
        line(f"{bits} base", [DEFAULT], on=loading.load(folder, bits, cpu))


if __name__ == "__main__":
    main()
