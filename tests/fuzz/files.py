"""Targets: whatever bytes arrive as an update, as a model or as the tar of a downloaded adapter."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from coordinator.lineage import LINEAGE_FILE, Card
from fedpipe.unpacking import unpack
from protocol.adapters import Factors
from protocol.errors import BadConfig, BadUpdate
from protocol.messages import UpdateDtype
from protocol.models import open_model, read_model, write_model
from protocol.updates import open_update, write_update
from protocol.widths import Quantized, component_bytes
from tests.fuzz.forged import NUMBERS, REALS, TEXTS
from tests.fuzz.script import Script

SHAPES = {"a": (3, 2), "b": (2, 4)}
RANKS = {"a": 2, "b": 1}
MAX_BYTES = 2**20
SHM = Path("/dev/shm")  # noqa: S108


@cache
def scratch(name: str) -> tempfile.TemporaryDirectory[str]:
    """A folder for this process; in memory where there is such a place: a million files a disk need not see."""
    return tempfile.TemporaryDirectory(prefix=f"fedpipe-{name}-", dir=SHM if os.access(SHM, os.W_OK) else None)


def _folder() -> Path:
    return Path(scratch("files").name)


def _file(data: bytes, name: str) -> Path:
    path = _folder() / name
    path.write_bytes(data)
    return path


def _of(script: Script, header: dict[str, Any]) -> bytes:
    """A header with lies in it and values behind; one script in four is the file itself."""
    if script.below(4) == 0:
        return script.rest()
    names = script.pick([["a", "b"], ["a", "b"], ["b", "a"], ["a", "a"], ["a"], ["a", "c"], []])
    dtype = script.pick(["fp32", "fp16", "bf16", "bf16", "fp64", "int8", "nf4", "nf4"])
    lies: list[Any] = [*NUMBERS, *REALS[:8], *TEXTS, None, []]
    entries = [[name, RANKS.get(name, 1), *SHAPES.get(name, (3, 2))] for name in names]
    for _ in range(script.below(3)):
        if entries:
            entries[script.below(len(entries))][script.below(4)] = script.pick(lies)
    header = header | {"dtype": dtype, "matrices": entries}
    for _ in range(script.below(3)):
        header[script.pick([*header, "scores", "extra"])] = script.pick(
            [
                *lies,
                [[1.0, 0.5], [0.25]],
                [[-1.0], [2.0]],
                [[]] * 2,
                [b"\x80?", b""],
                [b"\x80\xbf", b"\0"],
                [b"\xc0\x7f"] * 2,
            ]
        )
    body = b""
    if header["kind"] == "model":
        body = script.take(4 * script.below(64))
    else:
        for _, rank, d_out, d_in in entries:
            n_a, n_b = _bytes(rank, d_in, dtype), _bytes(rank, d_out, dtype)
            body += b"\x92\xc6" + n_a.to_bytes(4) + script.take(n_a) + b"\xc6" + n_b.to_bytes(4) + script.take(n_b)
    whole = msgspec.msgpack.encode(header) + body
    cut = script.below(16)
    return whole[:-cut] if cut in {1, 2, 9} else whole + b"\0" * (cut == 3)


def _bytes(rank: object, dimension: object, dtype: str) -> int:
    if not isinstance(rank, int) or not isinstance(dimension, int):
        return 8
    n = rank * component_bytes(dimension, dtype if dtype in get_args(UpdateDtype) else "fp16")  # type: ignore[arg-type]
    return n if 0 <= n < 2**12 else 8


def update(data: bytes) -> None:
    """An update file: what passes every check holds finite values of the planned shapes, and can be written again."""
    which: dict[str, Any] = {"job": "x", "round": 1, "attempt": 0}
    path = _file(_of(Script(data), {"v": 1, "kind": "lora", **which}), "update")
    try:
        found = open_update(path, "lora", **which, max_bytes=MAX_BYTES)
        found.check(RANKS, SHAPES)
        found.check_values()
    except BadUpdate:
        return
    adapter = {name: found.factors(name) for name in found.ranks}
    assert adapter.keys() == RANKS.keys()
    for name, factors in adapter.items():
        assert factors.shape == SHAPES[name]
        assert np.isfinite(factors.norm())
    assert all(x >= 0 for scores in found.scores.values() for x in scores)
    again = path.with_suffix(".again")
    write_update(again, adapter, **which, dtype=found.header.dtype)
    back = open_update(again, "lora", **which, max_bytes=MAX_BYTES)
    near = 0.2 if found.header.dtype in get_args(Quantized) else 0.0
    assert all(_equal(back.factors(name), factors, near) for name, factors in adapter.items())


def model(data: bytes) -> None:
    """A model file: what can be read is finite, is as long as it says and can be written again."""
    path = _file(_of(Script(data), {"v": 1, "kind": "model", "version": 1}), "model")
    try:
        header, ends = open_model(path, max_bytes=MAX_BYTES)
        adapter = read_model(path, max_bytes=MAX_BYTES)
    except BadUpdate:
        return
    assert ends[-1] == len(path.read_bytes())
    again = path.with_suffix(".again")
    levels = write_model(again, adapter, version=header.version, dtype=header.dtype)
    assert levels[-1].sha256 == hashlib.sha256(again.read_bytes()).hexdigest()
    back = read_model(again, max_bytes=MAX_BYTES)
    assert back.keys() == adapter.keys()
    assert all(_equal(back[name], factors) for name, factors in adapter.items())


def _equal(one: Factors, other: Factors, near: float = 0.0) -> bool:
    """Whether they are the same, or differ by so much of the largest entry."""
    pairs = ((one.a, other.a), (one.b, other.b))
    return all(np.all(np.abs(x - y) <= near * np.abs(y).max(initial=0.0)) for x, y in pairs)


def tar(data: bytes) -> None:
    """The tar of a download: it is put in place, or refused and nothing is written anywhere."""
    script = Script(data)
    whole = script.rest() if script.below(3) == 0 else _tar(script)
    target = _folder() / "unpacked" / "adapter"
    target.parent.mkdir(exist_ok=True)
    path = _file(whole, "tar")
    try:
        unpack(path, target)
    except BadConfig:
        assert not target.exists()
        assert not any(target.parent.iterdir())
        return
    inside = list(target.iterdir())
    assert sum(file.stat().st_size for file in inside) <= len(whole)
    for file in inside:
        assert file.is_file()
        file.unlink()
    target.rmdir()
    assert not any(target.parent.iterdir())


KINDS = [
    *(tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE),
    *(tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, tarfile.AREGTYPE),
]
CARD = msgspec.json.encode(Card(job="x", method="qlora", base_source="toy", base_sha256="", adapter_sha256=""))
NAMES = [
    LINEAGE_FILE,
    "adapter_model.safetensors",
    "../x",
    "/x",
    "a/b",
    "..",
    ".",
    "",
    "a" * 300,
    "é\udc80",
    "a\0b",
    "\n",
]
LIES = ["../../x", "999999999999", "-1", "1", "x", "a\0b", "nan"]
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda whole: gzip.compress(whole, 1),
    "bz2": lambda whole: bz2.compress(whole, 1),
    "xz": lambda whole: lzma.compress(whole, preset=0),
}


def _tar(script: Script) -> bytes:
    packing = script.pick([*[""] * 12, *PACKINGS])
    style = script.pick([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    whole = bytearray()
    for _ in range(script.below(6) or 70 * (script.below(16) == 15)):
        name, kind, link = script.pick(NAMES), script.pick(KINDS), script.pick(["", "/etc/passwd", "../x"])
        content = script.pick([CARD, CARD, b"{}", script.take(script.pick([0, 1, 31])), b"\0" * 4096])
        lie = None
        if style == tarfile.PAX_FORMAT and script.below(4) == 0:
            lie = script.pick(["path", "size", "GNU.sparse.major", "GNU.sparse.realsize", "mtime"]), script.pick(LIES)
        if header := _header(style, name, kind, link, len(content), lie):
            whole += header + content + bytes(-len(content) % tarfile.BLOCKSIZE)
    whole += bytes(2 * tarfile.BLOCKSIZE)
    if packing:
        whole = bytearray(PACKINGS[packing](whole))
    for _ in range(script.below(4)):
        whole[script.below(len(whole))] = script.below(256)
    return bytes(whole[: len(whole) - script.pick([0, 0, 0, 1, 512, 1024, 9000])])


@lru_cache(2**14)
def _header(style: int, name: str, kind: bytes, link: str, n_bytes: int, lie: tuple[str, str] | None) -> bytes:
    """What stands before the content; nothing if this format cannot say it."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, n_bytes
    info.pax_headers = dict([lie] if lie else [])
    try:
        return info.tobuf(style)
    except (ValueError, UnicodeError):
        return b""
