"""A tar that came over a network writes nothing but the plain files of an adapter, and only where nothing else is."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coordinator.export import export_peft
from coordinator.lineage import Card
from fedpipe.unpacking import MAX_FILES, read_peft, unpack
from protocol.adapters import Factors
from protocol.errors import BadConfig

CARD = Card(job="j", method="qlora", base_source="b", base_sha256="", adapter_sha256="")
ADAPTER = {
    "model.q": Factors(a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.ones((4, 2), np.float32)),
    "model.lora_k.q": Factors(a=np.ones((1, 3), np.float32), b=np.ones((4, 1), np.float32)),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    export_peft(ADAPTER, tmp_path / "made", card=CARD)
    path = tmp_path / "good.tar"
    with tarfile.open(path, "w") as tar:
        for file in (tmp_path / "made").iterdir():
            tar.add(file, file.name)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def test_what_was_exported_is_what_is_read(good: Path, tmp_path: Path) -> None:
    unpack(good, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "made").iterdir())
    found = read_peft(tmp_path / "out")
    assert found.keys() == ADAPTER.keys()
    for name, factors in ADAPTER.items():
        rank = factors.rank  # beyond it there are zeros, so that all matrices have one rank
        np.testing.assert_array_equal(found[name].a[:rank], factors.a)
        np.testing.assert_array_equal(found[name].b[:, :rank], factors.b)
        assert not found[name].a[rank:].any()
        assert not found[name].b[:, rank:].any()


@pytest.mark.parametrize(
    "bad",
    [
        member("../evil"),
        member("/evil"),
        member("sub/evil"),
        member(".."),
        member("evil", tarfile.SYMTYPE),
        member("evil", tarfile.LNKTYPE),
        member("evil", tarfile.DIRTYPE),
        member("evil", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name}-{info.type.decode()}",
)
def test_a_member_that_is_no_plain_file_is_refused_and_nothing_is_written(
    good: Path, tmp_path: Path, bad: tarfile.TarInfo
) -> None:
    with tarfile.open(good, "a") as tar:
        tar.addfile(bad, io.BytesIO())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadConfig, match="no plain file"):
        unpack(good, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/evil").exists()


def crowd(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(MAX_FILES + 1):
            tar.addfile(member(f"f{i}"), io.BytesIO())


def bomb(path: Path) -> None:
    """A kilobyte of gzip that holds a megabyte of zeros."""
    with tarfile.open(path, "w:gz") as tar:
        info = member("adapter_model.safetensors")
        info.size = 2**20
        tar.addfile(info, io.BytesIO(bytes(info.size)))


def hole(path: Path) -> None:
    """A sparse file, told in some bytes, of a terabyte."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = member("adapter_model.safetensors")
        info.pax_headers = {"GNU.sparse.size": str(2**40), "GNU.sparse.map": f"{2**40},0"}
        tar.addfile(info, io.BytesIO())


def odd(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = member("fedpipe.json")
        info.pax_headers = {"path": "a\0b"}
        tar.addfile(info, io.BytesIO())


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (bomb, "no adapter of ours"),
        (hole, "more bytes than it has"),
        (odd, "no adapter of ours"),
        (lambda path: path.write_bytes(b"<html>no tar</html>"), "no adapter of ours"),
        (lambda path: path.write_bytes(path.read_bytes()[:1500]), "no adapter of ours"),
        (lambda path: tarfile.open(path, "w").close(), "no adapter of ours"),
        (crowd, "more than 64 files"),
    ],
    ids=["bomb", "hole", "odd", "html", "cut", "empty", "crowd"],
)
def test_what_is_no_adapter_is_refused(good: Path, tmp_path: Path, spoil: Callable[[Path], object], word: str) -> None:
    spoil(good)
    with pytest.raises(BadConfig, match=word):
        unpack(good, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nobodys_files_are_overwritten_but_an_earlier_export_is(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(BadConfig, match="no earlier export"):
        unpack(good, out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    unpack(good, out)
    unpack(good, out)
    assert (out / "adapter_config.json").is_file()


def test_a_damaged_adapter_file_is_said(good: Path, tmp_path: Path) -> None:
    unpack(good, tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(BadConfig, match="damaged"):
        read_peft(tmp_path / "out")
