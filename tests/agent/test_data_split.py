"""Laws of the split: it is a partition that each example decides by its content alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.data import DataConfig, Example
from agent.data.split import digest, is_held_out, load, split
from protocol.errors import BadConfig

keys = st.binary(min_size=16, max_size=16)
found = st.lists(keys.map(lambda key: Example(key, "p", "c")), max_size=40)
seeds = st.integers(0, 2**53)
ratios = st.floats(0, 0.99)


@given(found, found, seeds, ratios, st.randoms(use_true_random=False))
def test_adding_and_reordering_moves_no_example(
    old: list[Example], new: list[Example], seed: int, ratio: float, rng: random.Random
) -> None:
    before = split(old, seed, ratio)
    mixed = old + new
    rng.shuffle(mixed)
    after = split(mixed, seed, ratio)
    assert len(after.train) + len(after.held_out) == len(mixed)
    assert {e.key for e in before.train} <= {e.key for e in after.train}
    assert {e.key for e in before.held_out} <= {e.key for e in after.held_out}
    assert not {e.key for e in after.train} & {e.key for e in after.held_out}


@given(keys, seeds, ratios, ratios)
def test_a_larger_ratio_holds_out_a_superset(key: bytes, seed: int, one: float, other: float) -> None:
    if is_held_out(key, seed, min(one, other)):
        assert is_held_out(key, seed, max(one, other))


@given(seeds)
@settings(max_examples=10)
def test_the_ratio_is_kept_and_seeds_differ(seed: int) -> None:
    many = [n.to_bytes(16, "big") for n in range(4000)]
    mine = {key for key in many if is_held_out(key, seed, 0.2)}
    other = {key for key in many if is_held_out(key, seed + 1, 0.2)}
    assert 0.17 < len(mine) / len(many) < 0.23
    assert mine != other
    assert not any(is_held_out(key, seed, 0.0) for key in many)


@given(found, st.randoms(use_true_random=False))
def test_the_digest_knows_content_and_not_order(some: list[Example], rng: random.Random) -> None:
    shuffled = rng.sample(some, len(some))
    assert digest(shuffled) == digest(some)
    assert digest([*some, Example(b"another example!", "p", "c")]) != digest(some)


def test_load_reads_the_first_so_many(data_file: Path) -> None:
    whole = load(DataConfig(path=str(data_file)), 0, 0.25)
    first = load(DataConfig(path=str(data_file), max_examples=40), 0, 0.25)
    assert len(first.train) + len(first.held_out) == 40
    assert first.train == whole.train[: len(first.train)]
    assert first.held_out == whole.held_out[: len(first.held_out)]


def test_a_split_without_training_examples_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(BadConfig, match="none is left to train on"):
        load(DataConfig(path=str(tmp_path / "x.txt")), 0, 0.1)
