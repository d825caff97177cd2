"""A base model is found by the agent's own configuration or not at all; its digest is its identity."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from agent.bases import BasesConfig, base_digest, resolve
from protocol.errors import BadConfig
from protocol.messages import Base


@pytest.fixture
def models(tmp_path: Path, llama_folder: Path) -> Path:
    shutil.copytree(llama_folder, tmp_path / "models" / "org" / "tiny")
    shutil.copytree(llama_folder, tmp_path / "secret")
    (tmp_path / "models" / "link").symlink_to(tmp_path / "secret")
    return tmp_path / "models"


def test_a_named_model_and_one_below_model_dirs(models: Path) -> None:
    config = BasesConfig(models={"any name / at all": str(models / "org" / "tiny")}, model_dirs=[str(models)])
    wanted = models / "org" / "tiny"
    for source in ["any name / at all", "org/tiny", str(wanted), "./org/../org/tiny"]:
        assert resolve(Base(source=source), config) == wanted


@pytest.mark.parametrize(
    "source", ["../secret", "link", "org", ".", "/etc", "nothing", "a\0b", "x" * 400, "org/tiny/config.json"]
)
def test_everything_else_is_refused_with_the_next_step(models: Path, source: str) -> None:
    with pytest.raises(BadConfig, match=r"models\.|config\.json"):
        resolve(Base(source=source), BasesConfig(model_dirs=[str(models)]))


def test_an_absolute_path_outside_is_refused(models: Path) -> None:
    with pytest.raises(BadConfig, match="no base model"):
        resolve(Base(source=str(models.parent / "secret")), BasesConfig(model_dirs=[str(models)]))


def test_a_configured_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder, message in [(tmp_path / "gone", "does not exist"), (tmp_path, "safetensors")]:
        with pytest.raises(BadConfig, match=message):
            resolve(Base(source="a"), BasesConfig(models={"a": str(folder)}))


def test_the_digest_follows_content_and_not_place(models: Path, llama_folder: Path) -> None:
    copy = models / "org" / "tiny"
    assert base_digest(copy) == base_digest(llama_folder)
    (copy / "README.md").write_text("does not count")
    assert base_digest(copy) == base_digest(llama_folder)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert base_digest(copy) != base_digest(llama_folder)


def test_a_remembered_digest_costs_no_reading_and_notices_change(models: Path, tmp_path: Path) -> None:
    copy, other, cache = models / "org" / "tiny", models.parent / "secret", tmp_path / "state" / "digests.json"
    first = base_digest(copy, cache)
    weights = copy / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(bytes(stat.st_size))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert base_digest(copy, cache) == first != base_digest(copy)  # so it was not read
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert base_digest(copy, cache) == base_digest(copy)
    cache.write_text("garbage")
    assert base_digest(other, cache) == first


def test_a_file_that_cannot_be_read_is_named_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/proc/self/mem")  # a plain file that refuses also to root
    with pytest.raises(BadConfig, match=r"config\.json cannot be read: Input/output error: let the agent's user read"):
        base_digest(tmp_path)
