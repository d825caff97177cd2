"""Components in int8 and NF4: as small as they claim to be, as near as they claim to be, and nothing foreign gets through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol import quantized
from protocol.errors import BadUpdate
from protocol.quantized import LEVELS
from protocol.tensors import F32
from protocol.widths import Quantized

KINDS: list[Quantized] = ["int8", "nf4"]
shapes = st.tuples(st.integers(0, 5), st.integers(0, 200))
rows = shapes.flatmap(
    lambda shape: arrays.arrays(
        np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
    )
)


def there_and_back(array: F32, kind: Quantized) -> F32:
    return quantized.decode(quantized.encode(array, kind), (array.shape[0], array.shape[1]), kind)


@pytest.mark.parametrize("kind", KINDS)
@given(rows)
def test_what_comes_back_is_near_within_half_a_step_of_its_component(kind: Quantized, array: F32) -> None:
    largest = np.abs(array).max(axis=1, keepdims=True, initial=0.0)
    half_step = {"int8": 0.5 / 127, "nf4": float(np.diff(LEVELS).max()) / 2 + 1 / 255}[kind]
    back = there_and_back(array, kind)
    assert back.dtype == np.float32
    assert (np.abs(back - array) <= half_step * largest * (1 + 2**-7) * 1.0001).all(), "a bf16 scale is rounded up"


@pytest.mark.parametrize("kind", KINDS)
@given(shapes)
def test_its_length_is_what_the_shape_says(kind: Quantized, shape: tuple[int, int]) -> None:
    assert len(quantized.encode(np.ones(shape, np.float32), kind)) == quantized.size_bytes(shape, kind)


def test_bits_per_value() -> None:
    shape = (16, 4096)
    assert quantized.size_bytes(shape, "int8") * 8 / (16 * 4096) == pytest.approx(8, rel=1e-3)
    assert quantized.size_bytes(shape, "nf4") * 8 / (16 * 4096) == pytest.approx(4.125, rel=2e-3)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.0095), ("nf4", 0.095)])
def test_the_error_of_normal_values(kind: Quantized, error: float) -> None:
    drawn = np.random.default_rng(0).standard_normal((8, 4096), dtype=np.float32)
    drawn *= np.geomspace(1e-6, 1e3, 8, dtype=np.float32)[:, None]
    apart = np.linalg.norm(there_and_back(drawn, kind) - drawn, axis=1) / np.linalg.norm(drawn, axis=1)
    assert (apart < error).all()


def test_the_layout() -> None:
    row = np.array([[127.0, -1.0, 0.0]], np.float32)
    assert quantized.encode(row, "int8").hex() == "803f" + "7fff00"
    row = np.array([[2.0, -2.0, 0.0]], np.float32)
    scale, share, codes = "0040", "ff", "0f" + "77"
    assert quantized.encode(row, "nf4").hex() == scale + share + codes


def test_levels_are_those_that_bitsandbytes_trains_with() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("nf4", device="cpu").numpy()
    assert np.allclose(LEVELS, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(kind: Quantized, value: float) -> None:
    array = np.ones((2, 70), np.float32)
    array[1, 3] = value
    back = there_and_back(array, kind)
    assert np.isfinite(back[0]).all()
    assert not np.isfinite(back[1]).all()


@pytest.mark.parametrize("kind", KINDS)
@given(st.binary(max_size=300), shapes)
def test_foreign_bytes_are_decoded_or_refused(kind: Quantized, data: bytes, shape: tuple[int, int]) -> None:
    if len(data) == quantized.size_bytes(shape, kind):
        assert quantized.decode(data, shape, kind).shape == shape
    else:
        with pytest.raises(BadUpdate, match="cannot be"):
            quantized.decode(data, shape, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(-1, 4), (2**25, 1), (2**20, 2**20), (4, -1)])
def test_a_shape_out_of_bounds_is_refused_before_anything_is_allocated(kind: Quantized, shape: tuple[int, int]) -> None:
    with pytest.raises(BadUpdate, match="out of bounds"):
        quantized.decode(b"", shape, kind)
