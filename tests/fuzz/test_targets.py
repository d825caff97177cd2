"""The corpus of every fuzzing target holds, and so do some hundred changes of it; `make fuzz` tries a million."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
N_CHANGED = {"transfer": 100, "tar": 100, "round": 100, "arrival": 100}
MAX_FILES = 300
MAX_BYTES = 2**20


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@cache
def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_holds(name: str) -> None:
    inputs = corpus(name)
    assert inputs, "python -m tests.fuzz.seeds"
    for data in inputs:
        TARGETS[name](data)


@st.composite
def changed(draw: st.DrawFn, name: str) -> bytes:
    """One input of the corpus with a piece of it, or of another one, cut out, repeated or put elsewhere; a few bytes anew."""
    inputs = [*corpus(name), b""]
    whole, other = draw(st.sampled_from(inputs)), draw(st.sampled_from(inputs))
    at, start, end = (draw(st.integers(0, len(text))) for text in (whole, other, other))
    gone = draw(st.integers(0, max(0, len(whole) - at)) | st.just(0))
    spliced = bytearray(whole[:at] + draw(st.binary(max_size=8)) + other[start:end] + whole[at + gone :])
    for _ in range(draw(st.integers(0, 4)) if spliced else 0):
        spliced[draw(st.integers(0, len(spliced) - 1))] = draw(st.integers(0, 255))
    return bytes(spliced[:4096])


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_becomes_of_the_corpus_holds(name: str) -> None:
    @settings(
        max_examples=N_CHANGED.get(name, 300), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(changed(name))
    def holds(data: bytes) -> None:
        TARGETS[name](data)

    holds()


def test_the_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) <= MAX_FILES
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.parent.name for path in files} == set(TARGETS)
