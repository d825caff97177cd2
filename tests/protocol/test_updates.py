"""Update files: what is written comes back, and no damage or lie gets past the reader."""

import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.adapters import Adapter, Factors, bands
from protocol.errors import BadUpdate
from protocol.messages import UpdateDtype
from protocol.models import read_model, write_model
from protocol.updates import LoraUpdate, open_update, write_update

WHICH: dict[str, Any] = {"job": "j1", "round": 3, "attempt": 1}
RANKS = {"layers.0.q": 4, "layers.0.v": 2, "layers.1.up": 1}
SHAPES = {"layers.0.q": (6, 5), "layers.0.v": (3, 5), "layers.1.up": (7, 2)}


def make_adapter(seed: int = 0, ranks: dict[str, int] = RANKS) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(
            rng.normal(size=(rank, SHAPES[name][1])).astype(np.float32),
            rng.normal(size=(SHAPES[name][0], rank)).astype(np.float32),
        )
        for name, rank in reversed(ranks.items())
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "update"


def write(path: Path, adapter: Adapter, dtype: UpdateDtype = "fp32") -> int:
    return write_update(path, adapter, **WHICH, dtype=dtype)


def read(path: Path, max_bytes: int = 10**6) -> LoraUpdate:
    return LoraUpdate.open(path, max_bytes=max_bytes)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_round_trip(path: Path, dtype: UpdateDtype, tolerance: float) -> None:
    adapter = make_adapter()
    size = write(path, adapter, dtype)
    update = open_update(path, "lora", **WHICH, max_bytes=size)
    assert update.size == size == path.stat().st_size
    assert update.ranks == RANKS
    update.check(RANKS, SHAPES)
    update.check_values()
    for name, factors in adapter.items():
        back = update.factors(name)
        assert np.allclose(back.a, factors.a, rtol=tolerance, atol=0)
        assert np.allclose(back.b, factors.b, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 1 / 127), ("nf4", 0.2)])
def test_round_trip_by_component(path: Path, dtype: UpdateDtype, tolerance: float) -> None:
    adapter = make_adapter()
    spread = np.geomspace(1, 1e-3, 4, dtype=np.float32)
    adapter["layers.0.q"] = Factors(adapter["layers.0.q"].a, adapter["layers.0.q"].b * spread)
    update = open_update(path, "lora", **WHICH, max_bytes=write(path, adapter, dtype))
    update.check(RANKS, SHAPES)
    update.check_values()
    for name, factors in adapter.items():
        back = update.factors(name)
        assert (np.abs(back.a - factors.a) <= tolerance * np.abs(factors.a).max(axis=1, keepdims=True)).all()
        assert (np.abs(back.b - factors.b) <= tolerance * np.abs(factors.b).max(axis=0, keepdims=True)).all()


@pytest.mark.parametrize(("dtype", "smaller"), [("bf16", 2), ("int8", 4), ("nf4", 7.75)])
def test_a_large_update_takes_next_to_nothing_beside_its_values(path: Path, dtype: UpdateDtype, smaller: float) -> None:
    rng = np.random.default_rng(0)
    factors = Factors(
        rng.standard_normal((16, 2048), dtype=np.float32), rng.standard_normal((4096, 16), dtype=np.float32)
    )
    n_values = 16 * (2048 + 4096)
    assert write(path, {"q": factors}, dtype) <= 1.01 * 4 * n_values / smaller


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_scale_that_is_no_number_is_refused(path: Path, dtype: UpdateDtype) -> None:
    write(path, make_adapter(), dtype)
    header, *_ = msgpack.Unpacker(path.open("rb"))
    at = len(msgpack.packb(header)) + 1 + 5
    packed = bytearray(path.read_bytes())
    packed[at : at + 2] = b"\x80\x7f"  # infinity in bf16
    path.write_bytes(packed)
    with pytest.raises(BadUpdate, match=r"layers\.0\.q"):
        read(path).check_values()


def test_equal_adapters_have_equal_bytes(path: Path, tmp_path: Path) -> None:
    adapter = make_adapter()
    write(path, adapter)
    write(tmp_path / "other", dict(sorted(adapter.items())))
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_what_a_model_was_read_into_is_written_as_if_it_were_single_matrices(path: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", make_adapter(), version=1, dtype="fp32")
    received = read_model(tmp_path / "model", max_bytes=10**6)
    write(path, received)
    write(tmp_path / "single", dict(received))
    assert path.read_bytes() == (tmp_path / "single").read_bytes()


def test_updates_with_one_table_of_contents_share_it_and_no_others(tmp_path: Path) -> None:
    found = []
    for name, seed, ranks in (("one", 1, RANKS), ("two", 2, RANKS), ("less", 3, {**RANKS, "layers.0.q": 1})):
        write(tmp_path / name, make_adapter(seed, ranks))
        found.append(read(tmp_path / name))
    assert found[0].contents is found[1].contents
    assert found[0].ranks == RANKS
    assert found[2].ranks["layers.0.q"] == 1
    assert not np.array_equal(found[0].factors("layers.0.v").a, found[1].factors("layers.0.v").a)
    for update in found:
        update.check(RANKS, SHAPES)


def test_any_msgpack_reader_can_follow_it(path: Path) -> None:
    adapter = make_adapter()
    write(path, adapter)
    header, *records = msgpack.Unpacker(path.open("rb"))
    assert msgpack.unpackb(zlib.decompress(header["matrices"])) == [
        [name, RANKS[name], *SHAPES[name]] for name in sorted(RANKS)
    ]
    assert {k: header[k] for k in ("v", "kind", *WHICH)} == {"v": 1, "kind": "lora", **WHICH}
    for name, (a, b) in zip(sorted(RANKS), records, strict=True):
        assert a == adapter[name].a.tobytes()
        assert b == adapter[name].b.tobytes()


def rewritten(path: Path, matrices: object) -> None:
    """The same file with another list of matrices."""
    unpacker = msgpack.Unpacker(path.open("rb"))
    header = unpacker.unpack()
    behind = path.read_bytes()[unpacker.tell() :]
    path.write_bytes(msgpack.packb(header | {"matrices": matrices}) + behind)


def test_a_list_that_is_not_deflated_is_read_too(path: Path) -> None:
    write(path, make_adapter())
    before = read(path)
    rewritten(path, [[name, RANKS[name], *SHAPES[name]] for name in sorted(RANKS)])
    assert read(path).ranks == before.ranks
    read(path).check_values()


@pytest.mark.parametrize(
    "matrices",
    [
        b"",
        b"no zlib",
        zlib.compress(bytes(9 * 2**20)),  # small on the wire
        zlib.compress(msgpack.packb([]))[:-1],
        zlib.compress(msgpack.packb([])) + b"more",
        zlib.compress(b"\xc1"),
    ],
)
def test_a_list_that_does_not_inflate_is_refused(path: Path, matrices: bytes) -> None:
    write(path, make_adapter())
    rewritten(path, matrices)
    tracemalloc.start()
    with pytest.raises(BadUpdate):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_scores_ride_along_for_some_or_no_matrix(path: Path) -> None:
    plain = write(path, make_adapter())
    assert read(path).scores == {}
    scores = {"layers.0.v": [2.0, 0.5], "layers.1.up": [0.0], "not trained": [1.0]}
    write_update(path, make_adapter(), **WHICH, dtype="fp32", scores=scores)
    update = read(path)
    assert update.scores == {"layers.0.v": [2.0, 0.5], "layers.1.up": [0.0]}
    update.check(RANKS, SHAPES)
    update.check_values()
    assert plain < update.size < plain + 30


def test_a_file_from_before_scores_still_opens(path: Path) -> None:
    write(path, make_adapter())
    header, *records = msgpack.Unpacker(path.open("rb"))
    size = path.stat().st_size - len(msgpack.packb(header))
    del header["scores"]
    path.write_bytes(msgpack.packb(header) + path.read_bytes()[-size:])
    assert len(records) == 3
    assert read(path).scores == {}
    read(path).check_values()


def test_scores_as_earlier_versions_sent_them_are_read(path: Path) -> None:
    write(path, make_adapter())
    header, *_ = msgpack.Unpacker(path.open("rb"))
    values = path.read_bytes()[len(msgpack.packb(header)) :]
    path.write_bytes(msgpack.packb({**header, "scores": [[0.25, 0.5], [], [1.0]]}) + values)
    assert read(path).scores == {"layers.0.q": [0.5, 0.25], "layers.1.up": [1.0]}


@pytest.mark.parametrize(
    "scores",
    [
        [[1.0], [1.0]],
        [[1.0]] * 4,
        [[-1e-9], [], []],
        [[float("nan")], [], []],
        [[float("inf")], [], []],
        [[1e31], [], []],
        [[1.0] * 65, [], []],
        [["1"], [], []],
        [b"\x80", b"", b""],
        [b"\x80\xbf", b"", b""],
        [b"\x80\x7f", b"", b""],
        [b"\xff\xff", b"", b""],
        [b"\x80\x3f" * 65, b"", b""],
        {"layers.0.q": [1.0]},
    ],
)
def test_scores_that_are_none_are_refused(path: Path, scores: object) -> None:
    write(path, make_adapter())
    header, *_ = msgpack.Unpacker(path.open("rb"))
    values = path.read_bytes()[len(msgpack.packb(header)) :]
    path.write_bytes(msgpack.packb(header | {"scores": scores}) + values)
    with pytest.raises(BadUpdate, match="scores"):
        read(path)


def test_a_lower_rank_than_planned_is_fine_also_none_at_all(path: Path) -> None:
    write(path, make_adapter(ranks=RANKS | {"layers.0.q": 1, "layers.0.v": 0}))
    update = read(path)
    update.check(RANKS, SHAPES)
    update.check_values()
    assert update.factors("layers.0.v").shape == (3, 5)


@pytest.mark.parametrize(
    ("ranks", "shapes", "text"),
    [
        (RANKS | {"layers.0.q": 3}, SHAPES, r"'layers.0.q' has rank 4, planned was 3"),
        (RANKS | {"layers.2.q": 3}, SHAPES, r"'layers.2.q' is missing"),
        ({"layers.0.q": 4}, SHAPES, r"'layers.0.v' is not in the plan"),
        (RANKS, SHAPES | {"layers.1.up": (2, 7)}, r"'layers.1.up' has shape \(7, 2\), the base has \(2, 7\)"),
    ],
)
def test_what_differs_from_the_plan_is_named(
    path: Path, ranks: dict[str, int], shapes: dict[str, tuple[int, int]], text: str
) -> None:
    write(path, make_adapter())
    with pytest.raises(BadUpdate, match=text):
        read(path).check(ranks, shapes)


@pytest.mark.parametrize("other", [{"job": "j2"}, {"round": 4}, {"attempt": 0}])
def test_an_update_of_another_round_is_refused(path: Path, other: dict[str, object]) -> None:
    write(path, make_adapter())
    with pytest.raises(BadUpdate, match="offered as"):
        open_update(path, "lora", **(WHICH | other), max_bytes=10**6)


def test_an_unknown_kind_is_refused(path: Path) -> None:
    write(path, make_adapter())
    with pytest.raises(BadUpdate, match="no reader for updates of kind 'pickle'"):
        open_update(path, "pickle", **WHICH, max_bytes=10**6)


def test_more_bytes_than_planned_are_refused_unread(path: Path) -> None:
    size = write(path, make_adapter())
    with pytest.raises(BadUpdate, match="exceeds"):
        read(path, max_bytes=size - 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_neither_written_nor_accepted(path: Path, value: float) -> None:
    adapter = make_adapter()
    write(path, adapter)
    good = path.read_bytes()
    adapter["layers.0.v"].b[1, 1] = 12345.0
    write(path, adapter)
    marked = path.read_bytes()
    path.write_bytes(marked.replace(np.float32(12345).tobytes(), np.float32(value).tobytes()))
    with pytest.raises(BadUpdate, match=r"'layers.0.v' has values that are not finite"):
        read(path).check_values()
    path.write_bytes(good)
    adapter["layers.0.v"].b[1, 1] = value
    with pytest.raises(BadUpdate, match=r"'layers.0.v' has values that are not finite"):
        write(path, adapter)
    assert path.read_bytes() == good
    assert [file.name for file in path.parent.iterdir()] == ["update"]


LARGE = {"m": Factors(np.ones((3, 50_000), np.float32), np.ones((20_000, 3), np.float32))}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_large_matrix_in_parts_is_the_matrix(path: Path, dtype: UpdateDtype) -> None:
    rng = np.random.default_rng(1)
    one = Factors(rng.random((3, 50_000), np.float32), rng.random((20_000, 3), np.float32))
    write(path, {"a": one, "m": one}, dtype)
    update = read(path, 10**7)
    parts = [update.stack(["m"], rows) for rows in bands(3, (20_000, 50_000))]
    assert len(parts) > 1
    assert np.array_equal(np.hstack([part.a[0].reshape(-1) for part in parts]), update.factors("m").a.reshape(-1))
    assert np.array_equal(np.vstack([part.b[0] for part in parts]), update.factors("m").b)
    assert update.stack(["m"], (slice(2, 9), slice(0, 0))).a.shape == (1, 1, 50_000)


@pytest.mark.parametrize(("place", "what"), [(0, "not finite"), (-4, "not finite"), (-240_001, "damaged")])
def test_what_is_wrong_in_any_part_of_a_large_matrix_is_noticed(path: Path, place: int, what: str) -> None:
    write(path, LARGE)
    data = bytearray(path.read_bytes())
    at = place % len(data) if place else len(data) - 240_000 - 5 - 600_000
    data[at : at + 4 if what == "not finite" else at + 1] = (
        np.float32(np.nan).tobytes() if what == "not finite" else b"x"
    )
    path.write_bytes(data)
    with pytest.raises(BadUpdate, match=f"'m' .*{what}"):
        read(path, 10**7).check_values()


def test_too_large_for_fp16_is_said_by_the_writer(path: Path) -> None:
    adapter = make_adapter()
    adapter["layers.0.q"].a[0, 0] = 70000
    with pytest.raises(BadUpdate, match=r"'layers.0.q'"):
        write(path, adapter, "fp16")
    write(path, adapter, "bf16")


def test_every_truncation_is_noticed(path: Path) -> None:
    write(path, make_adapter())
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(BadUpdate):
            read(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_a_bad_update_or_changes_values_only(path: Path, data: st.DataObject) -> None:
    write(path, make_adapter())
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        update = open_update(path, "lora", **WHICH, max_bytes=10**6)
        update.check(RANKS, SHAPES)
        update.check_values()
    except BadUpdate:
        return
    assert {name: update.factors(name).shape for name in update.ranks} == SHAPES


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_bad_update(path: Path, junk: bytes) -> None:
    path.write_bytes(junk)
    with pytest.raises(BadUpdate):
        read(path)


def header(**changes: object) -> bytes:
    good = {"v": 1, "kind": "lora", **WHICH, "dtype": "fp32", "matrices": [["m", 1, 2, 3]]}
    packed: bytes = msgpack.packb(good | changes)
    return packed + b"\x92\xc6\0\0\0\x0c" + bytes(12) + b"\xc6\0\0\0\x08" + bytes(8)


def test_the_handmade_header_is_good(path: Path) -> None:
    path.write_bytes(header())
    read(path).check_values()


@pytest.mark.parametrize("claim", [b"\xdc\x4e\x20", b"\xdd\x00\x00\x4e\x20", b"\x91", b"\xde\x00\x40\xa1a"])
def test_a_header_that_claims_lists_in_lists_takes_no_memory(path: Path, claim: bytes) -> None:
    path.write_bytes(b"\x82\xa1v\x01\xa1k" + claim * 1000)
    tracemalloc.start()
    try:
        with pytest.raises(BadUpdate):
            read(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"kind": "model"},
        {"dtype": "fp64"},
        {"round": -1},
        {"matrices": [["m", 1, 2]]},
        {"matrices": [["m", 1, 2, 3, 4]]},
        {"matrices": [["m", 1, 2, 0]]},
        {"matrices": [["m", 2000, 2, 3]]},
        {"matrices": [["m", 1, 2**30, 3]]},
        {"matrices": [["m", 1024, 2**24, 2**24]]},
        {"matrices": [["m", 1, 2, 3], ["m", 1, 2, 3]]},
        {"matrices": [["n", 1, 2, 3], ["m", 1, 2, 3]]},
        {"matrices": [["x" * 300, 1, 2, 3]]},
        {"matrices": [["m", True, 2, 3]]},
        {"job": "x" * 5000},
    ],
)
def test_a_header_that_lies_is_refused(path: Path, changes: dict[str, object]) -> None:
    path.write_bytes(header(**changes))
    with pytest.raises(BadUpdate):
        read(path)


def test_matrices_out_of_order_or_twice_are_refused(path: Path) -> None:
    record = header().partition(b"\x92\xc6")
    for names in ("nm", "mm"):
        lying = header(matrices=[[name, 1, 2, 3] for name in names])
        path.write_bytes(lying + b"".join(record[1:]))
        with pytest.raises(BadUpdate, match="not sorted"):
            read(path)


def test_damaged_framing_is_noticed(path: Path) -> None:
    good = header()
    start = good.index(b"\x92\xc6")
    for place in [*range(6), *range(18, 23)]:
        damaged = bytearray(good)
        damaged[start + place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(BadUpdate, match="record of matrix 'm' is damaged"):
            read(path).check_values()


def test_a_header_that_claims_gigabytes_allocates_nothing(path: Path) -> None:
    path.write_bytes(b"\x82\xa1v\x01\xa8matrices\xdd\xff\xff\xff\xff" + bytes(100))
    with pytest.raises(BadUpdate, match="limits"):
        read(path)
    path.write_bytes(b"\x82\xa1v\x01\xa8matrices\xdc\x4e\x20" + b"\x94\xd9\xc8" * 40)
    with pytest.raises(BadUpdate):
        read(path)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(path: Path) -> None:
    size = write(path, make_adapter())
    update = read(path)
    path.write_bytes(path.read_bytes()[: size - 3])
    with pytest.raises(BadUpdate, match=r"record of matrix 'layers.1.up' is damaged"):
        update.check_values()
