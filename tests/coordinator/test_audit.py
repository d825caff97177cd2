"""The audit log: no change of it goes unseen, nothing is done that is not in it, and a crash leaves it whole."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coordinator.audit import Audit, Entry, Head, head_file, lines_of, parse_head, read, seal, verify
from coordinator.audited import named
from coordinator.submission import _take
from fedpipe.__main__ import app
from protocol.errors import BadConfig, Unavailable

JOB = """
job = {name = "j", license = "mit"}
model = {source = "toy"}
adapter = {targets = ["all"], rank = 8, bits = "nf4"}
train = {n_steps = 2, batch = 64}
"""
TOML = {"content-type": "application/toml"}


def a_log(n: int, seed: int = 0) -> list[bytes]:
    rng, before, lines = random.Random(seed), Head().digest, []
    for number in range(1, n + 1):
        what = "".join(chr(rng.randrange(32, 0x2FF)) for _ in range(rng.randrange(8)))
        line, before = seal(Entry(n=number, at=rng.random(), actor="local", action="x", what=what, before=before))
        lines.append(line + b"\n")
    return lines


logs = st.builds(a_log, st.integers(2, 8), st.integers(0, 1000))


# ---------------------------------------------------------------------------------------------------------------- laws


@given(logs, st.data())
def test_a_changed_byte_is_found_at_its_line(lines: list[bytes], data: st.DataObject) -> None:
    assert verify(lines).n == len(lines)
    at = data.draw(st.integers(0, len(lines) - 1))
    place = data.draw(st.integers(0, len(lines[at]) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != lines[at][place]))
    lines[at] = lines[at][:place] + bytes([value]) + lines[at][place + 1 :]
    with pytest.raises(BadConfig, match=rf"^line {at + 1} (is not whole|is not readable|was changed)"):
        verify(lines)


@given(logs, st.data())
def test_a_line_that_is_gone_put_in_or_moved_is_found_at_its_place(lines: list[bytes], data: st.DataObject) -> None:
    head = verify(lines)
    at = data.draw(st.integers(0, len(lines) - 1))
    gone = lines[:at] + lines[at + 1 :]
    with pytest.raises(BadConfig, match=f"^line {at + 1} is missing"):
        verify(gone, head)
    twice = lines[: at + 1] + lines[at:]
    with pytest.raises(BadConfig, match=f"^line {at + 2} is out of place"):
        verify(twice)
    to = data.draw(st.integers(0, len(lines) - 1).filter(lambda i: i != at))
    moved = [*gone[:to], lines[at], *gone[to:]]
    with pytest.raises(BadConfig, match=rf"^line {min(at, to) + 1} is (missing|out of place)"):
        verify(moved, head)


@given(logs, st.data())
def test_who_seals_a_change_anew_breaks_the_chain_or_the_head(lines: list[bytes], data: st.DataObject) -> None:
    head = verify(lines)
    at = data.draw(st.integers(0, len(lines) - 1))
    first = json.loads(lines[at])
    first.pop("digest")
    forged, _ = seal(Entry(**first | {"actor": "nobody"}))
    lines[at] = forged + b"\n"
    with pytest.raises(BadConfig, match=f"^line {min(at + 2, len(lines))} (does not follow|was changed)"):
        verify(lines, head)


@given(logs, st.data())
def test_an_end_that_is_cut_off_is_found_by_the_head(lines: list[bytes], data: st.DataObject) -> None:
    head = verify(lines)
    left = data.draw(st.integers(0, len(lines) - 1))
    assert verify(lines[:left]).n == left, "by itself it is whole"
    with pytest.raises(BadConfig, match=f"^line {left + 1} is missing: the log had {len(lines)} lines once"):
        verify(lines[:left], head)
    assert verify([*lines, *a_log(0)], Head(left, verify(lines[:left]).digest)) == head, "an older head holds as well"


@pytest.mark.parametrize("text", ["", "7", "x:" + "0" * 64, "7:12"])
def test_what_is_no_head(text: str) -> None:
    with pytest.raises(BadConfig, match="no head"):
        parse_head(text)


# ------------------------------------------------------------------------------------------------------------ the file


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    for _ in range(3):
        audit = Audit(path, lambda: 7.0)
        with audit.act("local", "cancel", "j") as doing:
            doing.outcome = "200"
    assert verify(lines_of(path)) == audit.head == parse_head(head_file(path).read_text())
    assert [(e.n, e.of, e.outcome) for e in read(path)][-2:] == [(5, 0, ""), (6, 5, "200")]
    assert path.stat().st_mode & 0o077 == 0


def test_a_failure_is_an_outcome(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.log", lambda: 7.0)
    with pytest.raises(BadConfig), audit.act("local", "reload", "f"):
        raise BadConfig("no token")
    with pytest.raises(KeyError), audit.act("local", "reload", "f"):
        raise KeyError("k")
    assert [e.outcome for e in read(tmp_path / "audit.log") if e.of] == ["refused: no token", "failed: 'k'"]


def test_a_crash_in_the_middle_of_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Audit(tmp_path / "whole.log", lambda: 7.0)
    first.append("local", "one", "")
    before = (tmp_path / "whole.log").read_bytes()
    first.append("local", "two", "")
    whole = (tmp_path / "whole.log").read_bytes()
    for cut in range(len(before) + 1, len(whole)):
        path = tmp_path / f"{cut}.log"
        path.write_bytes(whole[:cut])
        audit = Audit(path, lambda: 8.0)
        assert verify(lines_of(path), audit.head).n == 2
        assert [e.action for e in read(path)] == ["one", "repair"]
    assert "a line that a crash broke off" in caplog.text


def test_an_end_that_was_cut_off_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "audit.log"
    audit = Audit(path, lambda: 7.0)
    for action in ("one", "two"):
        audit.append("local", action, "")
    path.write_bytes(b"".join(list(lines_of(path))[:1]))
    Audit(path, lambda: 8.0)
    assert "the log had 2 lines once" in caplog.text
    assert [e.action for e in read(path)] == ["one", "repair"]


def test_without_room_nothing_is_begun(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.log", lambda: 7.0)
    audit._path = Path("/dev/full")
    begun = False
    with pytest.raises(Unavailable), audit.act("local", "cancel", "j"):
        begun = True
    assert not begun
    assert audit.head.n == 0


def test_many_write_at_once_and_the_chain_holds(tmp_path: Path) -> None:
    """As a daemon and commands beside it, each with a log of its own over the one file."""
    path, n_each = tmp_path / "audit.log", 20

    def write(name: str) -> None:
        audit = Audit(path, lambda: 7.0)
        for _ in range(n_each):
            audit.append(name, "x", "")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert verify(lines_of(path)).n == 4 * n_each
    assert Counter(e.actor for e in read(path)) == dict.fromkeys("abcd", n_each)
    assert parse_head(head_file(path).read_text()) == verify(lines_of(path))


def test_a_line_that_another_writer_broke_off_is_cut_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = Audit(path, lambda: 7.0)
    audit.append("local", "one", "")
    with path.open("ab") as file:
        file.write(b'{"n":2,')
    audit.append("local", "two", "")
    assert verify(lines_of(path), audit.head).n == 3
    assert [e.action for e in read(path)] == ["one", "two", "repair"]


# ------------------------------------------------------------------------------------------------------------- the API


def entries(served: Any) -> list[tuple[str, str, str, str]]:
    """Who did what with which outcome."""
    found = list(read(served.folder / "audit.log"))
    return [(e.actor, e.action, e.what, e.outcome) for e in found if e.of]


def test_the_api_is_audited(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "ops").write_text("secret")
    served = serve(token_file=str(tmp_path / "ops"))
    with httpx.Client(base_url=served.url, headers={"authorization": "Bearer secret"}) as http:
        assert http.post("/v1/jobs", content=JOB, headers=TOML).status_code == 201
        assert http.post("/v1/jobs", content=JOB, headers=TOML).status_code == 409
        assert http.get("/v1/jobs/j").status_code == 200
        assert http.get("/v1/jobs/j/adapter").status_code == 404
        assert http.post("/v1/jobs/j/cancel").status_code == 200
        assert http.post("/v1/tokens").status_code == 409
        assert httpx.post(served.url + "/v1/jobs/j/cancel").status_code == 401
        head = parse_head(http.get("/v1/health").json()["audit"])
    assert entries(served) == [
        ("token:ops", "submit", "j", "201"),
        ("token:ops", "submit", "j", "409"),
        ("token:ops", "export", "j", "404"),
        ("token:ops", "cancel", "j", "200"),
        ("token:ops", "token", "", "409"),
    ]
    assert verify(lines_of(served.folder / "audit.log"), head) == head == Head(10, head.digest)


def test_what_cannot_be_audited_is_not_done(served: Any) -> None:
    served.coordinator.audit._path = Path("/dev/full")
    refused = httpx.post(served.url + "/v1/jobs", content=JOB, headers=TOML)
    assert refused.status_code == 503
    assert "nothing was done" in refused.json()["error"]
    assert served.coordinator.fleet.state.jobs == {}
    assert httpx.get(served.url + "/v1/jobs").status_code == 200, "looking is free"


def test_a_dropped_job_file_is_audited(served: Any, tmp_path: Path) -> None:
    file = tmp_path / "j.toml"
    file.write_text(JOB)
    asyncio.run_coroutine_threadsafe(_take(served.coordinator, file, set()), served.loop).result(30)
    assert entries(served) == [("local", "submit", "j", "done")]


def test_paths_have_names() -> None:
    assert named("POST", "/v1/jobs") == ("submit", "")
    assert named("POST", "/v1/jobs/x/pause") == ("pause", "x")
    assert named("POST", "/v1/enrolments/a/revoke") == ("revoke", "a")
    assert named("DELETE", "/v1/what/ever/it/is") == ("delete", "/v1/what/ever/it/is")


# --------------------------------------------------------------------------------------------------------- the command


def test_verify_and_show(tmp_path: Path) -> None:
    path, run = tmp_path / "audit.log", CliRunner()
    audit = Audit(path, lambda: 7.0)
    with audit.act("token:ops", "cancel", "j"):
        pass
    audit.append("local", "submit", "\x1b[31mk")
    whole = run.invoke(app, ["audit", "verify", str(path)])
    assert whole.exit_code == 0
    assert whole.stdout == f"{path} is whole: 3 lines, head {audit.head}\n"
    assert json.loads(run.invoke(app, ["audit", "verify", str(path), "--json"]).stdout)["lines"] == 3
    shown = run.invoke(app, ["audit", "show", str(path)]).stdout
    assert "broken off" in shown
    assert "\x1b" not in shown
    assert [
        json.loads(line)["n"] for line in run.invoke(app, ["audit", "show", str(path), "--json"]).stdout.split()
    ] == [
        1,
        2,
        3,
    ]
    lines = list(lines_of(path))
    path.write_bytes(b"".join(lines[:2]))
    cut = run.invoke(app, ["audit", "verify", str(path)])
    assert cut.exit_code == 78
    assert "line 3 is missing" in cut.stderr
    path.write_bytes(b"".join([lines[0].replace(b"token:ops", b"token:you"), *lines[1:]]))
    assert "line 1 was changed" in run.invoke(app, ["audit", "verify", str(path)]).stderr
    head_file(path).unlink()
    path.write_bytes(b"".join(lines[:2]))
    assert run.invoke(app, ["audit", "verify", str(path)]).exit_code == 0
    assert "line 3 is missing" in run.invoke(app, ["audit", "verify", str(path), "--head", str(audit.head)]).stderr
