"""`fedpipe init`: what it writes is valid as it stands, says what was found, and never replaces a file unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from agent.config import AgentConfig
from coordinator.config import CoordinatorConfig
from coordinator.submission import read_job
from fedpipe import beginning
from fedpipe.__main__ import app
from protocol.daemon import load_toml
from protocol.topics import is_id


def init(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a model and data in the usual places."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "models" / "or'g" / 'sm"all'
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.jsonl").write_text("{}")
    monkeypatch.setattr(beginning, "MODEL_DIRS", (str(tmp_path / "models"), "/nowhere"))
    monkeypatch.setattr(beginning, "DATA_DIRS", ("/nowhere", str(tmp_path / "data")))
    return tmp_path


def test_an_agent(here: Path) -> None:
    done = init("agent", "--json")
    assert done.exit_code == 0, done.output
    config = load_toml(here / "agent.toml", AgentConfig)
    assert config.base.model_dirs == [str(here / "models")]
    assert config.data["default"].path == str(here / "data")
    assert json.loads(done.stdout)["found"]["models"] == "or'g/sm\"all"
    assert "fedpipe doctor agent --config agent.toml" in json.loads(done.stdout)["next_step"]


@pytest.mark.parametrize("what", ["agent", "coordinator", "job"])
def test_on_a_machine_that_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(beginning, "MODEL_DIRS", ())
    monkeypatch.setattr(beginning, "DATA_DIRS", ())
    file = tmp_path / "new.toml"
    done = init(what, "--out", file, "--url", "http://127.0.0.1:1")
    assert done.exit_code == 0, done.output
    assert "yours" in file.read_text()
    assert f"{file} is written" in done.stdout
    match what:
        case "agent":
            load_toml(file, AgentConfig)
        case "coordinator":
            load_toml(file, CoordinatorConfig)
        case _:
            read_job(file)


def test_a_job_for_the_fleet_that_is_there(here: Path, served: Any) -> None:
    served.join("anna", "berta", "clara")
    assert init("job", "--url", served.url).exit_code == 0
    spec = read_job(here / "job.toml")
    assert (spec.job.name, spec.round.min_agents, spec.model.source) == ("job-1", 2, "or'g/sm\"all")
    submitted = CliRunner().invoke(app, ["submit", "job.toml", "--url", served.url])
    assert submitted.exit_code == 0
    assert init("job", "--url", served.url, "--force").exit_code == 0
    assert read_job(here / "job.toml").job.name == "job-2"


def test_a_file_that_is_there_stays(here: Path) -> None:
    (here / "agent.toml").write_text("mine")
    refused = init("agent")
    assert (refused.exit_code, "--force" in refused.stderr) == (78, True)
    assert (here / "agent.toml").read_text() == "mine"
    assert init("agent", "--force").exit_code == 0
    assert init("janitor").exit_code == 78
    assert init("agent", "--out", "/nowhere/agent.toml").exit_code == 78


@pytest.mark.parametrize("name", ["Edge_07.example.org", "-", "é", "a" * 80, "WIN 11", "10.0.0.1"])
def test_any_machine_has_a_name(name: str) -> None:
    assert is_id(beginning.agent_id(name))
