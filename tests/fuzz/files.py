"""Targets: whatever bytes arrive as an update, as a model or as the tar of a downloaded adapter."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coordinator.lineage import LINEAGE_FILE, Card
from fedpipe.unpacking import unpack
from protocol.adapters import Factors
from protocol.errors import BadConfig, BadUpdate
from protocol.models import open_model, read_model, write_model
from protocol.updates import open_update, write_update
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
    dtype = script.pick(["fp32", "fp16", "bf16", "bf16", "fp64"])
    lies: list[Any] = [*NUMBERS, *REALS[:8], *TEXTS, None, []]
    entries = [[name, RANKS.get(name, 1), *SHAPES.get(name, (3, 2))] for name in names]
    for _ in range(script.below(3)):
        if entries:
            entries[script.below(len(entries))][script.below(4)] = script.pick(lies)
    header = header | {"dtype": dtype, "matrices": entries}
    for _ in range(script.below(3)):
        header[script.pick([*header, "scores", "extra"])] = script.pick(
            [*lies, [[1.0, 0.5], [0.25]], [[-1.0], [2.0]], [[]] * 2]
        )
    item = {"fp32": 4}.get(dtype, 2)
    body = b""
    if header["kind"] == "model":
        body = script.take(item * script.below(64))
    else:
        for _, rank, d_out, d_in in entries:
            n_a, n_b = _bytes(rank, d_in, item), _bytes(rank, d_out, item)
            body += b"\x92\xc6" + n_a.to_bytes(4) + script.take(n_a) + b"\xc6" + n_b.to_bytes(4) + script.take(n_b)
    whole = msgspec.msgpack.encode(header) + body
    cut = script.below(16)
    return whole[:-cut] if cut in {1, 2, 9} else whole + b"\0" * (cut == 3)


def _bytes(rank: object, dimension: object, item: int) -> int:
    if isinstance(rank, int) and isinstance(dimension, int) and 0 <= rank * dimension * item < 2**12:
        return rank * dimension * item
    return 8


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
    assert all(_equal(back.factors(name), factors) for name, factors in adapter.items())


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


def _equal(one: Factors, other: Factors) -> bool:
    return np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)


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


def _tar(script: Script) -> bytes:
    out = io.BytesIO()
    packing = script.pick([*[""] * 12, "gz", "bz2", "xz"])
    style = script.pick([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=out, mode=f"w:{packing}", format=style) as archive:  # type: ignore[call-overload]
        for _ in range(script.below(6) or 70 * (script.below(16) == 0)):
            info = tarfile.TarInfo(script.pick(NAMES))
            info.type = script.pick(KINDS)
            info.linkname = script.pick(["", "/etc/passwd", "../x"])
            content = script.pick([CARD, CARD, b"{}", script.take(script.below(32)), b"\0" * 4096])
            info.size = len(content)
            if style == tarfile.PAX_FORMAT and script.below(4) == 0:
                info.pax_headers = {
                    script.pick(["path", "size", "GNU.sparse.major", "GNU.sparse.realsize", "mtime"]): script.pick(
                        ["../../x", "999999999999", "-1", "1", "x", "a\0b", "nan"]
                    )
                }
            try:
                archive.addfile(info, io.BytesIO(content))
            except (ValueError, UnicodeError):
                continue  # this format cannot say it
    whole = bytearray(out.getvalue())
    for _ in range(script.below(4)):
        whole[script.below(len(whole))] = script.below(256)
    return bytes(whole[: len(whole) - script.pick([0, 0, 0, 1, 512, 1024, 9000])])
