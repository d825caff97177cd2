"""Which folder holds the base model of a plan, and is it the right one?

A plan names its base by a source that came over the wire, so a source is only ever a key or a path below folders that this
agent's own configuration opened; everything else is refused with what to write there:

    1. models["the source"] = "/path"         a folder by name
    2. a folder below one of model_dirs       also when the source is an absolute path; `..` and links out are refused
    3. a model hub id, with allow_hub         downloaded (or taken from the hub's cache) by huggingface_hub

Names say nothing about content.  The digest does: sha256 over config.json, tokenizer.json and every *.safetensors file.
Hashing 14 GB takes half a minute, so each file's digest is remembered by its size and modification time.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Final

import msgspec

from protocol.errors import BadConfig, Unavailable
from protocol.files import replacing
from protocol.messages import Base

logger = logging.getLogger(__name__)

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.-]+)?")
HUB_FILES: Final = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class BasesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where this agent's base models lie.  Fields: models by source, folders to look below, whether the hub may be asked."""

    models: dict[str, str] = {}
    model_dirs: list[str] = []
    allow_hub: bool = False


class _Seen(msgspec.Struct, frozen=True):
    size: int
    mtime_ns: int
    sha256: str


_all_seen: Final = msgspec.json.Decoder(dict[str, _Seen])


def resolve(base: Base, config: BasesConfig) -> Path:
    """The folder of a base model.  Raises BadConfig, or Unavailable when a download failed; may download for hours."""
    named = config.models.get(base.source)
    if named is not None:
        return _checked(Path(named).expanduser(), f'models."{base.source}"')
    for opened in config.model_dirs:
        folder = _below(Path(opened).expanduser().resolve(), base.source)
        if folder is not None:
            return _checked(folder, f"model_dirs {opened}")
    if config.allow_hub and HUB_ID.fullmatch(base.source):
        return _checked(_download(base.source), "the model hub")
    raise BadConfig(
        f'no base model "{base.source}" on this agent: give its folder as models."{base.source}" in the configuration, '
        f"put it below one of model_dirs {config.model_dirs}, or set allow_hub = true if it is a hub id"
    )


def _below(root: Path, source: str) -> Path | None:
    try:
        folder = (root / source).resolve()
        return folder if folder != root and folder.is_relative_to(root) and folder.is_dir() else None
    except (OSError, ValueError):  # a name too long or with a NUL is no folder of ours
        return None


def _checked(folder: Path, origin: str) -> Path:
    if not folder.is_dir():
        raise BadConfig(f"{origin}: folder {folder} does not exist: correct it in the agent's configuration")
    if not (folder / "config.json").is_file():
        raise BadConfig(f"{origin}: {folder} has no config.json: it must be a transformers model folder")
    if not any(folder.glob("*.safetensors")):
        raise BadConfig(f"{origin}: {folder} has no *.safetensors: save the model with save_pretrained first")
    return folder


def _download(source: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = source.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise Unavailable(f'base model "{source}" did not come from the hub: {reason}') from None
    return Path(folder)


def base_digest(folder: Path, cache: Path | None = None) -> str:
    """Sha256 over the files that make the base what it is, in the order of their names.

    `cache` is a JSON file of digests by path that is read and updated.  Cost: reads the whole model once, then nothing
    until a size or modification time changes.  Raises BadConfig for a file that cannot be read.
    """
    names = [folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors")]
    seen = _remembered(cache)
    before = dict(seen)
    whole = hashlib.sha256()
    for file in sorted(path for path in names if path.is_file()):
        stat, known = file.stat(), seen.get(str(file))
        if known is None or (known.size, known.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            try:
                with file.open("rb") as content:
                    found = hashlib.file_digest(content, "sha256").hexdigest()
            except OSError as error:
                text = f"base model: {file} cannot be read: {error.strerror or error}: let the agent's user read the folder"
                raise BadConfig(text) from None
            known = seen[str(file)] = _Seen(stat.st_size, stat.st_mtime_ns, found)
        whole.update(f"{file.name} {known.sha256}\n".encode())
    if cache is not None and seen != before:
        _remember(cache, seen)
    return whole.hexdigest()


def _remembered(cache: Path | None) -> dict[str, _Seen]:
    if cache is None or not cache.is_file():
        return {}
    try:
        return _all_seen.decode(cache.read_bytes())
    except (msgspec.DecodeError, OSError):
        logger.warning("digest cache unreadable, hashing again", extra={"action": "digest_cache_lost"})
        return {}


def _remember(cache: Path, seen: dict[str, _Seen]) -> None:
    # Another process may write too: a whole file appears or none, and losing an entry only costs hashing again.
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as file:
            file.write(msgspec.json.encode(seen))
    except OSError as error:
        logger.warning("digests are not remembered: %s", error, extra={"action": "digest_cache_lost"})
