"""Model files: a smaller model is a prefix of the file, and nothing but a level's end is a valid end."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol import files
from protocol.adapters import Adapter, Factors, canonical, truncate
from protocol.errors import BadUpdate
from protocol.messages import Blob, Wire
from protocol.models import StoredModel, open_model, read_model, write_model

SIZES = {"a.q": (6, 5, 3), "b.up": (3, 8, 1), "c.down": (4, 4, 4)}  # d_out, d_in, rank


def make_adapter(seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: canonical(
            Factors(rng.normal(size=(rank, d_in)).astype(np.float32), rng.normal(size=(d_out, rank)).astype(np.float32))
        )
        for name, (d_out, d_in, rank) in reversed(SIZES.items())
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model"


def same(found: Adapter, expected: Adapter, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, factors in expected.items():
        assert np.allclose(found[name].a, factors.a, rtol=tolerance, atol=0)
        assert np.allclose(found[name].b, factors.b, rtol=tolerance, atol=0)


def cut(adapter: Adapter, rank: int) -> Adapter:
    return {name: truncate(factors, rank) for name, factors in adapter.items()} if rank else {}


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0), ("fp16", 2**-10), ("bf16", 2**-8)])
def test_round_trip(path: Path, dtype: Wire, tolerance: float) -> None:
    adapter = make_adapter()
    levels = write_model(path, adapter, version=7, dtype=dtype)
    assert [level.rank for level in levels] == [0, 1, 2, 3, 4]
    assert levels[-1].size == path.stat().st_size
    same(read_model(path, max_bytes=levels[-1].size), adapter, tolerance)
    same(dict(StoredModel(path, max_bytes=levels[-1].size)), adapter, tolerance)
    header, ends = open_model(path, max_bytes=levels[-1].size)
    assert (header.version, ends) == (7, [level.size for level in levels])


@pytest.mark.parametrize("rank", range(5))
def test_every_level_is_a_prefix_that_is_a_model(path: Path, rank: int) -> None:
    adapter = make_adapter()
    level = write_model(path, adapter, version=1, dtype="fp32")[rank]
    prefix = path.read_bytes()[: level.size]
    assert hashlib.sha256(prefix).hexdigest() == level.sha256
    same(read_model(path, max_rank=rank, max_bytes=10**6), cut(adapter, rank))
    path.write_bytes(prefix)
    same(read_model(path, max_bytes=10**6), cut(adapter, rank))
    same(read_model(path, max_rank=2, max_bytes=10**6), cut(adapter, min(rank, 2)))


def test_levels_are_what_a_blob_carries(path: Path) -> None:
    levels = write_model(path, make_adapter(), version=1, dtype="bf16")
    blob = Blob(sha256=levels[-1].sha256, size=levels[-1].size, levels=levels)
    assert blob.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_empty_model_is_a_header(path: Path) -> None:
    levels = write_model(path, {}, version=0, dtype="fp32")
    assert [level.rank for level in levels] == [0]
    assert read_model(path, max_bytes=10**6) == {}


def test_a_file_cut_inside_a_level_is_refused(path: Path) -> None:
    ends = {level.size for level in write_model(path, make_adapter(), version=1, dtype="bf16")}
    whole = path.read_bytes()
    for n in set(range(len(whole))) - ends:
        path.write_bytes(whole[:n])
        with pytest.raises(BadUpdate):
            open_model(path, max_bytes=10**6)
    path.write_bytes(whole + b"\0")
    with pytest.raises(BadUpdate, match="does not end with one of its levels"):
        read_model(path, max_bytes=10**6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_a_bad_update_or_changes_values_only(path: Path, data: st.DataObject) -> None:
    write_model(path, make_adapter(), version=1, dtype="bf16")
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        found = read_model(path, max_bytes=10**6)
    except BadUpdate:
        return
    assert all(np.isfinite(factors.a).all() and np.isfinite(factors.b).all() for factors in found.values())


def test_an_oversized_file_is_refused_unread(path: Path) -> None:
    levels = write_model(path, make_adapter(), version=1, dtype="fp32")
    with pytest.raises(BadUpdate, match="exceeds"):
        read_model(path, max_bytes=levels[-1].size - 1)


def test_values_that_are_not_finite_are_not_written_and_leave_the_file_as_it_was(path: Path) -> None:
    adapter = make_adapter()
    write_model(path, adapter, version=1, dtype="fp32")
    before = path.read_bytes()
    adapter["b.up"].a[0, 3] = np.inf
    with pytest.raises(BadUpdate, match=r"'b.up'"):
        write_model(path, adapter, version=2, dtype="fp32")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("part", ["a", "b"])
def test_values_that_are_not_finite_are_not_accepted(path: Path, part: str) -> None:
    adapter = make_adapter()
    getattr(adapter["b.up"], part)[0, 0] = 12345
    write_model(path, adapter, version=1, dtype="fp32")
    path.write_bytes(path.read_bytes().replace(np.float32(12345).tobytes(), np.float32(np.nan).tobytes()))
    with pytest.raises(BadUpdate, match=r"'b.up' of the model has values that are not finite"):
        read_model(path, max_bytes=10**6)
    with pytest.raises(BadUpdate, match=r"'b.up' of the model has values that are not finite"):
        StoredModel(path, max_bytes=10**6)["b.up"]


def test_an_update_file_is_no_model(path: Path) -> None:
    with files.replacing(path) as file:
        file.write(b"\x82\xa1v\x01\xa4kind\xa4lora")
    with pytest.raises(BadUpdate, match="kind"):
        read_model(path, max_bytes=10**6)
