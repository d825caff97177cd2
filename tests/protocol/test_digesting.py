"""Digests beside the loop: right, whoever else lets go of the file, and no fault in one ends those of others."""

from __future__ import annotations

import gc
import hashlib
import logging
import threading
from pathlib import Path

import pytest

from protocol import digesting
from protocol.blobs import Blobs
from protocol.digesting import WRITE_BYTES, Digesting
from protocol.messages import Blob
from protocol.spool import Spool

PIECES = [bytes([n]) * (WRITE_BYTES // 2 + n) for n in range(9)]


def opened(path: Path, data: bytes) -> Digesting:
    path.write_bytes(data)
    return Digesting(path.open("rb", buffering=0))


def digest_of_all(path: Path) -> str:
    found = opened(path, b"".join(PIECES))
    for piece in PIECES:
        found.add(piece)
    return found.settled().hexdigest()


def test_it_is_the_digest_of_all_pieces_in_order(tmp_path: Path) -> None:
    assert digest_of_all(tmp_path / "file") == hashlib.sha256(b"".join(PIECES)).hexdigest()
    assert opened(tmp_path / "none", b"").settled().hexdigest() == hashlib.sha256().hexdigest()


def test_a_transfer_that_is_given_up_while_its_piece_waits_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    digest_of_all(tmp_path / "first")  # the thread runs
    digesting._waiting.put((lambda _: go_on.wait(), b""))
    data = bytes(2 * WRITE_BYTES)
    blob = Blob(sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk=2 * WRITE_BYTES)
    partial = Spool(Blobs(tmp_path)).open(blob)
    partial.write(0, data)
    partial.close()
    del partial
    gc.collect()
    go_on.set()
    assert digest_of_all(tmp_path / "next") == hashlib.sha256(b"".join(PIECES)).hexdigest()
    assert not caplog.records


def test_a_fault_in_one_digest_is_said_and_ends_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest_of_all(tmp_path / "first")

    def broken(_: bytes | memoryview) -> None:
        raise ValueError("broken")

    with caplog.at_level(logging.ERROR):
        digesting._waiting.put((broken, b""))
        assert digest_of_all(tmp_path / "next") == hashlib.sha256(b"".join(PIECES)).hexdigest()
    assert ["a piece was not hashed" in record.message for record in caplog.records] == [True]
