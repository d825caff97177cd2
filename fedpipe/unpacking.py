"""A downloaded adapter: from the tar on disk to a folder in its place, or merged into its base.

The tar came over a network: its members must be plain files without a folder in their names, few, and no larger than the tar
itself, so nothing is decompressed and no hole is filled.  The folder appears whole or not at all and replaces nothing but an
earlier export.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec

from coordinator.lineage import LINEAGE_FILE, Card, export_folder
from protocol.adapters import Adapter, Factors
from protocol.errors import BadConfig

MAX_FILES: Final = 64
_PREFIX: Final = "base_model.model."


def unpack(tar: Path, folder: Path) -> None:
    """Put the adapter in `tar` at `folder`.  Raises BadConfig for a tar that is none of ours or a folder that is in use."""
    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch:
        unpacked = Path(scratch)
        card = _extract(tar, unpacked)
        with export_folder(folder, card) as part:
            for path in unpacked.iterdir():
                shutil.copyfile(path, part / path.name)


def unpack_merged(tar: Path, base: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write the full-precision model in `base` with the adapter in `tar` merged into it to `folder`.

    Raises BadConfig as `unpack` and coordinator.merge.merge do.
    """
    from coordinator.merge import merge

    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch:
        card = _extract(tar, Path(scratch))
        merge(base, read_peft(Path(scratch)), folder, card=card, progress=progress)


def read_peft(folder: Path) -> Adapter:
    """The deltas in a PEFT folder that coordinator.export wrote: scale 1, so B A as it stands.  Raises BadConfig."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(folder / "adapter_model.safetensors")
        names = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in arrays})
        return {
            name: Factors(a=arrays[f"{_PREFIX}{name}.lora_A.weight"], b=arrays[f"{_PREFIX}{name}.lora_B.weight"])
            for name in names
        }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadConfig(f"the downloaded adapter is damaged ({error}): download it again") from None


def _extract(tar: Path, folder: Path) -> Card:
    try:
        with tarfile.open(tar, "r:") as archive:
            members = list(islice(archive, MAX_FILES + 1))
            _check(members, tar.stat().st_size)
            for member in members:
                content = archive.extractfile(member)
                assert content is not None, "only plain files are here"
                with (folder / member.name).open("wb") as file:
                    shutil.copyfileobj(content, file)
        return msgspec.json.decode((folder / LINEAGE_FILE).read_bytes(), type=Card)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise BadConfig(f"the download is no adapter of ours ({error}): check --url and try again") from None


def _check(members: list[tarfile.TarInfo], tar_bytes: int) -> None:
    if len(members) > MAX_FILES:
        raise BadConfig(
            f"the download holds more than {MAX_FILES} files: that is no adapter of ours, nothing was written"
        )
    for member in members:
        if not member.isreg() or Path(member.name).name != member.name or member.name in {".", ".."}:
            raise BadConfig(f"the download holds {member.name!r}, which is no plain file: nothing was written")
    if any(member.issparse() for member in members) or sum(member.size for member in members) > tar_bytes:
        raise BadConfig("the download claims more bytes than it has: that is no adapter of ours, nothing was written")
