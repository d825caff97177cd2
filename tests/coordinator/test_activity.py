"""What is said of an agent that does something, or nothing."""

from __future__ import annotations

from typing import Any

from coordinator.activity import NO_JOB, Activity
from coordinator.core import events as ev
from protocol.messages import Allowance, ExecState, Progress, Report

Play = Any
"""The fixture's type; it lives in conftest.py."""


def said(play: Play, agent: str, progress: Progress | None = None) -> str:
    state = play.fleet.state
    return Activity(state.jobs.values()).of(state.agents[agent], progress)


def test_an_agent_without_a_job_says_so(play: Play) -> None:
    play.join("a")
    assert said(play, "a") == NO_JOB
    report = Report(allowance=Allowance(paused="outside the hours"))
    play.feed(ev.AgentReported(agent="a", report=report))
    assert said(play, "a") == "paused: outside the hours"
    play.feed(ev.AgentLeft(agent="a", session=play.fleet.state.agents["a"].session, reason="gone"))
    assert not said(play, "a")


def test_work_is_told_with_its_round_and_step(play: Play) -> None:
    play.submit("j").join("a")
    assert said(play, "a") == "j, survey: asked"
    play.survey("a").plan()
    assert said(play, "a") == "j, round 1: offered"
    progress = Progress(job="j", round=1, phase="training", step=3, n_steps=9)
    assert said(play, "a", progress) == "j, round 1: training 3/9"
    assert said(play, "a", Progress(job="other", round=1, phase="training", step=3, n_steps=9)) == "j, round 1: offered"


def test_who_is_idle_is_told_why(play: Play) -> None:
    play.submit("j", head={"only": ["a", "b", "c", "d"]}).join("a", "b", "c", "z").survey("a", "b")
    play.move("c", ExecState.FAILED, reason="no data set 'default' here").plan()
    play.trains("a")
    assert said(play, "a") == "j: done with round 1, waits for 1 more"
    assert said(play, "c") == "j: no data set 'default' here"
    assert said(play, "z") == "j: not among its job.only"
    play.feed(ev.AgentJoined(agent="d", session="d" * 16, methods=["other"]))
    assert said(play, "d") == "j: this agent does not have the method 'qlora'"
    play.move("b", ExecState.FAILED, reason="out_of_memory: 1 GB")
    assert said(play, "a") == "j: done with round 1, which is being aggregated"
    assert said(play, "b") == "j: FAILED: out_of_memory: 1 GB"
