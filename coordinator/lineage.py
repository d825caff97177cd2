"""Where a model came from, and folders that hold one: what every export carries and how it is put in place.

An export is a folder with a model card (README.md) for people and `fedpipe.json` with the same facts for machines.  It
appears whole or not at all, and replaces nothing but an earlier export.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import BadConfig
from protocol.files import sync_folder

LINEAGE_FILE: Final = "fedpipe.json"


class RoundEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One aggregation: who took part, with how many samples in all, and the held-out loss after it."""

    round: int
    agents: list[str]
    samples: int
    loss: float | None = None


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """Lineage of a model: the base, the job, its rounds and the digests that prove which bytes are meant."""

    job: str
    method: str
    base_source: str
    base_sha256: str
    adapter_sha256: str
    license: str = "unknown"
    software: str = ""
    rounds: list[RoundEntry] = []
    rollbacks: list[str] = []
    """Which versions on the way here are earlier ones once more, and who said so."""

    def readme(self, title: str, usage: str, library: str) -> str:
        """The model card in Markdown, with the metadata block that model hubs read."""
        # A JSON string is a YAML string, whatever characters the operator's names hold.
        meta = {"library_name": library, "base_model": self.base_source, "license": self.license}
        head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in meta.items())
        agents = sorted({agent for entry in self.rounds for agent in entry.agents})
        facts = {
            "Base model": f"`{_plain(self.base_source)}` (sha256 `{self.base_sha256 or 'unknown'}`)",
            "Licence": _plain(self.license),
            "Job and method": f"`{_plain(self.job)}`, {_plain(self.method)}",
            "Agents": _plain(", ".join(agents)),
            "Samples processed": str(sum(entry.samples for entry in self.rounds)),
            "Rolled back": _plain("; ".join(self.rollbacks)),
            "Adapter": f"sha256 `{self.adapter_sha256}`",
            "Made by": _plain(self.software),
        }
        lines = "".join(f"- {key}: {value}\n" for key, value in facts.items() if value)
        return (
            f"---\n{head}tags: [lora, federated-learning, fedpipe]\n---\n\n# {title}: {_plain(self.job)}\n\n"
            f"Fine-tuned across private servers whose data never left them.\n\n{lines}\n{self._table()}\n{usage}"
        )

    def _table(self) -> str:
        rows = "".join(
            f"| {e.round} | {len(e.agents)} | {e.samples} | {'' if e.loss is None else f'{e.loss:.4f}'} |\n"
            for e in self.rounds
        )
        return f"| round | agents | samples | held-out loss |\n|---|---|---|---|\n{rows}"


_card: Final = msgspec.json.Decoder(Card)


def _plain(text: str) -> str:
    return " ".join(text.replace("`", "'").replace("|", "/").split())


@contextmanager
def export_folder(folder: Path, card: Card) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end of the block; an error leaves `folder` as it was.

    Raises BadConfig when `folder` holds anything that is not an earlier export: nobody's files are overwritten.
    """
    if folder.exists() and not _may_replace(folder):
        raise BadConfig(f"{folder} exists and is no earlier export of ours: choose another place or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
        (part / LINEAGE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
        _replace(folder, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def exported_digest(folder: Path) -> str:
    """Digest of the adapter that an export holds; empty when there is none."""
    try:
        return _card.decode((folder / LINEAGE_FILE).read_bytes()).adapter_sha256
    except (OSError, msgspec.MsgspecError):
        return ""


def _may_replace(folder: Path) -> bool:
    return folder.is_dir() and ((folder / LINEAGE_FILE).is_file() or not any(folder.iterdir()))


def _replace(folder: Path, part: Path) -> None:
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(part)
    if folder.exists():
        old = part.with_name(f"{part.name}.old")
        folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old)
    else:
        part.rename(folder)
    sync_folder(folder.parent)
