"""Targets: whatever bytes arrive as a message, a chunk frame, a bitmap or a tensor."""

from __future__ import annotations

import numpy as np

from protocol import codec, frames, tensors
from protocol.bitmap import Bitmap
from protocol.errors import BadMessage, BadUpdate
from protocol.messages import Blob, Envelope, Wire
from tests.fuzz import forged
from tests.fuzz.script import Script

DTYPES: list[Wire] = ["fp32", "fp16", "bf16"]


def codec_bytes(data: bytes) -> None:
    """Any bytes: what decodes says the same again."""
    try:
        envelope = codec.decode(data)
    except BadMessage:
        return
    _says_the_same(envelope)


def codec_forged(data: bytes) -> None:
    """Any body with some field that is wrong."""
    codec_bytes(forged.message(data))


def _says_the_same(envelope: Envelope) -> None:
    said = codec.encode(envelope.b, session=envelope.ses, seq=envelope.seq, now=envelope.ts)
    heard = codec.decode(said)
    again = codec.encode(heard.b, session=heard.ses, seq=heard.seq, now=heard.ts)
    assert again == said, f"{envelope.b} became {heard.b}"


def frame(data: bytes) -> None:
    """A chunk frame; then the same bytes as a chunk of a blob of any size."""
    try:
        index, piece = frames.decode_frame(data)
    except BadMessage:
        pass
    else:
        assert frames.encode_frame(index, bytes(piece)) == data
    script = Script(data)
    size, chunk = 1 + script.below(2**40), 1024 + script.below(2**22 - 1024)
    blob = Blob(sha256="0" * 64, size=size, chunk=chunk)
    index, prefix = script.below(2**32), script.below(2**41)
    length = frames.chunk_length(blob, index)
    assert (length > 0) == (index < blob.n_chunks)
    try:
        n = frames.n_prefix_chunks(blob, prefix)
    except BadMessage:
        assert not 1 <= prefix <= size or blob.n_chunks > frames.MAX_CHUNKS
    else:
        assert (n - 1) * chunk < prefix <= n * chunk
    assert length <= 0 or len(frames.encode_frame(index, script.take(min(length, 64)))) > frames.OVERHEAD_BYTES


def bitmap(data: bytes) -> None:
    """A packed bitmap of a claimed length; then a story of adding, taking and discarding against a plain set."""
    script = Script(data)
    n = script.below(4096)
    try:
        found = Bitmap.from_bytes(n, script.take(script.pick([-(-n // 8), -(-n // 8), script.below(600)])))
    except BadMessage:
        found = Bitmap(n)
    members = {i for i in range(n) if i in found}
    assert Bitmap.from_bytes(n, found.to_bytes()) == found
    while script.more and n:
        index = script.below(n)
        match script.below(4):
            case 0:
                assert found.add(index) == (index not in members)
                members.add(index)
            case 1:
                assert found.discard(index) == (index in members)
                members.discard(index)
            case 2:
                taken = [i for first, k in found.take(script.below(9), index) for i in range(first, first + k)]
                assert taken == sorted(i for i in members if i >= index)[: len(taken)]
                members.difference_update(taken)
            case _:
                gone = [i for first, k in found.missing(index) for i in range(first, first + k)]
                assert gone == [i for i in range(index, n) if i not in members]
    assert found.count == len(members)


def tensor(data: bytes) -> None:
    """Bytes as an array of a claimed shape and type: finite values come back as they were."""
    script = Script(data)
    dtype = script.pick(DTYPES)
    dims = [0, 1, 2, 3, 7, 2**24, 2**24 + 1, -1, 2**40]
    shape = tuple(script.pick(dims) for _ in range(script.below(4)))
    exact = int(np.prod(shape, dtype=object)) * tensors.ITEM_BYTES[dtype] if shape else tensors.ITEM_BYTES[dtype]
    raw = script.take(exact if 0 <= exact < 2**16 and script.below(4) else script.below(300))
    try:
        found = tensors.decode(raw, shape, dtype)
    except BadUpdate:
        assert len(raw) != exact or any(not 0 <= d <= tensors.MAX_DIMENSION for d in shape)
        return
    assert found.shape == shape
    if np.isfinite(found).all():
        assert tensors.encode(found, dtype) == raw
