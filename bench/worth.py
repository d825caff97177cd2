"""What ranks, matrices and batches are worth: the planner's model of learning beside real training on one agent.

    python bench/worth.py            about four minutes; OMP_NUM_THREADS=1 on a shared machine

Every line trains a fresh adapter on the demo's base and one agent's text for the same seconds of CPU time and measures the
held-out loss.  `captured` is the share of the gain that the agent's own scores promise for those ranks; `drop` is the fall
of the loss as a share of the largest one.  The planner takes the power of `captured` and the shape of the batch's worth from here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator, Mapping
from operator import attrgetter
from typing import Any, Final, TypeVar

import torch

from agent import loading
from agent.batches import endless
from agent.data import DataConfig, split
from agent.evaluation import evaluate
from agent.trainers import importance
from agent.trainers.loop import MicroBatch, fit
from agent.trainers.lora import adapted
from coordinator.planner import gains
from fedpipe import corpus, pretrain
from fedpipe.pretrain import cache_folder
from protocol.messages import Calibrated, Calibration, Evaluation, Training

MAX_TOKENS: Final = 96
RATE: Final = 4e-3
RANKS: Final = (1, 2, 4, 8, 16, 32)
BATCHES: Final = (1, 2, 4, 8, 16, 32)
TOPS: Final = (7, 14, 21)

T = TypeVar("T")


class Agent:
    """One agent with its base, its text and the scores of its matrices."""

    def __init__(self) -> None:
        self.base = loading.load(pretrain.base_model(), "none", torch.device("cpu"))
        path = cache_folder() / "worth.jsonl"
        name, pairs = max(corpus.shards(3, limit=3000).items())
        corpus.write_jsonl(pairs, path)
        print(f"text: {name}")
        self.parts = split.load(DataConfig(path=str(path)), 0, 0.08)
        self.held_out = sorted(self.parts.held_out, key=attrgetter("key"))[:150]
        self.matrices = loading.matrices(self.base.model)
        ask = Calibration(n_batches=8, max_tokens=MAX_TOKENS)
        scored = drained(importance.score(self.base, self.batches(8), ask))
        assert scored is not None
        found = Calibrated(device="cpu", probe_rank=8, scores=scored.scores.astype("<f4").tobytes())
        self.noise_scale = scored.noise_scale
        self.curves = gains.curves(gains.scores_of(found, len(self.matrices)), self.matrices, RANKS)
        self.order = [self.matrices[i].name for i in (-self.curves[:, -1]).argsort()]

    def batches(self, size: int) -> Any:
        """Micro-batches of the training text for ever."""
        training = Training(n_steps=1, batch=size, max_tokens=MAX_TOKENS)
        return endless(self.parts.train, self.base.tokenizer, training, 0)

    def captured(self, ranks: Mapping[str, int]) -> float:
        """Share of the gain of all matrices at the largest rank."""
        return float(
            sum(self.curves[i, 1 + RANKS.index(ranks[m.name])] for i, m in enumerate(self.matrices) if m.name in ranks)
        )

    def loss(self, model: Any) -> float:
        """On held-out text, per token."""
        wanted = Evaluation(max_samples=len(self.held_out))
        running = evaluate(model, self.base.tokenizer, self.held_out, wanted, batch=16, max_tokens=MAX_TOKENS)
        return drained(running).loss

    def trained(self, ranks: Mapping[str, int], batch: int, seconds: float) -> tuple[int, float]:
        """Steps that fit and the loss after them.  The rate follows the planner's rule."""
        rate = RATE * (batch / 8) ** 0.5
        training = Training(n_steps=10**6, batch=batch, learning_rate=rate, max_tokens=MAX_TOKENS)
        with adapted(self.base.model, {}, ranks, 2.0, 7) as model:
            running = fit(
                model.model,
                self.batches(batch),
                model.parameters,
                training,
                micro_batch=MicroBatch(batch),
                after_forward=lambda: None,
            )
            began, step = time.process_time(), 0
            while time.process_time() - began < seconds:
                step = next(running).step
            running.close()
            return step, self.loss(model.model)


def drained(running: Generator[object, bool, T]) -> T:
    """What a generator returns."""
    try:
        while True:
            next(running)
    except StopIteration as end:
        result: T = end.value
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="CPU time of each training (default 6)")
    seconds = parser.parse_args().seconds
    agent = Agent()
    everything = [m.name for m in agent.matrices]
    with adapted(agent.base.model, {}, {}, 2.0, 7) as model:
        base = agent.loss(model.model)
    print(f"base {base:.4f}; noise of the gradient {agent.noise_scale:.0f} samples")
    lines: list[tuple[str, float, int, float]] = []
    for rank in RANKS:
        ranks = dict.fromkeys(everything, rank)
        lines.append((f"all matrices, rank {rank}", agent.captured(ranks), *agent.trained(ranks, 8, seconds)))
    for n in TOPS:
        ranks = dict.fromkeys(agent.order[:n], 8)
        lines.append((f"best {n} matrices, rank 8", agent.captured(ranks), *agent.trained(ranks, 8, seconds)))
    _print(lines, base)
    lines = []
    for batch in BATCHES:
        n_steps, loss = agent.trained(dict.fromkeys(everything, 8), batch, seconds)
        lines.append((f"batch {batch}, rank 8", n_steps / (1 + agent.noise_scale / batch), n_steps, loss))
    best = max(clean for _, clean, _, _ in lines)
    _print([(name, clean / best, n_steps, loss) for name, clean, n_steps, loss in lines], base)


def _print(lines: list[tuple[str, float, int, float]], base: float) -> None:
    largest = max(base - loss for *_, loss in lines)
    print(f"\n{'':26} {'expected':>9} {'steps':>6} {'loss':>8} {'drop':>6}")
    for name, expected, n_steps, loss in lines:
        print(f"{name:26} {expected:9.2f} {n_steps:6d} {loss:8.4f} {(base - loss) / largest:6.2f}")


if __name__ == "__main__":
    main()
