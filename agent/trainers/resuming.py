"""What of a training run is kept so that the next process goes on with it, bit for bit on a CPU.

    weights that learn · the optimizer's state · averages of the importance scores · random generators · the Point

All else follows from the plan and the data: the base, the frozen adapter, the rate of a step, and which samples come next (the
shuffle is drawn from a seed, so their number is their place).  The key of a checkpoint says what it must find again.

Weights and optimizer change only at the end of a step, where the Point and the generators are noted with them.  So the last
noted point can be written at any later moment, also in the middle of the next step.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch

from agent import checkpoints
from agent.checkpoints import ORIGIN, Entry, Header, Point, Stored
from agent.child import TrainTask
from agent.data import Example
from agent.trainers.importance import Sensitivity
from protocol.blobs import disk
from protocol.messages import Evaluated

logger = logging.getLogger(__name__)

SHARE: Final = 20
"""Between two checkpoints lies at least so many times what the last one took: training loses no more than a 20th."""
INDIFFERENT: Final = (
    "attempt",
    "predicted_bytes",
    "evaluate",
    "max_update_bytes",
    "update_dtype",
    "kept_energy_ratio",
    "issued_at",
    "stop_after_s",
    "ttl_s",
)
"""Fields of a plan that do not change its training.  A round that is attempted again asks for the same training."""


class Place(NamedTuple):
    """Where the checkpoint of a task lies (None: nowhere), how often it is written (0: only when told to), what it belongs to.

    `since` is the monotonic time from which `every_s` counts.
    """

    path: Path | None
    every_s: float
    key: str
    job: str
    round: int
    since: float

    def find(self) -> Stored | None:
        """What an earlier run of the same task left."""
        return checkpoints.find(self.path, self.key) if self.path else None


def place(task: TrainTask, base_sha256: str, examples: Sequence[Example], device: torch.device, since: float) -> Place:
    """The key is a digest of all that a training depends on: plan, base, received model, text in its order, kind of device."""
    plan = msgspec.to_builtins(task.plan)
    text = hashlib.sha256()
    for example in examples:
        text.update(example.key)
    parts = {
        "plan": {name: value for name, value in plan.items() if name not in INDIFFERENT},
        "base": base_sha256,
        "data": msgspec.to_builtins(task.data),
        "text": text.hexdigest(),
        "model": Path(task.model_file).name if task.model_file else "",  # named by its digest
        "device": device.type,
    }
    key = hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()
    path = Path(task.checkpoint) if task.checkpoint else None
    return Place(path, task.checkpoint_s, key, task.plan.job, task.plan.round, since)


class Keeper:
    """Keeps the checkpoint of one run: of the weights that learn, in an order that the plan decides, and all that goes with them."""

    def __init__(
        self,
        place: Place,
        weights: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        sensitivity: Sensitivity,
        evaluated: Evaluated | None,
    ) -> None:
        self.optimizer, self.sensitivity = optimizer, sensitivity
        self._place, self._weights, self._evaluated = place, weights, evaluated
        self._due_at = place.since + place.every_s
        self._is_complained = False
        self._device = weights[0].device
        self._point, self._generators = ORIGIN, Generators.now(self._device)

    def resume(self, stored: Stored) -> Point:
        """Put everything back as it was.  Raises Unavailable when the disk refuses."""
        averages: list[torch.Tensor] = []
        with torch.no_grad(), disk(stored.path.parent):
            for entry, data in stored.tensors():
                value = torch.frombuffer(data, dtype=getattr(torch, entry.dtype)).reshape(entry.shape)
                kind, _, rest = entry.name.partition(".")
                if kind == "average":
                    averages.append(value.to(self._device, copy=True))
                    continue
                index, _, name = rest.partition(".")
                weight = self._weights[int(index)]
                if kind == "weight":
                    weight.copy_(value)
                else:
                    self.optimizer.state[weight][name] = value.to(weight.device, copy=True)
        self.sensitivity.restore(averages)
        restore(stored.header.rng, self._device)
        self._point, self._generators = stored.header.point, Generators.now(self._device)
        return self._point

    @property
    def point(self) -> Point:
        """The last noted point."""
        return self._point

    def note(self, point: Point) -> None:
        """A step is made; write if it is time."""
        self._point, self._generators = point, Generators.now(self._device)
        if self._place.every_s and time.monotonic() >= self._due_at:
            self.write()

    def write(self) -> bool:
        """Write the last noted point; whether it is on disk.  Blocks as long as the disk does."""
        if self._place.path is None:
            return False
        began_at = time.monotonic()
        tensors = dict(self._tensors())
        header = Header(
            key=self._place.key,
            job=self._place.job,
            round=self._place.round,
            point=self._point,
            evaluated=self._evaluated,
            rng=self._generators.packed(),
            tensors=[_entry(name, tensor) for name, tensor in tensors.items()],
        )
        try:
            checkpoints.write(self._place.path, header, map(_bytes, tensors.values()))
        except OSError as error:
            if not self._is_complained:
                logger.warning("no checkpoint, training goes on: %s", error, extra={"action": "checkpoint_failed"})
            self._is_complained = True
            return False
        finally:
            now = time.monotonic()
            self._due_at = now + max(self._place.every_s, SHARE * (now - began_at))
        return True

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, weight in enumerate(self._weights):
            yield f"weight.{index}", weight.detach()
            for name, value in self.optimizer.state.get(weight, {}).items():
                yield f"optimizer.{index}.{name}", value
        for index, average in enumerate(self.sensitivity.state()):
            yield f"average.{index}", average


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Generators(NamedTuple):
    """Where the random generators are that training may draw from.  Cheap to take after each step, to be packed when written."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    python: tuple[Any, ...]
    legacy: Any

    @staticmethod
    def now(device: torch.device) -> Generators:
        """The present states."""
        return Generators(
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            python=random.getstate(),
            legacy=np.random.get_state(legacy=True),  # noqa: NPY002 - numpy's, from which others may draw
        )

    def packed(self) -> dict[str, bytes]:
        """As they go into a checkpoint."""
        name, words, *rest = self.legacy
        states = {
            "cpu": self.cpu.numpy().tobytes(),
            "python": msgspec.msgpack.encode(self.python),
            "numpy": msgspec.msgpack.encode([name, words.tolist(), *rest]),
        }
        return states if self.cuda is None else states | {"cuda": self.cuda.numpy().tobytes()}


def restore(packed: Mapping[str, bytes], device: torch.device) -> None:
    """Put the generators back to where they were when they were packed."""
    torch.set_rng_state(torch.frombuffer(bytearray(packed["cpu"]), dtype=torch.uint8))
    random.setstate(msgspec.msgpack.decode(packed["python"], type=tuple[int, tuple[int, ...], float | None]))
    np.random.set_state(tuple(msgspec.msgpack.decode(packed["numpy"])))  # noqa: NPY002
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(packed["cuda"]), dtype=torch.uint8), device)
