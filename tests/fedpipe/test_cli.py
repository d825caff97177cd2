"""The `fedpipe` command against a real coordinator on a real port: what people see, what programs read, how it ends."""

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from coordinator.core.state import Phase
from coordinator.plan_views import AgentPlan, PlanView
from coordinator.views import AgentView, JobShort, JobView
from fedpipe.__main__ import app
from fedpipe.broker import free_port
from fedpipe.client import Coordinator
from fedpipe.watching import watch
from protocol.errors import BadConfig, Unavailable
from protocol.messages import ExecState

Served = Any
Run = Callable[..., Result]

JOB = """
[job]
name = "j"
[model]
source = "toy"
[adapter]
update_dtype = "fp32"
model_dtype = "fp32"
[round]
n_rounds = 1
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


@pytest.fixture
def run(served: Served) -> Run:
    """Run `fedpipe` with these arguments against the served coordinator."""

    def fedpipe(*arguments: object, url: str = served.url) -> Result:
        env = {"FEDPIPE_URL": url, "FEDPIPE_TOKEN_FILE": "", "COLUMNS": "100"}
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)

    return fedpipe


class Lines(io.StringIO):
    """What is written, and whether anything was."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str, /) -> int:
        n = super().write(text)
        self.written.set()
        return n


def completed(served: Served, run: Run, job_file: Path) -> None:
    assert run("submit", job_file).exit_code == 0
    served.join("a")
    served.survey("a")
    served.run_round("a", loss=3.0)
    served.finish("a", loss=1.5)


# ---------------------------------------------------------------------------------------------------------- for people


def test_a_job_from_submission_to_its_end(served: Served, run: Run, job_file: Path) -> None:
    submitted = run("submit", job_file)
    assert (submitted.exit_code, submitted.stdout) == (0, "j is submitted: fedpipe watch j\n")
    assert "waiting, round 1 of 1" in run("jobs").stdout
    served.join("a")
    served.survey("a")
    served.say("a", step=7)
    served.move("a", ExecState.TRAINING)
    assert "7/50" in run("show", "j").stdout
    agents = run("agents").stdout
    assert "online" in agents
    assert "j: training 7/50" in agents
    served.run_round("a", loss=3.0)
    served.finish("a", loss=1.5)
    shown = run("show", "j").stdout
    assert "held-out loss 3.000 → 1.500" in shown
    assert "aggregated" in shown
    assert shown.splitlines()[-1].split()[:3] == ["1", "1", "8"]  # version, round, rank
    watched = run("watch", "j")
    assert (watched.exit_code, watched.stdout) == (0, "j: completed\n")


def test_a_plan_is_shown_for_the_fleet_and_for_one_agent(
    served: Served, run: Run, job_file: Path, tmp_path: Path
) -> None:
    run("submit", job_file)
    served.join("a")
    early = run("plan", "show", "j")
    assert (early.exit_code, len(early.stderr.splitlines())) == (78, 1)
    assert "has no plan yet" in early.stderr
    served.survey("a")
    shown = run("plan", "show", "j", "--svg", tmp_path / "plan.svg")
    assert (shown.exit_code, "plan made for round 1" in shown.stdout) == (0, True), shown.output
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    one = run("plan", "show", "j", "--agent", "a")
    assert (one.exit_code, "rank of each layer's matrices" in one.stdout) == (0, True)
    view = msgspec.json.decode(run("plan", "show", "j", "--json").stdout, type=PlanView)
    told = msgspec.json.decode(run("plan", "show", "j", "--agent", "a", "--json").stdout, type=AgentPlan)
    assert (view.job, view.agents["a"]) == ("j", told)
    for wrong, word in ((["--agent", "b"], "it is for a"), (["--svg", tmp_path], "cannot be written")):
        result = run("plan", "show", "j", *wrong)
        assert (result.exit_code, len(result.stderr.splitlines())) == (78, 1), result.output
        assert word in result.stderr


def test_a_job_is_cancelled_and_whoever_watches_it_fails(served: Served, run: Run, job_file: Path) -> None:
    run("submit", job_file)
    cancelled = run("cancel", "j")
    assert (cancelled.exit_code, cancelled.stdout) == (0, "j: cancelled: cancelled by the operator\n")
    assert served.job().phase is Phase.CANCELLED
    assert run("watch", "j").exit_code == 1
    again = run("cancel", "j")
    assert (again.exit_code, again.stderr) == (78, "fedpipe: job 'j' has ended already: cancelled\n")


def test_whoever_watches_a_paused_job_sees_who_paused_it_and_sees_it_to_its_end(
    served: Served, run: Run, job_file: Path
) -> None:
    run("submit", job_file)
    paused = run("pause", "j", "--reason", "heat")
    assert paused.stdout == "j: paused before round 1 of 1, by local: heat\n"
    assert "paused before round 1 of 1, by local: heat" in run("show", "j").stdout
    lines = Lines()
    with Coordinator(served.url) as coordinator:
        watching = threading.Thread(target=watch, args=(coordinator, "j", Console(file=lines, width=100)))
        watching.start()
        assert lines.written.wait(30)
        assert run("cancel", "j").stdout == "j: cancelled: cancelled by the operator\n"
        watching.join(30)
    assert lines.getvalue().splitlines() == [
        "j: paused before round 1 of 1, by local: heat",
        "j: cancelled: cancelled by the operator",
    ]


def test_the_live_picture_ends_with_the_job(served: Served, run: Run, job_file: Path) -> None:
    run("submit", job_file)
    served.join("a")
    served.survey("a")
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)
    seen: list[JobView] = []

    def follow() -> None:
        with Coordinator(served.url) as coordinator:
            seen.append(watch(coordinator, "j", console))

    watching = threading.Thread(target=follow)
    watching.start()
    served.run_round("a", loss=3.0)
    served.finish("a", loss=1.5)
    watching.join(30)
    assert seen[0].phase is Phase.COMPLETED
    assert isinstance(console.file, io.StringIO)
    assert "held-out loss 3.000 → 1.500" in console.file.getvalue()


# -------------------------------------------------------------------------------------------------------- for programs


def test_everything_is_json_when_asked(served: Served, run: Run, job_file: Path, tmp_path: Path) -> None:
    assert json.loads(run("submit", job_file, "--json").stdout) == {"name": "j"}
    served.join("a")
    served.survey("a")
    served.run_round("a", loss=3.0)
    served.finish("a", loss=1.5)
    jobs = msgspec.json.decode(run("jobs", "--json").stdout, type=list[JobShort])
    assert [(job.name, job.phase, job.version) for job in jobs] == [("j", Phase.COMPLETED, 1)]
    assert msgspec.json.decode(run("show", "j", "--json").stdout, type=JobView).evaluations[1]["a"].loss == 1.5
    assert msgspec.json.decode(run("agents", "--json").stdout, type=list[AgentView])[0].id == "a"
    exported = json.loads(run("export", "j", "--out", tmp_path / "x", "--json").stdout)
    assert exported == {"job": "j", "version": 1, "folder": str(tmp_path / "x"), "merged": False}
    assert json.loads(run("version", "--json").stdout)["version"]


def test_watching_as_json_tells_every_event_to_the_end(served: Served, run: Run, job_file: Path) -> None:
    run("submit", job_file)
    results: list[Result] = []
    watching = threading.Thread(target=lambda: results.append(run("watch", "j", "--json")))
    watching.start()
    served.until_listened()
    served.join("a")
    served.survey("a")
    served.run_round("a", loss=3.0)
    served.finish("a", loss=1.5)
    watching.join(30)
    events = [json.loads(line) for line in results[0].stdout.splitlines()]
    assert results[0].exit_code == 0
    assert [e["phase"] for e in events if e["event"] == "job"][-2:] == ["evaluating", "completed"]
    assert [e["record"]["outcome"] for e in events if e["event"] == "round"] == ["aggregated", "completed"]
    finished = run("watch", "j", "--json")
    assert [json.loads(line)["event"] for line in finished.stdout.splitlines()] == ["listening"]


# -------------------------------------------------------------------------------------------------------------- export


def test_an_export_is_a_peft_folder(served: Served, run: Run, job_file: Path, tmp_path: Path) -> None:
    completed(served, run, job_file)
    out = tmp_path / "adapter"
    exported = run("export", "j", "--version", 1, "--out", out)
    assert exported.exit_code == 0, exported.stderr
    assert "version 1 of j is in" in exported.stdout
    arrays = load_file(out / "adapter_model.safetensors")
    b, a = (arrays[f"base_model.model.model.q.lora_{part}.weight"] for part in "BA")
    factors = served.factors("a")["model.q"]
    np.testing.assert_allclose(b @ a, factors.b @ factors.a, rtol=1e-4, atol=1e-5)
    missing = run("export", "j", "--version", 5, "--out", tmp_path / "five")
    assert (missing.exit_code, missing.stderr) == (78, "fedpipe: no version 5: there are 1 to 1\n")
    assert not (tmp_path / "five").exists()


def test_an_export_is_merged_into_its_base(served: Served, run: Run, job_file: Path, tmp_path: Path) -> None:
    completed(served, run, job_file)
    base, out = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    weights = {f"{m.name}.weight": np.ones((m.d_out, m.d_in), np.float32) for m in served.matrices}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert run("merge", "j", "--base", base, "--out", out).exit_code == 0
    merged = load_file(out / "model.safetensors")
    for name, factors in served.factors("a").items():
        np.testing.assert_allclose(merged[f"{name}.weight"], 1 + factors.b @ factors.a, rtol=1e-4, atol=1e-5)
    assert json.loads((out / "fedpipe.json").read_text())["job"] == "j"
    alone = run("merge", "j")
    assert (alone.exit_code, "--base" in alone.stderr) == (2, True)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "command",
    [
        ["jobs"],
        ["agents"],
        ["show", "j"],
        ["watch", "j"],
        ["cancel", "j"],
        ["export", "j"],
        ["merge", "j", "--base", "b"],
        ["plan", "show", "j"],
    ],
)
def test_without_a_coordinator_every_command_says_what_to_do(run: Run, command: list[str]) -> None:
    result = run(*command, url=f"http://127.0.0.1:{free_port()}")
    assert (result.exit_code, result.stdout) == (69, "")
    assert len(result.stderr.splitlines()) == 1
    assert "fedpipe-coordinator run" in result.stderr
    assert "--url" in result.stderr


def test_what_cannot_be_is_refused_in_one_line(run: Run, job_file: Path, tmp_path: Path) -> None:
    job_file.write_text(JOB + "n_steps = 5\n")
    refused: list[tuple[list[object], str]] = [
        (["submit", job_file], "n_steps"),
        (["submit", tmp_path / "none.toml"], "none.toml"),
        (["show", "nix"], "there is no job 'nix'"),
        (["show", "../fleet"], "there is nothing at '/v1/jobs/../fleet'"),
        (["jobs", "--url", "coordinator:8470"], "is not a url"),
        (["jobs", "--token-file", tmp_path / "none"], "token file"),
    ]
    for arguments, word in refused:
        result = run(*arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (78, 1), result.output
        assert word in result.stderr


def test_a_server_that_is_no_coordinator_is_said_so(serve: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    served = serve(token_file=str(tmp_path / "token"))
    with pytest.raises(BadConfig, match="FEDPIPE_TOKEN_FILE"), Coordinator(served.url) as stranger:
        stranger.jobs()
    with Coordinator(served.url, tmp_path / "token") as known:
        assert known.jobs() == []
    with (
        Coordinator(served.url + "/elsewhere", tmp_path / "token") as lost,
        pytest.raises(BadConfig, match="there is nothing at"),
    ):
        lost.jobs()
    served.close()
    with Coordinator(served.url, tmp_path / "token") as late, pytest.raises(Unavailable, match="no coordinator at"):
        late.jobs()
