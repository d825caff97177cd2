"""Partial files: resumed after anything, verified before use, honest when the disk is full."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import digesting
from protocol import spool as spool_module
from protocol.blobs import Blobs, extend_digest
from protocol.errors import BadMessage, IllegalMove, Unavailable
from protocol.frames import carried_checksum, decode_frame, encode_frame
from protocol.messages import Blob
from protocol.spool import MAX_OPEN, Partial, Spool
from tests.full_disk import largest_file

CHUNK = 1024
DATA = Random(7).randbytes(10 * CHUNK + 77)
BLOB = Blob(sha256=hashlib.sha256(DATA).hexdigest(), size=len(DATA), chunk=CHUNK)


def piece(index: int) -> bytes:
    return DATA[index * CHUNK : (index + 1) * CHUNK]


def put(partial: Partial, *indices: int) -> list[bool]:
    return [partial.write(index, piece(index)) for index in indices]


def here(partial: Partial) -> list[int]:
    return [index for index in range(len(partial.have)) if index in partial.have]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(Blobs(tmp_path / "blobs"))


def files(spool: Spool) -> list[Path]:
    return list(spool.blobs.partial.iterdir())


def test_chunks_in_any_order_make_the_file(spool: Spool) -> None:
    partial = spool.open(BLOB)
    order = list(range(11))
    Random(1).shuffle(order)
    assert all(put(partial, *order))
    assert put(partial, 3) == [False], "a duplicate writes nothing"
    path = partial.finish()
    assert path == spool.blobs.path(BLOB.sha256)
    assert path.read_bytes() == DATA
    assert files(spool) == []


def test_a_restart_resumes_with_every_chunk_that_was_written(spool: Spool) -> None:
    put(spool.open(BLOB), 0, 4, 10)
    again = Spool(Blobs(spool.blobs.folder)).open(BLOB)
    assert here(again) == [0, 4, 10]
    put(again, 1, 2)
    third = spool.open(BLOB)
    assert here(third) == [0, 1, 2, 4, 10]
    put(third, 3, 5, 6, 7, 8, 9)
    assert third.finish().read_bytes() == DATA


def test_killed_between_any_two_chunks_nothing_is_lost(spool: Spool) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from protocol import digesting
from protocol import spool as spool_module
from protocol.blobs import Blobs, extend_digest
from protocol.messages import Blob
from protocol.spool import Spool
blob = Blob(sha256={BLOB.sha256!r}, size={BLOB.size}, chunk={CHUNK})
partial = Spool(Blobs(Path({str(spool.blobs.folder)!r}))).open(blob)
for index in (2, 9, 5):
    data = sys.stdin.buffer.read({CHUNK})
    partial.write(index, data)
os.kill(os.getpid(), signal.SIGKILL)
"""
    found = subprocess.run([sys.executable, "-c", script], input=piece(2) + piece(9) + piece(5), check=False)
    assert found.returncode == -signal.SIGKILL
    assert here(spool.open(BLOB)) == [2, 5, 9]


@settings(max_examples=80)
@given(st.data())
def test_whatever_the_crash_left_only_true_chunks_are_resumed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    spool = Spool(Blobs(tmp_path_factory.mktemp("spool")))
    put(spool.open(BLOB), *data.draw(st.lists(st.integers(0, 10), unique=True)))
    for path in files(spool):
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            if content:
                start = data.draw(st.integers(0, len(content) - 1))
                n = data.draw(st.integers(1, 2 * CHUNK))
                content[start : start + n] = bytes(len(content[start : start + n]))  # pages that never reached the disk
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            path.unlink()
    partial = spool.open(BLOB)
    put(partial, *data.draw(st.lists(st.integers(0, 10))))
    partial = spool.open(BLOB)
    put(partial, *range(11))
    assert partial.finish().read_bytes() == DATA


def test_a_prefix_is_cut_to_its_size_and_verified_by_its_own_digest(spool: Spool) -> None:
    size = 2 * CHUNK + 100
    partial = spool.open(BLOB, size=size)
    assert len(partial.have) == 3
    assert put(partial, 5, 2, 0, 1) == [False, True, True, True]
    path = partial.finish(hashlib.sha256(DATA[:size]).hexdigest())
    assert path.read_bytes() == DATA[:size]


def test_a_larger_prefix_takes_over_the_whole_chunks_of_a_smaller(spool: Spool) -> None:
    put(spool.open(BLOB, size=2 * CHUNK + 100), 0, 1, 2)
    assert here(spool.open(BLOB, size=4 * CHUNK)) == [0, 1]
    put(spool.open(BLOB, size=4 * CHUNK), 2, 3)
    small = spool.open(BLOB, size=3 * CHUNK)
    assert here(small) == [0, 1, 2]
    assert small.finish(hashlib.sha256(DATA[: 3 * CHUNK]).hexdigest()).stat().st_size == 3 * CHUNK


def test_wrong_bytes_are_found_out_deleted_and_can_be_asked_for_again(spool: Spool) -> None:
    partial = spool.open(BLOB)
    put(partial, *range(10))
    partial.write(10, bytes(77))
    with pytest.raises(BadMessage, match="ask again"):
        partial.finish()
    assert files(spool) == []
    assert list(spool.blobs) == []
    again = spool.open(BLOB)
    assert here(again) == []
    put(again, *range(11))
    assert again.finish().read_bytes() == DATA


def test_one_owner_cannot_spoil_anothers_transfer(spool: Spool) -> None:
    honest, hostile = spool.open(BLOB, owner="agent-1"), spool.open(BLOB, owner="agent-2")
    for index in range(11):
        hostile.write(index, bytes(len(piece(index))))
        put(honest, index)
    with pytest.raises(BadMessage):
        hostile.finish()
    assert honest.finish().read_bytes() == DATA


@pytest.mark.parametrize(
    ("index", "length"), [(0, CHUNK - 1), (0, CHUNK + 1), (0, 0), (10, 78), (10, CHUNK), (11, 1), (11, 0), (-1, CHUNK)]
)
def test_a_chunk_of_another_shape_is_refused(spool: Spool, index: int, length: int) -> None:
    partial = spool.open(BLOB)
    with pytest.raises(BadMessage):
        partial.write(index, bytes(length))
    assert here(partial) == []


def test_another_geometry_starts_afresh(spool: Spool) -> None:
    put(spool.open(BLOB), *range(11))
    finer = Blob(sha256=BLOB.sha256, size=BLOB.size, chunk=2 * CHUNK)
    assert here(spool.open(finer)) == []


def test_finishing_early_is_our_own_fault(spool: Spool) -> None:
    with pytest.raises(IllegalMove, match="11 chunks missing"):
        spool.open(BLOB).finish()


def test_what_is_given_up_leaves_nothing(spool: Spool) -> None:
    partial = spool.open(BLOB)
    put(partial, 1)
    partial.discard()
    partial.discard()
    assert files(spool) == []


@pytest.mark.parametrize("sha256", ["../" * 20 + "x" * 4, "A" * 64, "a" * 31])
def test_a_name_that_is_no_digest_never_reaches_the_disk(spool: Spool, sha256: str) -> None:
    with pytest.raises(BadMessage):
        spool.open(Blob(sha256=sha256, size=1))
    with pytest.raises(BadMessage):
        spool.open(BLOB, owner="../x")
    assert files(spool) == []


def test_too_big_a_blob_is_refused_before_anything_is_written(spool: Spool) -> None:
    small = Spool(spool.blobs, max_bytes=1000)
    with pytest.raises(BadMessage, match="at most 1000"):
        small.open(BLOB)
    small.open(BLOB, size=1000)


def test_a_blob_for_which_there_is_no_room_is_refused_before_it_comes(spool: Spool) -> None:
    free_bytes = shutil.disk_usage(spool.blobs.folder).free
    with pytest.raises(Unavailable, match="make room"):
        Spool(spool.blobs, max_bytes=2**60).open(Blob(sha256="a" * 64, size=free_bytes + 2**30, chunk=2**30))


def test_a_full_disk_is_said_clearly_and_corrupts_nothing(spool: Spool) -> None:
    partial = spool.open(BLOB)
    put(partial, 0, 1)
    with largest_file(files(spool)[0].stat().st_size + 8):  # room for the record of one chunk
        assert put(partial, 2) == [True]
        with pytest.raises(Unavailable, match="make room"):
            put(partial, 3)
        with pytest.raises(Unavailable):
            put(partial, 10)
    assert here(partial) == here(spool.open(BLOB)) == [0, 1, 2]
    put(partial, *range(3, 11))
    assert partial.finish().read_bytes() == DATA


def test_a_log_that_could_not_grow_is_continued_in_the_right_place(spool: Spool) -> None:
    crumbs = Blob(sha256=hashlib.sha256(b"abcdefgh").hexdigest(), size=8, chunk=1)  # its log outgrows its data
    partial = spool.open(crumbs)
    partial.write(0, b"a")
    with largest_file(files(spool)[0].stat().st_size + 3):
        with pytest.raises(Unavailable):
            partial.write(1, b"b")
        assert here(partial) == here(spool.open(crumbs)) == [0]
    for index in (4, 5, 1):
        partial.write(index, b"abcdefgh"[index : index + 1])
    assert here(spool.open(crumbs)) == [0, 1, 4, 5]


@pytest.mark.parametrize("begun_anew", [True, False])
def test_what_is_given_up_while_it_is_verified_does_not_become_another_file(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, *, begun_anew: bool
) -> None:
    """A file is hashed in a thread; meanwhile its transfer may be stopped, and wanted again."""
    first, later = spool.open(BLOB), []
    put(first, *range(11))

    def slowly(*given: Any) -> int:
        found = extend_digest(*given)
        first.discard()
        if begun_anew:
            later.append(spool.open(BLOB))
        return found

    with monkeypatch.context() as hashing:
        hashing.setattr(spool_module, "extend_digest", slowly)
        with pytest.raises(Unavailable):
            first.finish()
    assert not spool.blobs.has(BLOB.sha256), "an empty file with the digest of a whole one"
    for partial in later:
        assert here(partial) == []
        put(partial, *range(11))
        assert partial.finish().read_bytes() == DATA


def test_a_larger_prefix_that_is_begun_while_the_smaller_is_verified_does_not_grow_it(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 * CHUNK
    small, later = spool.open(BLOB, size=size), []
    put(small, 0, 1, 2)

    def slowly(*given: Any) -> int:
        found = extend_digest(*given)
        later.append(spool.open(BLOB))
        put(later[0], 3, 4)
        return found

    wanted = hashlib.sha256(DATA[:size]).hexdigest()
    with monkeypatch.context() as hashing:
        hashing.setattr(spool_module, "extend_digest", slowly)
        with pytest.raises(Unavailable, match="begun anew"):
            small.finish(wanted)
    assert not spool.blobs.has(wanted)
    put(later[0], *range(11))
    assert later[0].finish().read_bytes() == DATA


# -------------------------------------------------------------------------------------------------- descriptors and digests


def n_open(spool: Spool) -> int:
    """Descriptors of this process on unfinished files."""
    paths = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself
            paths.append(link.readlink())
    return sum(path.is_relative_to(spool.blobs.folder) for path in paths)


def test_descriptors_are_bounded_and_let_go(spool: Spool) -> None:
    partials = [spool.open(BLOB, owner=f"a{n}") for n in range(MAX_OPEN + 5)]
    assert n_open(spool) == 0, "nothing is open before it is written"
    for index in range(11):
        for partial in partials:
            put(partial, index)
    assert n_open(spool) == MAX_OPEN
    assert [partial.finish().read_bytes() for partial in partials[:3]] == [DATA] * 3, "closed and opened in between"
    for partial in partials[3:20]:
        partial.discard()
    for partial in partials[20:40]:
        partial.close()
    del partial
    partials.clear()
    assert n_open(spool) == 0


def test_a_wrong_digest_or_a_disk_that_refuses_keeps_nothing_open(spool: Spool) -> None:
    partial = spool.open(BLOB)
    put(partial, *range(10))
    partial.write(10, bytes(77))
    with pytest.raises(BadMessage):
        partial.finish()
    gone = spool.open(BLOB)
    put(gone, *range(11))
    files(spool)[0].unlink()
    with pytest.raises(Unavailable):
        gone.finish()
    hashed = threading.Event()
    digesting._waiting.put((lambda _: hashed.set(), b""))  # a piece that still waits holds its file
    assert hashed.wait(60)
    assert n_open(spool) == 0


@pytest.mark.parametrize(
    ("order", "n_read"),
    [(range(11), 0), ([0, 1, 2, 3, 5, 4, 6, 7, 8, 9, 10], 6), (range(10, -1, -1), 10)],
)
def test_only_what_came_out_of_order_is_read_again(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, order: list[int], n_read: int
) -> None:
    partial, read_from = spool.open(BLOB), []

    def watched(state: Any, file: BinaryIO, n_bytes: int) -> int:
        read_from.append(file.tell())
        return extend_digest(state, file, n_bytes)

    put(partial, *order)
    monkeypatch.setattr(spool_module, "extend_digest", watched)
    assert partial.finish().read_bytes() == DATA
    assert read_from == [len(DATA) if n_read == 0 else (11 - n_read) * CHUNK]


def test_a_digest_does_not_speak_for_what_was_cut_off_since(spool: Spool) -> None:
    partial = spool.open(BLOB)
    put(partial, *range(11))
    os.truncate(files(spool)[0], 3 * CHUNK)
    with pytest.raises(BadMessage, match="ask again"):
        partial.finish()
    assert list(spool.blobs) == []


def test_a_file_that_was_swept_takes_no_more_chunks(spool: Spool) -> None:
    partial = spool.open(BLOB)
    put(partial, 0, 1)
    spool.blobs.sweep(older_than_s=-1)
    with pytest.raises(Unavailable):
        put(partial, 2)


def test_the_checksum_of_a_frame_is_the_one_that_a_resume_trusts(spool: Spool) -> None:
    partial = spool.open(BLOB)
    for index in (0, 3, 10):
        frame = encode_frame(index, piece(index))
        partial.write(*decode_frame(frame), carried_checksum(frame))
    partial.write(5, piece(5), 77)
    assert here(spool.open(BLOB)) == [0, 3, 10], "what does not fit its checksum is asked for again"


def test_killed_while_it_is_verified_nothing_is_lost(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> int:
        raise SystemExit

    partial = spool.open(BLOB)
    put(partial, *reversed(range(11)))
    with monkeypatch.context() as hashing:
        hashing.setattr(spool_module, "extend_digest", killed)
        with pytest.raises(SystemExit):
            partial.finish()
    again = Spool(Blobs(spool.blobs.folder)).open(BLOB)
    assert here(again) == list(range(11))
    assert again.finish().read_bytes() == DATA
