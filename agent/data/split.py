"""Train and held-out part by a hash of the content: no list of indices to keep, nothing to agree on, stable for ever.

    held out  <=>  hash(data_seed, key) < held_out_ratio

Each example decides for itself.  So the split is the same in every round and after every restart, adding data moves no old
example, a copy of an example lies on the side of its twin, and a larger ratio holds out a superset of a smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from agent.data import DataConfig, Example
from agent.data.files import rows
from agent.data.shapes import examples
from protocol.errors import BadConfig


class Split(NamedTuple):
    """The two parts of a data set, each in the order of the files."""

    train: list[Example]
    held_out: list[Example]


def is_held_out(key: bytes, data_seed: int, held_out_ratio: float) -> bool:
    """Whether an example belongs to the held-out part."""
    drawn = hashlib.blake2b(key, digest_size=8, salt=data_seed.to_bytes(16, "big")).digest()
    return int.from_bytes(drawn, "big") < held_out_ratio * 2**64


def split(found: Iterable[Example], data_seed: int, held_out_ratio: float) -> Split:
    """Deal every example to its side."""
    parts = Split([], [])
    for example in found:
        parts[is_held_out(example.key, data_seed, held_out_ratio)].append(example)
    return parts


def load(config: DataConfig, data_seed: int, held_out_ratio: float) -> Split:
    """Read and split a data set.  Raises BadConfig, also when nothing is left to train on."""
    found = examples(rows(Path(config.path).expanduser()), config)
    parts = split(islice(found, config.max_examples or None), data_seed, held_out_ratio)
    if not parts.train:
        raise BadConfig(
            f"data {config.path} has {len(parts.held_out)} examples, all held out: none is left to train on"
        )
    return parts


def digest(found: Iterable[Example]) -> str:
    """Sha256 over the contents whatever their order: two data sets with the same digest hold the same examples."""
    whole = hashlib.sha256()
    for key in sorted(example.key for example in found):
        whole.update(key)
    return whole.hexdigest()
