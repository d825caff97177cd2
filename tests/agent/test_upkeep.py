"""The agent's folder: read only if it can be, and never fuller than its owner allows."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest

from agent.upkeep import DAY_S, KeepConfig, open_folder, sweep_parts, tidy
from protocol.errors import BadConfig, Unavailable


def aged(path: Path, days: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    at = time.time() - days * DAY_S
    os.utime(path, (at, at))
    return path


def test_a_folder_knows_its_format_and_an_older_one_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "agent"
    open_folder(folder)
    known = msgspec.json.decode((folder / "format.json").read_bytes())
    assert known["version"] == 1
    assert known["software"].startswith("fedpipe")
    (folder / "format.json").unlink()
    (folder / ".training.update.99.part").touch()
    open_folder(folder)
    assert [path.name for path in folder.iterdir()] == ["format.json"]
    (folder / "format.json").write_bytes(b"\xff\x00")
    open_folder(folder)
    assert msgspec.json.decode((folder / "format.json").read_bytes()) == known


def test_a_newer_format_is_refused_with_the_remedy_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "format.json"
    path.write_text('{"version": 2, "software": "fedpipe 9.0", "more": []}')
    part = tmp_path / ".x.1.part"
    part.touch()
    with pytest.raises(BadConfig, match=r"written by fedpipe 9.0 in format 2.*another state_dir"):
        open_folder(tmp_path)
    assert part.exists()
    assert "9.0" in path.read_text()


def test_a_folder_that_cannot_be_had_is_a_clear_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"file.*MB free"):
        open_folder(tmp_path / "file" / "agent")


def test_old_things_go_and_young_ones_and_owed_ones_stay(tmp_path: Path) -> None:
    old = [
        aged(tmp_path / "training.checkpoint", 3),
        aged(tmp_path / "blobs" / "partial" / "c.1.data", 3),
        aged(tmp_path / "blobs" / "partial" / "c.1.log", 3),
        aged(tmp_path / "outbox" / "1.broken", 3),
        aged(tmp_path / "outbox" / "1.update", 3),
    ]
    young = [
        aged(tmp_path / "blobs" / "partial" / "c.2.data", 1),
        aged(tmp_path / "outbox" / "2.broken", 1),
        aged(tmp_path / "outbox" / "2.update", 9),
        aged(tmp_path / "outbox" / "3.update", 99),
        aged(tmp_path / "outbox" / "3.json", 99),
        aged(tmp_path / "blobs" / "whole", 99),
    ]
    tidy(tmp_path, KeepConfig(days=2))
    assert [path for path in old if path.exists()] == []
    assert [path for path in young if not path.exists()] == []


def test_a_long_log_is_cut_while_it_is_written_to(tmp_path: Path) -> None:
    log = tmp_path / "training.log"
    with log.open("ab", buffering=0) as child:
        child.write(b"x" * 5000)
        tidy(tmp_path, KeepConfig(log_bytes=4096))
        child.write(b"more\n")
        tidy(tmp_path, KeepConfig(log_bytes=4096))
    assert log.read_bytes() == b"more\n"
    assert (tmp_path / "training.log.1").read_bytes() == b"x" * 5000


def test_what_a_killed_child_was_writing_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".training.checkpoint.77.part").touch()
    (tmp_path / "training.checkpoint").touch()
    sweep_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training.checkpoint"]
