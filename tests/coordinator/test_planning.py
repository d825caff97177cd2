"""When a job is planned anew and when its plan holds, what finished shares teach, and who is left out.  One story each."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import learning
from coordinator.core.choice import Choice, Prediction
from coordinator.core.spec import JobSpec
from coordinator.core.state import Phase
from coordinator.core.survey import UNPROVEN
from protocol.daemon import to_struct
from protocol.errors import BadConfig
from protocol.messages import Allowance, Calibrated, ExecState, Matrix, Report, Surveyed

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play

OPEN: dict[str, Any] = {
    "adapter": {"targets": None, "rank": None, "bits": None},
    "train": {"n_steps": None, "batch": None},
    "round": {"n_rounds": 20, "train_s": None, "survey_s": 200.0},
}
GIB = 2**30
PREDICTED = Prediction(
    step_s=1.0,
    train_s=2.0,
    down_s=0.0,
    up_s=0.0,
    peak_bytes=4 * GIB,
    limit_bytes=8 * GIB,
    up_bytes=100,
    progress=1.0,
)
CHOICE = Choice(ranks={"k": 2, "q": 2}, bits="nf4", n_steps=2, batch=8, predicted=PREDICTED)
MEASURED = Calibrated(device="cpu", probe_rank=2, scores=array("f", [4.0, 2.0, 2.0, 1.0]).tobytes())


def report(memory_gib: float = 8 / 0.9, paused: str = "") -> Report:
    return Report(allowance=Allowance(memory_bytes=int(memory_gib * GIB), paused=paused))


def planned(
    play: Play,
    *,
    left_out: dict[str, str] | None = None,
    train_s: float = 30.0,
    special: dict[str, Choice] | None = None,
) -> Play:
    """Answer the last MakePlan as the planner would."""
    asked = next(w for w in reversed(play.everything) if isinstance(w, act.MakePlan))
    left_out = left_out or {}
    choices = {agent: (special or {}).get(agent, CHOICE) for agent in asked.agents if agent not in left_out}
    answer = ev.PlanReady(
        job=asked.job,
        round=asked.round,
        attempt=asked.attempt,
        choices=choices,
        reason=asked.reason,
        train_s=train_s,
        left_out=left_out,
    )
    return play.feed(answer)


def opened(play: Play, *agents: str, **tables: dict[str, Any]) -> Play:
    """Job j leaves everything open; these agents are surveyed and calibrated, and the first two rounds are over.

    The second round is planned anew because agents then carry the first version.
    """
    tables = {**OPEN, **tables, "round": {**OPEN["round"], **tables.get("round", {})}}
    play.submit("j", **tables).join(*agents)
    play.feed(*(ev.AgentReported(agent=agent, report=report()) for agent in agents))
    play.survey(*agents, calibrated=MEASURED)
    planned(play).trains(*agents)
    play.fold().expects(act.MakePlan, round=2, reason="agents now carry the fleet's adapter too")
    return planned(play).trains(*agents).fold()


def one_round(play: Play, *agents: str, **offer: Any) -> Play:
    return play.trains(*agents, **offer).fold()


# ------------------------------------------------------------------------------------------------------- calibration


def test_an_open_job_asks_for_measurements_and_a_pinned_one_does_not(play: Play) -> None:
    play.submit("j", **OPEN).join("a")
    asked = play.expects(act.Assign, agent="a").plan.calibration
    assert (asked.probe_rank, asked.bits, asked.max_s) == (8, ["none", "int8", "nf4"], 120.0)
    play.submit("k").cancel("j").expects(act.Assign, agent="a", plan={"job": "k", "calibration": None})


def test_pins_narrow_what_is_measured(play: Play) -> None:
    play.submit("j", **{**OPEN, "adapter": {**OPEN["adapter"], "bits": "int8"}, "agents": {"a": {"batch": 4}}}).join(
        "a"
    )
    asked = play.expects(act.Assign, agent="a").plan.calibration
    assert (asked.bits, asked.batches) == (["int8"], [4])


def test_an_agent_that_could_not_measure_takes_part_and_says_why(play: Play) -> None:
    play.submit("j", **OPEN).join("a").survey("a", reason="no bitsandbytes here").expects(act.MakePlan, agents=["a"])
    assert play.job().members["a"].uncalibrated == "no bitsandbytes here"


def test_calibration_must_fit_the_survey() -> None:
    table = {"job": {"name": "j"}, "model": {"source": "toy"}, "round": {"survey_s": 60.0}}
    with pytest.raises(BadConfig, match="survey_s"):
        to_struct(table, JobSpec, "here")
    to_struct({**table, "plan": {"calibrate_s": 20.0}}, JobSpec, "here")


# --------------------------------------------------------------------------------------------- a plan holds, or does not


def test_a_plan_holds_for_several_rounds_and_sets_their_length(play: Play) -> None:
    opened(play, "a", "b").lacks(act.MakePlan)
    assert play.expects(act.Assign, agent="a").plan.stop_after_s == 30.0
    one_round(play, "a", "b").lacks(act.MakePlan).expects(act.Assign, agent="b", plan={"round": 4, "bits": "nf4"})


def test_it_is_renewed_every_few_rounds(play: Play) -> None:
    opened(play, "a", plan={"replan_every": 3})
    one_round(play, "a").lacks(act.MakePlan)
    one_round(play, "a").expects(act.MakePlan, round=5, reason="3 rounds have passed")


def test_a_newcomer_makes_it_anew(play: Play) -> None:
    opened(play, "a").join("b").survey("b", calibrated=MEASURED)
    one_round(play, "a").expects(act.MakePlan, agents=["a", "b"], reason="b came")


def test_a_report_that_comes_after_the_plan_makes_it_anew(play: Play) -> None:
    opened(play, "a").join("b").survey("b", calibrated=MEASURED)
    one_round(play, "a").expects(act.MakePlan, agents=["a", "b"], reason="b came")
    planned(play).trains("a", "b").fold().lacks(act.MakePlan)  # its report was lost, and it takes part without
    play.feed(ev.AgentReported(agent="b", report=report()))
    one_round(play, "a", "b").expects(act.MakePlan, agents=["a", "b"], reason="b reported for the first time")
    planned(play).trains("a", "b").fold().lacks(act.MakePlan)
    play.feed(ev.AgentReported(agent="b", report=report()))
    one_round(play, "a", "b").lacks(act.MakePlan)


def test_a_departure_makes_it_anew(play: Play) -> None:
    opened(play, "a", "b").trains("a", "b").leave("b")
    play.fold().expects(act.MakePlan, agents=["a"], reason="b went")


@pytest.mark.parametrize(
    ("memory_gib", "reason"),
    [(4.0, "a may now use 3.6 GiB, not 8.0"), (16.0, "a may now use 14.4 GiB, not 8.0"), (7.5, "")],
)
def test_other_memory_makes_it_anew_when_it_matters(play: Play, memory_gib: float, reason: str) -> None:
    opened(play, "a").feed(ev.AgentReported(agent="a", report=report(memory_gib)))
    one_round(play, "a")
    asked = [w for w in play.wishes if isinstance(w, act.MakePlan)]
    assert [w.reason for w in asked] == ([reason] if reason else [])


def test_a_plan_for_nothing_measured_is_asked_for_each_round(play: Play) -> None:
    play.ready("a").plan().trains("a")
    play.fold().expects(act.MakePlan, round=2, reason="nothing was measured")


def test_the_pinned_length_of_a_round_wins(play: Play) -> None:
    opened(play, "a", round={"train_s": 77.0})
    assert play.expects(act.Assign, agent="a").plan.stop_after_s == 77.0


# ----------------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize(("train_s", "is_off"), [(2.2, False), (6.0, True), (0.5, True)])
def test_a_step_time_that_is_off_is_learned_and_makes_it_anew(play: Play, train_s: float, *, is_off: bool) -> None:
    opened(play, "a")
    one_round(play, "a", steps=2, train_s=train_s, peak_bytes=4 * GIB)
    assert bool([w for w in play.wishes if isinstance(w, act.MakePlan)]) is is_off
    factor = play.job().members["a"].time_factor
    assert min(1.0, train_s / 2) < factor < max(1.0, train_s / 2)


def test_an_error_that_stays_is_taken_over_once_and_not_again_each_round(play: Play) -> None:
    opened(play, "a", plan={"replan_every": 50})
    for _ in range(8):
        one_round(play, "a", steps=2, train_s=2.3).lacks(act.MakePlan)
    assert play.job().members["a"].time_factor == pytest.approx(1.15, rel=1e-3)


def test_both_agents_of_a_round_teach(play: Play) -> None:
    opened(play, "a", "b").trains("a", steps=2, train_s=2.0, peak_bytes=5 * GIB).trains("b", steps=2, train_s=8.0)
    members = play.job().members
    assert members["a"].memory_factor == pytest.approx(1.25)
    assert (members["a"].time_factor, members["b"].memory_factor) == (1.0, UNPROVEN)
    play.fold().expects(act.MakePlan, reason="a step of b took 4.00 times what was predicted")


def test_running_out_of_memory_bounds_the_next_plan(play: Play) -> None:
    opened(play, "a", "b").trains("b").move("a", ExecState.FAILED, reason="out_of_memory: predicted 4, measured 5")
    play.fold().expects(act.MakePlan, reason="a ran out of memory", agents=["a", "b"])
    assert play.job().members["a"].oom_bytes == 4 * GIB
    bound = msgspec.structs.replace(
        CHOICE, predicted=msgspec.structs.replace(PREDICTED, limit_bytes=3 * GIB, peak_bytes=2 * GIB)
    )
    planned(play, special={"a": bound}).trains("a", "b")
    play.fold().lacks(act.MakePlan)  # that more is free is no news
    play.trains("b").move("a", ExecState.FAILED, reason="died: SIGKILL (out of memory?)")
    assert play.job().members["a"].oom_bytes == 2 * GIB


def test_another_failure_teaches_nothing_about_memory(play: Play) -> None:
    opened(play, "a", "b").trains("b").move("a", ExecState.FAILED, reason="loss is not finite")
    play.fold().lacks(act.MakePlan)
    assert play.job().members["a"].oom_bytes == 0


def test_scores_from_training_move_importance_and_keep_its_sum(play: Play) -> None:
    opened(play, "a")
    offer = play.offer("a")
    scores = {"k": [1.0, 1.0], "q": [9.0, 1.0], "unknown": [5.0]}
    play.feed(ev.UpdateOffered(agent="a", offer=offer), ev.UpdateStored(agent="a", offer=offer, scores=scores))
    found = learning.measured(play.job().members["a"])
    assert found is not None
    now = array("f", found.scores)
    assert sum(now) == pytest.approx(9.0)
    assert now[0] < 4.0  # k lost
    assert now[2] > 2.0  # q won


def test_what_a_round_costs_beside_training_is_learned(play: Play) -> None:
    opened(play, "a")
    began = play.now - play.start
    play.at(began + 10).trains("a", train_s=6.0, steps=2).at(began + 12).fold()
    assert play.job().overhead_s == pytest.approx(0.7 * 6.0, rel=0.5)


# ------------------------------------------------------------------------------------------------------------ left out


def test_an_agent_that_cannot_take_part_hears_why_and_the_others_go_on(play: Play) -> None:
    play.submit("j", **OPEN).join("a", "b").survey("a", "b", calibrated=MEASURED)
    why = "not enough memory: 1.00 GiB are missing"
    planned(play, left_out={"b": why}).expects(act.Withdraw, agent="b", cancel={"reason": why, "round": 1})
    assert play.phase() is Phase.COLLECTING
    play.trains("a").fold()
    planned(play, left_out={"b": why}).trains("a").fold().lacks(act.MakePlan).expects(act.Assign, agent="a")
    play.lacks(act.Assign, agent="b")


def test_nobody_who_can_take_part_ends_the_job_with_the_reasons(play: Play) -> None:
    play.submit("j", **OPEN).join("a").survey("a", calibrated=MEASURED)
    why = "not enough memory: 1.00 GiB are missing"
    planned(play, left_out={"a": why}).expects(act.Finish, phase="failed")
    assert f"a: {why}" in play.job().reason


def test_a_paused_agent_is_not_asked_until_it_may_train(play: Play) -> None:
    play.join("a").feed(ev.AgentReported(agent="a", report=report(paused="outside 20:00-06:00")))
    play.submit("j", **OPEN).lacks(act.Assign)
    play.feed(ev.AgentReported(agent="a", report=report())).expects(act.Assign, agent="a", plan={"purpose": "survey"})


def test_a_survey_of_other_matrices_does_not_confuse_scores(play: Play) -> None:
    opened(play, "a")
    member = play.job().members["a"]
    before = member.calibrated
    other = [Matrix(name="k", d_out=1, d_in=1)]
    member.surveyed = Surveyed(base_sha256=play.job().base_sha256, matrices=other, n_train=1, n_eval=1)
    offer = play.offer("a")
    play.feed(ev.UpdateOffered(agent="a", offer=offer), ev.UpdateStored(agent="a", offer=offer, scores={"k": [1.0]}))
    assert member.calibrated == before


def test_measurements_that_are_no_numbers_do_not_stop_what_training_teaches(play: Play) -> None:
    opened(play, "a")
    member = play.job().members["a"]
    member.calibrated = msgspec.structs.replace(MEASURED, scores=b"odd")
    play.trains("a")
    assert member.calibrated.scores == b"odd"
    offer = play.offer("a")
    stored = ev.UpdateStored(agent="a", offer=offer, scores={"k": [1.0]})
    play.feed(ev.UpdateOffered(agent="a", offer=offer), stored)
    assert member.calibrated.scores == b"odd"
