"""Training that does nothing: what an agent got comes back, changed a little as no other agent and no other round changes it.

Without that all updates would be one file, which content addressing stores and sends once; the round would look cheaper
than any real one.  Registered as a plug-in by bench/rounds/fleet.py, in processes of that fleet alone.

    noop-average    the factors' values, averaged: what Flower and NVFlare do with arrays
    noop-product    a change in low-rank factors, summed exactly and cut by SVD: what fedpipe's own method does
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

import msgspec
import numpy as np

from agent.child import Evaluated, Finished, Phase, Surveyed, TrainTask
from agent.trainers import Running
from protocol import messages
from protocol.adapters import Stack, Stacks, alike
from protocol.messages import Matrix, Plan
from protocol.methods import Method
from protocol.models import read_model
from protocol.updates import Kind, write_update

AVERAGE: Final = Method(name="noop-average", trainer="noop-average", kind="lora-values", aggregator="average")
PRODUCT: Final = Method(name="noop-product", trainer="noop-product", kind="lora", aggregator="product")
METHODS: Final = (AVERAGE, PRODUCT)

MATRICES_FILE: Final = "matrices.json"
"""In the base's folder: the matrices that its survey finds."""


class Values:
    """Sends the values that it received."""

    produces: ClassVar[Kind] = "lora-values"

    def survey(self, task: TrainTask) -> Running:
        """Say what lies in the base's folder."""
        listed = (Path(task.base_folder) / MATRICES_FILE).read_bytes()
        matrices = msgspec.json.decode(listed, type=list[Matrix])
        digest = hashlib.sha256(listed).hexdigest()
        yield Surveyed(result=messages.Surveyed(base_sha256=digest, matrices=matrices, n_train=100, n_eval=10))
        return Finished()

    def train(self, task: TrainTask) -> Running:
        """Hand back what came."""
        plan = task.plan
        yield Phase(name="training")
        if plan.purpose == "evaluate":
            yield Evaluated(result=messages.Evaluated(version=plan.version, n_samples=10, n_tokens=10, loss=0.0))
            return Finished()
        received = read_model(Path(task.model_file), max_bytes=task.max_model_bytes) if task.model_file else Stacks([])
        write_update(
            Path(task.out_file),
            self._moved(received, plan, partial(self._shapes, task)),
            job=plan.job,
            round=plan.round,
            attempt=plan.attempt,
            dtype=plan.update_dtype,
            kind=self.produces,
        )
        return Finished(file=task.out_file, samples=1, steps=1)

    def _shapes(self, task: TrainTask) -> dict[str, tuple[int, int]]:
        listed = (Path(task.base_folder) / MATRICES_FILE).read_bytes()
        return {m.name: (m.d_out, m.d_in) for m in msgspec.json.decode(listed, type=list[Matrix])}

    def _moved(self, received: Stacks, plan: Plan, survey: Callable[[], dict[str, tuple[int, int]]]) -> Stacks:
        """The factors received, which are of the planned ranks, or else ones that are drawn, made the share's own."""
        seed = plan.train.seed if plan.train else 0
        known = received if received.runs else drawn(plan.ranks, survey(), np.random.default_rng(seed))
        return Stacks((names, self._own(stack, seed)) for names, stack in known.runs)

    @staticmethod
    def _own(stack: Stack, seed: int) -> Stack:
        shift = np.float32(1e-3 * (seed % 9973 + 1))
        return Stack(stack.a + shift, stack.b + shift)


class Delta(Values):
    """Sends as many values, to be understood as a change, and one that does not depend on any other agent's."""

    produces: ClassVar[Kind] = "lora"

    @staticmethod
    def _own(stack: Stack, seed: int) -> Stack:
        a, b = (
            np.random.default_rng(seed).choice(np.float32([-1, 1]), n) for n in (stack.a.shape[2], stack.b.shape[1])
        )
        return Stack(stack.a * a, stack.b * b[:, None])


def drawn(ranks: dict[str, int], shapes: dict[str, tuple[int, int]], draw: np.random.Generator) -> Stacks:
    """Random factors."""
    names, runs = sorted(ranks), []
    for whole in alike(names, lambda name: (ranks[name], shapes[name])):
        n, rank, (d_out, d_in) = whole.stop - whole.start, ranks[names[whole.start]], shapes[names[whole.start]]
        stack = Stack(draw.random((n, rank, d_in), np.float32), draw.random((n, d_out, rank), np.float32))
        runs.append((names[whole], stack))
    return Stacks(runs)
