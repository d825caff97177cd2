"""Chunk frames: what is cut and framed comes back, and any damage is noticed."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol.errors import BadMessage
from protocol.frames import (
    MAX_DATA_BYTES,
    OVERHEAD_BYTES,
    carried_checksum,
    checksum,
    chunk_for,
    chunk_length,
    decode_frame,
    encode_frame,
    n_prefix_chunks,
)
from protocol.messages import Blob


@given(st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=2000))
@example(2**32 - 1, bytes(MAX_DATA_BYTES))
def test_a_frame_comes_back_without_a_copy(index: int, data: bytes) -> None:
    frame = encode_frame(index, data)
    assert len(frame) == len(data) + OVERHEAD_BYTES
    found, view = decode_frame(frame)
    assert (found, bytes(view)) == (index, data)
    assert view.obj is frame
    assert carried_checksum(frame) == checksum(index, data)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_bad_message(payload: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_frame(payload)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_any_changed_byte_is_noticed(data: bytes, choice: st.DataObject) -> None:
    frame = bytearray(encode_frame(77, data))
    place = choice.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= choice.draw(st.integers(1, 255))
    with pytest.raises(BadMessage):
        decode_frame(bytes(frame))


@given(st.binary(min_size=1, max_size=40), st.binary(min_size=1, max_size=5))
def test_every_truncation_and_extension_is_noticed(data: bytes, more: bytes) -> None:
    frame = encode_frame(1, data)
    for length in range(len(frame)):
        with pytest.raises(BadMessage):
            decode_frame(frame[:length])
    with pytest.raises(BadMessage):
        decode_frame(frame + more)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"fq" + encode_frame(1, b"x")[2:], "not a chunk frame"),
        (b"fp\x02" + encode_frame(1, b"x")[3:], "version 2"),
        (encode_frame(1, b"xy")[:-1] + b"\x00", "checksum"),
        (bytes(MAX_DATA_BYTES + OVERHEAD_BYTES + 1), "4 MiB"),
        (b"", "0 bytes"),
    ],
)
def test_the_error_says_what_is_wrong(frame: bytes, why: str) -> None:
    with pytest.raises(BadMessage, match=why):
        decode_frame(frame)


@given(st.integers(1, 10**6), st.integers(1024, 10**5), st.data())
def test_chunks_cover_the_blob_exactly(size: int, chunk: int, data: st.DataObject) -> None:
    blob = Blob(sha256="0" * 64, size=size, chunk=chunk)
    assert sum(chunk_length(blob, index) for index in range(blob.n_chunks)) == size
    assert all(0 < chunk_length(blob, index) <= chunk for index in range(blob.n_chunks))
    assert chunk_length(blob, blob.n_chunks) <= 0
    prefix = data.draw(st.integers(1, size))
    assert (n_prefix_chunks(blob, prefix) - 1) * chunk < prefix <= n_prefix_chunks(blob, prefix) * chunk
    assert n_prefix_chunks(blob) == n_prefix_chunks(blob, size) == blob.n_chunks


@pytest.mark.parametrize("size", [0, -1, 5001])
def test_no_such_prefix(size: int) -> None:
    with pytest.raises(BadMessage):
        n_prefix_chunks(Blob(sha256="0" * 64, size=5000, chunk=1024), size)


def test_a_blob_of_too_many_chunks_is_refused() -> None:
    with pytest.raises(BadMessage):
        n_prefix_chunks(Blob(sha256="0" * 64, size=2**40, chunk=1024))


@pytest.mark.parametrize(
    ("bytes_per_s", "most", "chunk"),
    [
        (0.0, 250_000, 250_000),
        (1e-9, 250_000, 16_384),
        (250_000.0, 250_000, 16_384),
        (1_310_720.0, 250_000, 131_072),
        (1_310_700.0, 250_000, 65_536),
        (1e12, 250_000, 250_000),
        (1e3, 1024, 1024),
    ],
)
def test_a_blob_is_cut_as_its_link_can_carry_it(bytes_per_s: float, most: int, chunk: int) -> None:
    assert chunk_for(bytes_per_s, most) == chunk
