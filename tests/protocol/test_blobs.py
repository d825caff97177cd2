"""The store in which every name is a digest."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.blobs import Blobs, digest_file, digest_prefixes
from protocol.errors import BadMessage, Unavailable

DATA = bytes(range(256)) * 5000
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def leftovers(blobs: Blobs) -> list[Path]:
    return list(blobs.partial.iterdir())


def test_bytes_and_files_come_back_under_their_digest(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    assert not blobs.has(SHA)
    assert blobs.put_file(source) == blobs.put_bytes(DATA) == SHA
    assert blobs.has(SHA)
    assert blobs.path(SHA).read_bytes() == source.read_bytes() == DATA
    other = blobs.put_bytes(b"x")
    assert set(blobs) == {SHA, other}
    assert blobs.total_bytes() == len(DATA) + 1
    assert leftovers(blobs) == []
    blobs.delete(SHA)
    blobs.delete(SHA)
    assert list(blobs) == [other]


def test_a_file_moves_in_without_a_copy(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    inode = source.stat().st_ino
    blobs.adopt(source, SHA)
    assert blobs.path(SHA).stat().st_ino == inode
    assert not source.exists()


def test_two_stores_on_one_folder_see_the_same(blobs: Blobs) -> None:
    blobs.put_bytes(DATA)
    assert Blobs(blobs.folder).path(SHA).read_bytes() == DATA


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 64 + "/.."])
def test_only_digests_are_names(blobs: Blobs, name: str) -> None:
    for use in (blobs.path, blobs.has, blobs.delete):
        with pytest.raises(BadMessage):
            use(name)


def test_a_refusing_disk_leaves_nothing_behind(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        blobs.put_file(tmp_path / "missing")
    assert leftovers(blobs) == []
    assert list(blobs) == []


def test_old_unfinished_files_are_swept(blobs: Blobs) -> None:
    old, new = blobs.partial / "old", blobs.partial / "new"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    blobs.put_bytes(DATA)
    os.utime(old, (time.time() - 1000,) * 2)
    os.utime(blobs.path(SHA), (0, 0))
    assert blobs.sweep(500) == 1
    assert leftovers(blobs) == [new]
    assert blobs.has(SHA)


def test_digest_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    assert digest_file(path) == (SHA, len(DATA))


@given(st.lists(st.integers(0, len(DATA)), max_size=6))
def test_digests_of_prefixes_in_any_order(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "prefixes"
    path.write_bytes(DATA)
    assert digest_prefixes(path, sizes) == [hashlib.sha256(DATA[:size]).hexdigest() for size in sizes]


def test_a_prefix_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with pytest.raises(ValueError, match="1 bytes before"):
        digest_prefixes(path, [5, len(DATA) + 1])
