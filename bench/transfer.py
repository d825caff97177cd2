"""How fast the transfer machinery is without a bus: python bench/transfer.py.  One core, virtual network, real disk."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import time
from collections import deque
from pathlib import Path

from protocol.blobs import Blobs
from protocol.frames import chunk_length, decode_frame, encode_frame
from protocol.messages import Blob
from protocol.sending import Sending
from protocol.spool import Spool
from protocol.transfer import Receiving, SendGrant

CHUNK = 256 * 1024


def pool(n_peers: int, n_chunks: int) -> str:
    """Chunks per second through Receiving.chunk and, apart from it, through Sending."""
    receiving, sending = Receiving(), Sending()
    grants: deque[SendGrant] = deque()
    for number in range(n_peers):
        blob = Blob(sha256=f"{number:064x}"[::-1], size=n_chunks * CHUNK, chunk=CHUNK)
        sending.add(blob)
        grants.extend(a for a in receiving.open(f"agent-{number}", blob, 0.0) if isinstance(a, SendGrant))
    in_chunk_s = in_sending_s = now = 0.0
    while grants:
        start = time.perf_counter()
        action = grants.popleft()
        sending.granted(action.peer, action.grant)
        chunks = []
        while (chunk := sending.next_chunk()) is not None:
            chunks.append(chunk)
        middle = time.perf_counter()
        for chunk in chunks:
            now += 1e-4
            actions = receiving.chunk(chunk.peer, chunk.xfer, chunk.index, chunk.length, now)
            if actions:
                grants.extend(a for a in actions if isinstance(a, SendGrant))
        in_chunk_s += time.perf_counter() - middle
        in_sending_s += middle - start
    assert len(receiving) == 0
    counts = receiving.counts
    return (
        f"{n_peers:5} peers x {n_chunks:5} chunks: chunk() {counts.n_chunks / in_chunk_s:9,.0f}/s, "
        f"sending {counts.n_chunks / in_sending_s:9,.0f}/s, {counts.n_chunks / counts.n_grants:.1f} chunks per grant"
    )


def disk(n_chunks: int) -> str:
    """MB per second from frame to verified file."""
    data = os.urandom(n_chunks * CHUNK)
    blob = Blob(sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk=CHUNK)
    pieces = [data[i * CHUNK : i * CHUNK + chunk_length(blob, i)] for i in range(n_chunks)]
    clock = [time.perf_counter()]
    frames = [encode_frame(index, piece) for index, piece in enumerate(pieces)]
    clock.append(time.perf_counter())
    decoded = [decode_frame(frame) for frame in frames]
    clock.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Blobs(Path(folder)))
        partial = spool.open(blob)
        for index, view in decoded:
            partial.write(index, view)
        clock.append(time.perf_counter())
        partial = spool.open(blob)
        clock.append(time.perf_counter())
        partial.finish()
        clock.append(time.perf_counter())
    names = ["encode", "decode", "write", "resume", "finish"]
    rates = [len(data) / 1e6 / (after - before) for before, after in itertools.pairwise(clock)]
    return "MB/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in zip(names, rates, strict=True))


if __name__ == "__main__":
    for n_peers, n_chunks in [(1, 40_000), (10, 4_000), (1000, 80)]:
        print(pool(n_peers, n_chunks))
    print(disk(1000))
