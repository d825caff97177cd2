"""The picture of a job as text: everything a person must know is legible, at 100 columns and at 80."""

import io
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from coordinator.core.state import Phase, RoundRecord, ShareRecord
from coordinator.figures import duration_text, size_text, sparkline
from coordinator.past import evaluations
from coordinator.views import AgentView, BrokerView, FleetView, JobView, MemberView, RoundView, ShareView
from fedpipe.live import render
from fedpipe.tables import agents_table
from protocol.messages import Allowance, Evaluated, Gpu, Progress, Report

NOW = 10_000.0
AGENTS = ("anna", "berta", "clara")


def record(number: int, loss: float, outcome: str = "aggregated", attempt: int = 0) -> RoundRecord:
    measured = Evaluated(version=number - 1, n_samples=40, n_tokens=900, loss=loss + 0.5)
    share = ShareRecord(
        state="DONE", samples=1200, loss=loss, bytes_up=1_234_567, bytes_down=56_789, wall_s=71.0, evaluated=measured
    )
    return RoundRecord(
        round=number,
        attempt=attempt,
        purpose="train",
        version=number - 1,
        outcome=outcome,
        opened_at=NOW - 600,
        wall_s=75.0,
        loss=loss,
        shares=dict.fromkeys(AGENTS, share),
    )


def training(step: int = 12) -> dict[str, ShareView]:
    return {
        "anna": ShareView(
            state="TRAINING",
            n_steps=20,
            samples=8 * step,
            loss=3.25,
            bytes_down=1_234_567,
            wall_s=45.0,
            progress=Progress(job="job", round=3, phase="training", step=step, n_steps=20),
        ),
        "berta": ShareView(
            state="UPLOADING", samples=160, loss=3.125, bytes_up=600_000, size_up=1_200_000, bytes_down=5, wall_s=99.0
        ),
        "clara": ShareView(state="DONE", samples=160, loss=3.5, bytes_up=1_200_000, size_up=1_200_000, wall_s=3700.0),
    }


def job(shares: dict[str, ShareView] | None = None, **changed: Any) -> JobView:
    history = [record(1, 5.0), record(2, 4.0, "quorum: 1 of the 2 updates needed"), record(2, 4.0, attempt=1)]
    found = training() if shares is None else shares
    view = JobView(
        now=NOW,
        name="kitchen-recipes",
        phase=Phase.COLLECTING,
        reason="",
        text="collecting, round 3 of 5",
        method="qlora",
        base="/a/long/way/to/some/model/with/a/long-name",
        base_sha256="",
        data="default",
        round=2,
        n_rounds=5,
        attempt=0,
        version=2,
        since=NOW,
        submitted_at=NOW - 3725,
        members=dict.fromkeys(found, MemberView(survey="DONE", n_train=9)),
        current=RoundView(
            number=3,
            attempt=0,
            purpose="train",
            opened_at=NOW - 50,
            stop_at=NOW + 50,
            close_at=NOW + 60,
            target=3,
            quorum=2,
            shares=found,
        ),
        history=history,
        evaluations=evaluations(history),
    )
    return msgspec.structs.replace(view, **changed)


def fleet(**changed: Any) -> FleetView:
    broker = BrokerView(address="broker.example:8883", connected=True)
    agents = [AgentView(id=name, online=True, since=0.0, task="kitchen-recipes") for name in AGENTS]
    view = FleetView(now=NOW, fleet="main", session="s", broker=broker, agents=agents)
    return msgspec.structs.replace(view, **changed)


def text(view: JobView, seen: FleetView | None = None, width: int = 100, **limits: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(render(view, seen or fleet(), NOW, **limits))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def line(lines: list[str], word: str) -> str:
    return next(found for found in lines if word in found)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_every_figure_is_legible(width: int) -> None:
    lines = text(job(), width=width)
    assert max(map(len, lines)) <= width
    head = "\n".join(lines[:3])
    for word in ("kitchen-recipes", "fleet main", "collecting, round 3 of 5", "1:02:05 elapsed", "2 of 5 rounds"):
        assert word in head
    for name, figures in {
        "anna": "training 12/20 96 3.250 1.2 MB 0:45 4.500",
        "berta": "uploading 50% sent 160 3.125 600 kB 5 B 1:39 4.500",
        "clara": "done done 160 3.500 1.2 MB 1:01:40 4.500",
    }.items():
        words = line(lines, name).replace("━", " ").replace("╸", " ").split()
        assert words == [name, *figures.split()]


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/a/long/way/to/some/model/with/a/long-name", "on long-name"),
        ("./models/mine/", "on mine"),
        ("org/model", "on org/model"),
        ("org/" + "m" * 60, "on …mmm"),
    ],
)
def test_a_base_in_a_folder_is_shown_by_its_name(base: str, shown: str) -> None:
    assert shown in "\n".join(text(job(base=base)))


def test_the_way_of_the_held_out_loss_is_shown() -> None:
    assert "held-out loss 5.500 → 4.500 █▁" in "\n".join(text(job()))


def test_losses_are_compared_over_the_agents_that_have_both() -> None:
    def at(version: int, **losses: float) -> dict[str, Evaluated]:
        return {a: Evaluated(version=version, n_samples=1, n_tokens=1, loss=loss) for a, loss in losses.items()}

    came_and_went = {0: at(0, anna=4.0, berta=6.0), 1: at(1, anna=3.5, clara=1.0), 2: at(2, anna=3.0, clara=1.0)}
    assert "held-out loss 4.000 → 3.000 █▅▁" in "\n".join(text(job(evaluations=came_and_went)))
    all_others = {0: at(0, anna=4.0), 1: at(1, clara=1.0)}
    assert "held-out loss 1.000 " in "\n".join(text(job(evaluations=all_others)))


def test_ended_rounds_with_failed_attempts() -> None:
    lines = text(job())
    first, failed, second = lines[lines.index(line(lines, "outcome")) + 1 :][:3]
    assert first.split() == ["1", "aggregated", "3/3", "3,600", "5.000", "3.7", "MB", "170", "kB", "1:15", "4.500"]
    assert failed.split()[:3] == ["2", "quorum:", "1"]
    assert "4.500" not in failed
    assert second.split()[:2] == ["2.2", "aggregated"]


def test_the_picture_keeps_its_shape_while_agents_train() -> None:
    assert len({len(text(job(training(step)))) for step in range(21)}) == 1
    columns = {line(text(job(training(step))), "anna").index("3.250") for step in range(1, 21)}
    assert len(columns) == 1


def test_who_is_out_or_gone_is_said_with_the_reason() -> None:
    members = {
        "anna": MemberView(survey="DONE"),
        "berta": MemberView(survey="DONE"),
        "dora": MemberView(survey="FAILED", excluded="no data set 'default' here"),
        "emil": MemberView(survey="PREPARING"),
    }
    shares = training() | {"berta": ShareView(state="TIMED_OUT", reason="not in time: the round closed")}
    del shares["clara"]
    away = AgentView(id="anna", online=False, since=0.0, reason="the connection was lost")
    busy = AgentView(id="emil", online=True, since=0.0, task="kitchen-recipes", progress=Progress(phase="loading"))
    lines = text(job(shares, members=members), fleet(agents=[away, busy]))
    assert "training" in line(lines, "anna")
    assert "timed out" in line(lines, "berta")
    assert "out" in line(lines, "dora").split()
    assert line(lines, "emil").split() == ["emil", "survey", "loading"]
    notes = lines[-3:]
    assert notes == [
        "anna: offline: the connection was lost",
        "berta: not in time: the round closed",
        "dora: no data set 'default' here",
    ]


def test_measuring_and_pausing_look_different_from_training() -> None:
    members = {
        "anna": MemberView(survey="DONE", uncalibrated="not enough memory"),
        "berta": MemberView(survey="DONE"),
        "emil": MemberView(survey="PREPARING"),
    }
    held = Progress(job="kitchen-recipes", round=3, phase="paused", step=12, n_steps=20)
    shares = {name: msgspec.structs.replace(training()["anna"], progress=held) for name in ("anna", "berta")}
    shares["berta"] = msgspec.structs.replace(shares["berta"], state="PREPARING")
    at_night = Report(allowance=Allowance(device="RTX", memory_bytes=6 * 10**9, paused="not between 8:00 and 18:00"))
    resting = AgentView(id="anna", online=True, since=0.0, task="kitchen-recipes", report=at_night)
    measuring = Progress(job="kitchen-recipes", phase="calibrating", step=3, n_steps=9)
    busy = AgentView(id="emil", online=True, since=0.0, task="kitchen-recipes", progress=measuring)
    lines = text(job(shares, members=members), fleet(agents=[resting, busy]))
    assert line(lines, "anna").replace("━", " ").replace("╸", " ").split()[:3] == ["anna", "paused", "12/20"]
    assert line(lines, "berta").split()[:2] == ["berta", "paused"]
    assert line(lines, "emil").replace("━", " ").replace("╸", " ").split() == ["emil", "calibrating", "3/9"]
    assert lines[-2:] == [
        "anna: paused: not between 8:00 and 18:00",
        "anna: not calibrated: not enough memory",
    ]
    console = Console(width=160, file=io.StringIO())
    console.print(agents_table([resting, busy], NOW))
    assert isinstance(console.file, io.StringIO)
    listed = " ".join(console.file.getvalue().split())
    assert "online, paused: not between 8:00 and 18:00" in listed
    assert "6.0 GB of RTX" in listed


def test_what_was_planned_and_not_trained_is_told_per_round_and_in_all() -> None:
    half = record(1, 5.0)
    shares = {a: msgspec.structs.replace(s, planned_samples=1600) for a, s in half.shares.items()}
    lines = text(job(history=[msgspec.structs.replace(half, shares=shares), record(2, 4.0)]))
    first, second, caption = lines[lines.index(line(lines, "outcome")) + 1 :][:3]
    assert first.split()[-2:] == ["25", "%"]
    assert second.split()[-1] == "1:15"
    assert caption.strip() == "undone: under-training, 25 % of all planned samples so far"
    assert "undone" not in "\n".join(text(job()))


def test_a_lost_broker_cannot_be_overlooked() -> None:
    lines = text(job(), fleet(broker=BrokerView(address="b:1", connected=False, fault="connection refused")))
    assert "no broker" in lines[0]
    assert lines[-1] == "no broker: connection refused"


def test_of_many_agents_those_at_work_are_shown_and_the_rest_is_counted() -> None:
    shares = {f"a{i:03}": ShareView(state="DONE" if i % 50 else "TRAINING") for i in range(200)}
    lines = text(job(shares), max_agents=6)
    shown = [found for found in lines if found.startswith("a") and found[1:4].isdigit()]
    assert len(shown) == 6
    assert sum("training" in found for found in shown) == 4
    assert "and 194 more: 194 DONE" in lines


@pytest.mark.parametrize(
    ("phase", "reason"),
    [(Phase.COMPLETED, ""), (Phase.FAILED, "no_agents: 3 needed for 3600 s"), (Phase.CANCELLED, "x")],
)
def test_an_ended_job_keeps_what_its_agents_did_last(phase: Phase, reason: str) -> None:
    said = f"{phase}: {reason}" if reason else str(phase)
    ended = job(phase=phase, text=said, current=None, ended_at=NOW - 3600.0)
    lines = text(ended, fleet(agents=[]))
    assert said in "\n".join(lines)
    assert "2:05 elapsed" in lines[1]
    assert "1.2 MB" in line(lines, "berta")


def test_names_of_any_length_and_markup_do_no_harm() -> None:
    name = "x" * 64
    shares = {name: ShareView(state="FAILED", reason="[red]boom[/] " + "y" * 500)}
    lines = text(job(shares), width=80)
    assert max(map(len, lines)) <= 80
    assert any("[red]boom[/]" in found for found in lines)


def test_what_an_agent_says_cannot_steer_the_terminal() -> None:
    evil = "\x1b]0;pwned\x07\x1b[2J\r\n\u202eevil"
    shares = {
        "anna": ShareView(state="PREPARING", progress=Progress(phase=evil[:32])),
        "b": ShareView(state="FAILED", reason=evil),
    }
    away = AgentView(id="anna", online=False, since=0.0, reason=evil)
    ended = job(shares, text=evil, base=evil, history=[record(1, 1.0, evil)])
    broken = fleet(agents=[away], broker=BrokerView(address="b:1", connected=False, fault=evil))
    console = Console(width=100, file=io.StringIO())
    console.print(render(ended, broken, NOW))
    console.print(agents_table([away, AgentView(id="b", online=True, since=0.0, report=gpu(evil + "[/red]"))], NOW))
    assert isinstance(console.file, io.StringIO)
    assert all(c.isprintable() or c == "\n" for c in console.file.getvalue())
    assert "[/red]" in console.file.getvalue()


def gpu(name: str) -> Report:
    return Report(gpus=[Gpu(index=0, name=name, total_bytes=2 * 10**9, free_bytes=10**9)], n_cpus=4)


def test_a_job_without_anything_yet() -> None:
    empty = job(
        {}, current=None, history=[], evaluations={}, round=0, text="waiting, round 1 of 5", phase=Phase.WAITING
    )
    lines = text(empty)
    assert "waiting, round 1 of 5" in lines[1]
    assert lines[-1] == "no agent is in the job yet"


@given(st.floats(min_value=1, max_value=1e14), st.floats(min_value=1, max_value=1e14))
def test_sizes_are_short_and_keep_their_order_of_magnitude(a: float, b: float) -> None:
    units = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    value, unit = size_text(a).split()
    assert len(size_text(a)) <= 6
    assert float(value) * units[unit] == pytest.approx(a, rel=0.06, abs=0.51)
    if a > 2 * b:
        assert size_text(a) != size_text(b)


def test_durations() -> None:
    assert [duration_text(s) for s in (-1, 0, 59.6, 3599, 3600, 90_061)] == [
        "0:00",
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "1 d 1:01",
    ]


@given(st.lists(st.floats(min_value=-1e6, max_value=1e6), max_size=40))
def test_a_sparkline_is_as_long_as_its_values_and_marks_the_lowest(values: list[float]) -> None:
    line = sparkline(values)
    assert len(line) == min(24, len(values))
    if values:
        assert line[values[-24:].index(min(values[-24:]))] == "▁"
