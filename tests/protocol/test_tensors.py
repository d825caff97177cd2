"""Arrays survive the wire, exactly where the type can hold them and to half a unit in the last place where not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol import tensors
from protocol.errors import BadUpdate
from protocol.messages import Wire
from protocol.tensors import F32

float_bits = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def floats(bits: list[int]) -> F32:
    return np.array(bits, np.uint32).view(np.float32)


@given(float_bits)
def test_fp32_keeps_every_bit(bits: list[int]) -> None:
    array = floats(bits)
    back = tensors.decode(tensors.encode(array, "fp32"), array.shape, "fp32")
    assert back.view(np.uint32).tolist() == bits


@given(float_bits)
def test_bf16_rounds_to_the_nearest_even_like_torch(bits: list[int]) -> None:
    array = floats(bits)
    ours = tensors.decode(tensors.encode(array, "bf16"), array.shape, "bf16")
    theirs = torch.from_numpy(array.copy()).to(torch.bfloat16).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@given(float_bits, st.sampled_from(["fp32", "fp16", "bf16"]))
def test_nan_stays_nan_and_what_was_sent_once_is_kept_exactly(bits: list[int], dtype: Wire) -> None:
    array = floats(bits)
    once = tensors.decode(tensors.encode(array, dtype), array.shape, dtype)
    assert np.array_equal(np.isnan(once), np.isnan(array))
    twice = tensors.decode(tensors.encode(once, dtype), array.shape, dtype)
    assert np.array_equal(once, twice, equal_nan=True)


def test_the_layout_is_little_endian_and_row_major() -> None:
    array = np.array([[1, 2], [3, 4]], np.float32)
    assert tensors.encode(array, "fp16").hex() == "003c004000420044"
    assert tensors.encode(array, "bf16").hex() == "803f004040408040"
    assert tensors.encode(array, "fp32").hex() == "0000803f000000400000404000008040"
    assert tensors.encode(array.T, "bf16").hex() == "803f404000408040"
    assert tensors.encode(array.astype(">f4").astype(np.float32), "fp32") == tensors.encode(array, "fp32")


def test_too_large_for_fp16_is_an_infinity_and_no_warning() -> None:
    with np.errstate(all="raise"):
        back = tensors.decode(tensors.encode(np.array([1e5, 1e-9], np.float32), "fp16"), (2,), "fp16")
    assert back.tolist() == [np.inf, 0.0]


def test_decoded_arrays_can_be_written_to() -> None:
    data = tensors.encode(np.zeros(3, np.float32), "fp32")
    back = tensors.decode(data, (3,), "fp32")
    back += 1
    assert data == bytes(12)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("difference", [-1, 1])
def test_another_length_is_refused(dtype: Wire, difference: int) -> None:
    data = bytes(6 * tensors.ITEM_BYTES[dtype] + difference)
    with pytest.raises(BadUpdate, match="cannot be"):
        tensors.decode(data, (2, 3), dtype)


@pytest.mark.parametrize("shape", [(-1, 4), (2**25, 1), (2**20, 2**20), (-1, -1)])
def test_a_shape_out_of_bounds_is_refused_before_anything_is_allocated(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadUpdate, match="out of bounds"):
        tensors.decode(b"", shape, "fp32")
