"""`fedpipe support-bundle`: secrets are planted everywhere, and none of them is in the bundle."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedpipe.__main__ import app
from fedpipe.bundling import journal_statistics
from fedpipe.redaction import known_secrets, redact
from protocol.errors import BadConfig

SECRETS = {
    "in_url": "PlantedUrlWord",
    "user": "planted-user",
    "file": "PlantedFileWord",
    "token": "PlantedBearerWord",
    "env": "PlantedEnvironmentWord",
    "join": "fp1.abc.PlantedJoinWord.0123",
    "text": "PlantedTrainingText",
    "key": "PlantedKeyBytes",
    "update": "PlantedUpdateBytes",
}


def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["support-bundle", *map(str, arguments)], env=env)


def opened(file: Path) -> dict[str, str]:
    with tarfile.open(file) as tar:
        return {m.name.partition("/")[2]: tar.extractfile(m).read().decode() for m in tar}  # type: ignore[union-attr]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """An agent's folder with a secret in every place that there is."""
    state = tmp_path / "state"
    (state / "outbox").mkdir(parents=True)
    (state / "outbox" / "1.update").write_text(SECRETS["update"])
    (state / "training.log").write_text(SECRETS["text"])
    (tmp_path / "notes.jsonl").write_text(json.dumps({"text": SECRETS["text"]}) + "\n{broken " + SECRETS["text"])
    (tmp_path / "password").write_text(SECRETS["file"] + "\n")
    (tmp_path / "key.pem").write_text(f"-----BEGIN PRIVATE KEY-----\n{SECRETS['key']}\n-----END PRIVATE KEY-----\n")
    (tmp_path / "daemon.log").write_text(
        f"12:00:00 connected to mqtt://{SECRETS['user']}@h\npassword={SECRETS['file']} failed\n"
        f"Authorization: Bearer {SECRETS['token']}\nenrolled with {SECRETS['join']}\n"
        f"-----BEGIN EC PRIVATE KEY-----\n{SECRETS['key']}\n"
    )
    config = tmp_path / "agent.toml"
    config.write_text(
        f'agent = "edge-a"  # token: {SECRETS["token"]}\nstate_dir = "{state}"\n[broker]\n'
        f'url = "mqtt://{SECRETS["user"]}:{SECRETS["in_url"]}@127.0.0.1:1"\nusername = "{SECRETS["user"]}"\n'
        f'password_file = "{tmp_path}/password"\n[data.default]\npath = "{tmp_path}/notes.jsonl"\n'
    )
    return config


@pytest.mark.parametrize("damage", ["", "\nthis is no TOML"])
def test_no_secret_gets_into_the_bundle(planted: Path, damage: str) -> None:
    planted.write_text(planted.read_text() + damage)
    folder = planted.parent
    out = folder / "bundle.tar.gz"
    env = {"FEDPIPE_JOIN_TOKEN": SECRETS["env"]}
    done = run("agent", "--config", planted, "--out", out, "--log", folder / "daemon.log", env=env)
    assert done.exit_code == 0, done.output
    found = opened(out)
    everything = "\n".join(found.values()) + "\n".join(found)
    assert [name for name, secret in SECRETS.items() if secret in everything + done.output] == []
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert "edge-a" in found["agent.toml"]
    assert f'password_file = "{folder}/password"' in found["agent.toml"]
    assert "12:00:00 connected to" in found["log-0-daemon.log"]
    (report,) = json.loads(found["doctor.json"])
    assert report["exit_code"] == (78 if damage else 1)
    if not damage:
        assert "outbox/1.update" in found["agent-files.txt"]
    assert json.loads(found["versions.json"])["fedpipe"]
    assert all(name in done.stdout for name in found)


def test_what_the_coordinator_says_is_in_it(served: Any, tmp_path: Path) -> None:
    served.join("anna")
    out = tmp_path / "bundle.tar.gz"
    done = run("operator", "--url", served.url, "--out", out, "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    found = opened(out)
    assert [one["name"] for one in told["members"]] == list(found)
    assert json.loads(found["fleet.json"])["agents"][0]["id"] == "anna"


def test_the_journal_is_counted(served: Any, tmp_path: Path) -> None:
    served.join("anna", "berta")
    found = journal_statistics(served.folder / "journal.sqlite")
    assert found["kinds"]["AgentJoined"]["n"] == 2  # type: ignore[index]
    with pytest.raises(BadConfig):
        journal_statistics(tmp_path / "none.sqlite")


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("operator", "--url", "http://127.0.0.1:1")
    assert done.exit_code == 0
    assert "-  fleet.json: no coordinator at" in done.stdout
    assert len(list(tmp_path.glob("fedpipe-support-*.tar.gz"))) == 1
    assert run("operator", "--out", "/nowhere/x.tar.gz").exit_code == 78


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("max_tokens = 512", True),
        ('token_file = "/run/token"', True),
        ("n_tokens=99 token_accuracy=0.5", True),
        ('username = ""', True),
        ("TOKENIZERS_PARALLELISM=false", True),
        ('Password = "hush"', False),
        ('{"api_key": "hush"}', False),
        ("broker.password = 'hush'", False),
        ('secret = """\nhush\nhush"""', False),
        ("https://hush@host/path", False),
        ("mqtts://a:b@hush@host", False),
        ("token hf_hushhushhushhushhush", False),
    ],
)
def test_what_looks_like_a_secret(text: str, kept: bool) -> None:
    assert redact(text) == text if kept else "hush" not in redact(text).replace("hf_", "")


def test_json_stays_json() -> None:
    text = '{"token": true, "password": 123456, "secret": "hush", "n_tokens": 5}'
    assert json.loads(redact(text)) == dict.fromkeys(["token", "password", "secret"], "[redacted]") | {"n_tokens": 5}


def test_known_words_go_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("first line\nsecond line\n")
    config = f'password_file = "{tmp_path}/word"\nurl = "mqtt://me:pass%2Fw1@h"'
    known = known_secrets([config], {"HF_TOKEN": 'xy"z99', "N": "innocent", "TOKENIZERS_PARALLELISM": "sometimes"})
    text = redact('first line, second line, pass/w1, xy"z99, xy\\"z99, pass%2Fw1, innocent, sometimes', known)
    assert text == ", ".join(["[redacted]"] * 6 + ["innocent", "sometimes"])
