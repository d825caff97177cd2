"""`fedpipe support-bundle`: one file with what somebody far away needs to see, and without what is nobody's business.

In it: versions, configurations without secrets, the doctor's report, the end of the logs, what the API says of fleet and jobs, the
journal's statistics, names and sizes of the files in the state folder.  Not in it: keys, passwords, tokens, training text, adapters
and updates; nor training.log, into which libraries write what they please.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import shutil
import sqlite3
import subprocess
import tarfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedpipe.doctor import command
from fedpipe.doctor.roles import CONFIGS
from fedpipe.redaction import known_secrets, redact
from protocol.errors import BadConfig, OutsideFault

LOG_BYTES: Final = 4 * 2**20
LOG_LINES: Final = 20_000
MAX_FILES: Final = 5_000
MAX_JOBS: Final = 50
ABOUT: Final = "about.txt"
PACKAGES: Final = (
    *("fedpipe", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "nvidia-ml-py"),
    *("paho-mqtt", "aiomqtt", "msgspec", "numpy", "scipy", "cryptography", "starlette", "uvicorn", "httpx", "psutil"),
)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the bundle."""

    name: str
    n_bytes: int


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """What was written; `missing` says what could not be had, and why."""

    file: str
    members: list[Member]
    missing: dict[str, str]


class _Part(NamedTuple):
    name: str
    text: Callable[[], str]


def bundle(asked: command.Asked, out: Path | None, logs: Iterable[Path]) -> Bundle:
    """Write the bundle, for its owner alone to read.  Raises BadConfig when it cannot be written there."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    stem = f"fedpipe-support-{platform.node() or 'host'}-{stamp}"
    file = out or Path(f"{stem}.tar.gz")
    places = _configurations(asked)
    known = known_secrets(_text(place) for place in places.values())
    texts, missing = {}, {}
    for part in _parts(asked, places, list(logs)):
        try:
            texts[part.name] = redact(part.text(), known)
        except (OutsideFault, OSError, sqlite3.Error, subprocess.SubprocessError) as error:
            missing[part.name] = redact(str(error), known)
    texts = {ABOUT: _about(texts, missing), **texts}
    try:
        _write(file, stem, texts)
    except OSError as error:
        raise BadConfig(f"{file} cannot be written: {error.strerror or error}; name another place with --out") from None
    members = [Member(name=name, n_bytes=len(text.encode())) for name, text in texts.items()]
    return Bundle(file=str(file), members=members, missing=missing)


def told(done: Bundle) -> str:
    """For people: what is in it."""
    lines = [f"{done.file}: look into it before you send it"]
    lines += [f"  {one.n_bytes:>9}  {one.name}" for one in done.members]
    lines += [f"          -  {name}: {why}" for name, why in done.missing.items()]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- parts


def _parts(asked: command.Asked, places: dict[str, Path], logs: list[Path]) -> Iterator[_Part]:
    yield _Part("versions.json", _versions)
    yield _Part("doctor.json", lambda: _json(command.reports(asked)))
    for role, place in places.items():
        yield _Part(f"{role}.toml", lambda place=place: _text(place))  # type: ignore[misc]
        yield _Part(f"{role}-log.txt", lambda role=role: _journal_of(f"fedpipe-{role}"))  # type: ignore[misc]
        state = _state_dir(role, place)
        yield _Part(f"{role}-files.txt", lambda state=state: _listing(state))  # type: ignore[misc]
        if role == "coordinator":
            yield _Part("journal.json", lambda state=state: _json(journal_statistics(state / "journal.sqlite")))  # type: ignore[misc]
    for number, log in enumerate(logs):
        yield _Part(f"log-{number}-{log.name}", lambda log=log: _tail(log))  # type: ignore[misc]
    if not places or "coordinator" in places:
        yield from _views(asked, places.get("coordinator"))


def _configurations(asked: command.Asked) -> dict[str, Path]:
    """By role, those that belong to what was asked for."""
    if asked.role in CONFIGS:
        return {asked.role: asked.config or CONFIGS[asked.role]}
    return {} if asked.role else {role: place for role, place in CONFIGS.items() if place.exists()}


def _text(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"# {place} cannot be read: {error.strerror}\n"


def _state_dir(role: str, place: Path) -> Path:
    """Also of a configuration that is not valid; one that is no TOML has the default."""
    try:
        found = tomllib.loads(_text(place)).get("state_dir")
    except tomllib.TOMLDecodeError:
        found = None
    return Path(found if isinstance(found, str) else f"/var/lib/fedpipe-{role}")


def _versions() -> str:
    found: dict[str, object] = {"python": platform.python_version(), "platform": platform.platform(), "at": time.time()}
    found["cpus"], found["uid"] = os.cpu_count(), os.geteuid()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return _json(found)


def _journal_of(unit: str) -> str:
    if shutil.which("journalctl") is None:
        raise BadConfig("there is no journalctl here: add the log with --log FILE")
    call = ["journalctl", "--unit", unit, "--lines", str(LOG_LINES), "--output", "short-iso", "--no-pager", "--quiet"]
    done = subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    if done.returncode or not done.stdout.strip():
        why = done.stderr.strip() or "the journal holds nothing of it"
        raise BadConfig(f"{why}: run this as root, or add the log with --log FILE")
    return done.stdout[-LOG_BYTES:]


def _tail(file: Path) -> str:
    with file.open("rb") as content:
        size = content.seek(0, io.SEEK_END)
        content.seek(max(0, size - LOG_BYTES))
        return content.read().decode(errors="replace")


def _listing(folder: Path) -> str:
    """Sizes, days and names; nothing is opened."""
    if not folder.is_dir():
        raise BadConfig(f"{folder} is not there")
    lines = []
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            try:
                found = (Path(place) / name).lstat()
            except OSError:
                continue
            day = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.st_mtime))
            lines.append(
                f"{found.st_size:>14} {day} {found.st_mode & 0o777:04o} {Path(place, name).relative_to(folder)}"
            )
            if len(lines) == MAX_FILES:
                return "\n".join([*lines, "and more"]) + "\n"
    return "\n".join(lines) + "\n"


def journal_statistics(file: Path) -> dict[str, object]:
    """How many facts of which kind the journal holds, from when to when.  Reads beside a coordinator that runs; changes nothing."""
    if not file.is_file():
        raise BadConfig(f"{file} is not there")
    how = "mode=ro" if Path(f"{file}-wal").exists() else "immutable=1"
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?{how}", uri=True)) as database:
        kinds = database.execute("SELECT kind, COUNT(*), SUM(LENGTH(body)), SUM(poison) FROM journal GROUP BY kind")
        seqs = database.execute("SELECT MIN(seq), MAX(seq), MIN(at), MAX(at) FROM journal").fetchone()
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            "n_bytes": file.stat().st_size,
            "format": database.execute("PRAGMA user_version").fetchone()[0],
            "rows": dict(zip(("first", "last", "from", "to"), seqs, strict=True)),
            "kinds": {kind: {"n": n, "n_bytes": size, "n_poison": bad} for kind, n, size, bad in kinds},
            "tables": {name: database.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0] for name in tables},  # noqa: S608 - the database's own names
        }


def _views(asked: command.Asked, config: Path | None) -> Iterator[_Part]:
    """What the API says, if there is one."""
    from fedpipe.client import Coordinator

    place = (_api_of(config) if config else None) or (asked.url, asked.token_file, None)
    names: list[str] = []

    def fleet() -> str:
        with Coordinator(*place) as coordinator:
            found = coordinator.fleet()
        names.extend(job.name for job in found.jobs[-MAX_JOBS:])
        return _json(found)

    def job(name: str) -> str:
        with Coordinator(*place) as coordinator:
            return _json(coordinator.job(name))

    yield _Part("fleet.json", fleet)  # whoever takes the parts has its text before the next, so the jobs are known then
    for name in names:
        yield _Part(f"job-{name}.json", lambda name=name: job(name))  # type: ignore[misc]


def _api_of(config: Path) -> tuple[str, Path | None, Path | None] | None:
    from coordinator.config import CoordinatorConfig
    from fedpipe.doctor.roles import api_of
    from protocol.daemon import load_toml

    try:
        return api_of(load_toml(config, CoordinatorConfig))
    except BadConfig:
        return None


# ------------------------------------------------------------------------------------------------------------- writing


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=1).decode() + "\n"


def _about(texts: dict[str, str], missing: dict[str, str]) -> str:
    lines = [__doc__ or "", "Files:", *(f"  {name}" for name in texts)]
    if missing:
        lines += ["", "Could not be had:", *(f"  {name}: {why}" for name, why in missing.items())]
    return "\n".join(lines) + "\n"


def _write(file: Path, stem: str, texts: dict[str, str]) -> None:
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(opened, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, text in texts.items():
            data = text.encode()
            info = tarfile.TarInfo(f"{stem}/{name}")
            info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
            tar.addfile(info, io.BytesIO(data))
