"""Transcripts of jobs: events in, actions out, one story each.  Times are seconds after the start of the story."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.choice import Choice
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.spec import JobSpec, Rounds
from coordinator.core.state import Phase
from protocol.errors import BadConfig
from protocol.messages import ExecState

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play


# ------------------------------------------------------------------------------------------------------- the good day


def test_two_rounds_and_a_final_evaluation(play: Play) -> None:
    play.submit(round={"min_agents": 2}).expects(act.Announce, card={"phase": "waiting", "n_rounds": 2})
    play.join("a", "b").expects(act.Assign, agent="a", plan={"purpose": "survey", "round": 0, "stop_after_s": 50.0})
    play.survey("a").lacks(act.MakePlan)
    play.survey("b").expects(act.MakePlan, round=1, attempt=0, agents=["a", "b"])
    for number in (1, 2):
        plan = play.plan().expects(act.Assign, agent="b").plan
        assert (plan.purpose, plan.round, plan.version) == ("train", number, number - 1)
        assert (plan.stop_after_s, plan.ttl_s) == (100.0, 120.0)
        play.move("a", ExecState.ACCEPTED).move("a", ExecState.TRAINING)
        offer = play.offer("a", samples=3)
        play.offers("a", offer).expects(act.Fetch, agent="a", ranks={"k": 2, "q": 2})
        stored = play.feed(ev.UpdateStored(agent="a", offer=offer))
        stored.expects(act.Acknowledge, agent="a", xfer=offer.blob.xfer)
        stored.expects(act.Withdraw, agent="a", cancel=None)
        fold = play.trains("b", samples=9).expects(act.Aggregate, round=number, version=number)
        assert [(c.agent, c.round, c.weight) for c in fold.contributions] == [("a", number, 3.0), ("b", number, 9.0)]
        play.fold().expects(act.Record, record={"round": number, "outcome": "aggregated", "loss": 2.0})
        play.expects(act.Serve, blob={"size": 1000})
    play.expects(act.Assign, agent="a", plan={"purpose": "evaluate", "round": 3, "version": 2, "train": None})
    play.evaluates("a").lacks(act.Finish)
    play.evaluates("b", loss=1.0).expects(act.Finish, phase="completed", reason="")
    record = play.expects(act.Record, record={"purpose": "evaluate", "outcome": "completed"}).record
    assert {a: s.evaluated.loss for a, s in record.shares.items()} == {"a": 1.5, "b": 1.0}
    assert play.phase() is Phase.COMPLETED
    assert play.free()
    assert play.fleet.wake_at is None


def test_the_order_of_arrival_does_not_change_the_fold(play: Play) -> None:
    play.ready("a", "b", "c").plan()
    opened = encode_state(play.fleet.state)
    offers = {a: play.offer(a) for a in "abc"}
    folds = []
    for order in itertools.permutations("abc"):
        fleet = Fleet(decode_state(opened))
        wishes = [w for a in order for w in fleet.handle(ev.UpdateStored(agent=a, offer=offers[a]), play.now)]
        folds.append(next(w for w in wishes if isinstance(w, act.Aggregate)))
    assert [c.agent for c in folds[0].contributions] == ["a", "b", "c"]
    assert all(fold == folds[0] for fold in folds)


def test_the_draw_of_agents_is_fixed_by_seed_round_and_attempt(play: Play) -> None:
    agents = tuple("abcdefgh")
    chosen = play.ready(*agents, round={"n_agents": 3}).expects(act.MakePlan).agents
    assert len(chosen) == 3
    assert set(chosen) < set(agents)
    other = type(play)().ready(*agents, round={"n_agents": 3}).expects(act.MakePlan).agents
    assert other == chosen
    seeded = {
        tuple(type(play)().ready(*agents, head={"seed": s}, round={"n_agents": 3}).expects(act.MakePlan).agents)
        for s in range(8)
    }
    assert len(seeded) > 1


# ------------------------------------------------------------------------------------------------ quorum and attempts


def test_with_a_quorum_the_deadline_closes_the_round_without_the_straggler(play: Play) -> None:
    play.ready("a", "b").plan().at(30).trains("a").lacks(act.Aggregate)
    assert play.fleet.wake_at == play.now + 90.0
    closed = play.ticks(120.0)
    fold = closed.expects(act.Aggregate)
    assert [c.agent for c in fold.contributions] == ["a"]
    cancel = closed.expects(act.Withdraw, agent="b").cancel
    assert "the round closed 120 s after it opened" in cancel.reason
    assert play.fold().expects(act.Record).record.shares["b"].state == "TIMED_OUT"


def test_below_the_quorum_finished_shares_are_kept_and_only_the_others_are_asked_again(play: Play) -> None:
    play.ready("a", "b", "c", round={"quorum_ratio": 0.6}).plan().trains("a")
    again = play.ticks(120.0)
    again.expects(act.Record, record={"attempt": 0, "outcome": "quorum: 1 of the 2 updates needed"})
    again.expects(act.MakePlan, round=1, attempt=1, agents=["b", "c"])
    play.plan().lacks(act.Assign, agent="a")
    play.expects(act.Assign, agent="b", plan={"round": 1, "attempt": 1})
    fold = play.trains("b", "c").expects(act.Aggregate, attempt=1)
    assert [(c.agent, c.attempt) for c in fold.contributions] == [("a", 0), ("b", 1), ("c", 1)]


def test_too_many_attempts_fail_the_job_and_say_why_each_agent_failed(play: Play) -> None:
    play.ready("a", "b", round={"max_attempts": 2})
    for _ in range(2):
        play.plan().move("a", ExecState.FAILED, reason="out of memory").move("b", ExecState.REJECTED, reason="busy")
    finish = play.expects(act.Finish, phase="failed")
    assert finish.reason.startswith("quorum: 0 of the 1 updates needed in round 1 after 2 attempts")
    assert "a: out of memory; b: busy" in finish.reason
    assert play.free()


def test_an_update_of_the_failed_attempt_counts_in_the_next_one(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan().trains("a")
    tardy = play.offer("b")
    play.ticks(120.0).plan().expects(act.Assign, agent="b", plan={"attempt": 1})
    play.offers("b", tardy).expects(act.Fetch, agent="b")
    fold = play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Aggregate, attempt=1)
    assert [(c.agent, c.attempt, c.weight) for c in fold.contributions] == [("a", 0, 4.0), ("b", 0, 4.0)]


@pytest.mark.parametrize("seconds", [120.0, 130.0])
def test_what_the_failed_attempt_lacked_comes_in_before_the_next_one_opens(play: Play, seconds: float) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan().trains("a")
    tardy = play.offer("b")
    play.ticks(seconds).offers("b", tardy).expects(act.Fetch, agent="b")
    play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Acknowledge, agent="b")
    fold = play.plan().expects(act.Aggregate, round=1, attempt=1)
    assert [c.agent for c in fold.contributions] == ["a", "b"]


def test_what_the_failed_attempt_lacked_comes_in_while_nobody_is_there(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan().trains("a")
    tardy = play.offer("b")
    play.leave("b").ticks(15.0)
    assert play.phase() is Phase.WAITING
    fold = play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Aggregate)
    assert [c.agent for c in fold.contributions] == ["a", "b"]


def test_over_selection_closes_at_the_target_and_supersedes_the_rest(play: Play) -> None:
    play.ready("a", "b", "c", round={"n_agents": 2, "over_select_ratio": 1.5, "late": "drop"})
    play.expects(act.MakePlan, agents=["a", "b", "c"])
    play.plan().trains("c").lacks(act.Aggregate)
    closed = play.trains("a")
    assert [c.agent for c in closed.expects(act.Aggregate).contributions] == ["a", "c"]
    closed.expects(act.Withdraw, agent="b", cancel={"reason": "superseded: enough others answered first"})
    assert play.fold().expects(act.Record).record.shares["b"].state == "SUPERSEDED"


# --------------------------------------------------------------------------------------------------------------- ends


def test_a_planner_without_a_plan_fails_the_job(play: Play) -> None:
    play.ready("a").feed(ev.PlanFailed(job="j", round=1, attempt=0, reason="nothing fits 2 GiB"))
    play.expects(act.Finish, phase="failed", reason="plan: nothing fits 2 GiB")


def test_a_plan_for_too_few_agents_fails_the_job_instead_of_asking_for_ever(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan(without=("b",))
    assert play.expects(act.Finish).reason.startswith("plan: 1 of the 2 agents needed can take part")
    alone = type(play)().ready("a").plan(without=("a",))
    assert alone.expects(act.Finish).reason.startswith("plan: 0 of the 1 agents needed can take part")


def test_a_fold_that_fails_fails_the_job_and_is_on_record(play: Play) -> None:
    play.ready("a").plan().trains("a")
    play.feed(ev.AggregateFailed(job="j", round=1, attempt=0, reason="no space left on the device"))
    play.expects(act.Record, record={"outcome": "aggregate: no space left on the device"})
    play.expects(act.Finish, phase="failed", reason="aggregate: no space left on the device")
    assert play.free()


SCENES = ("empty", "survey", "planning", "collecting", "aggregating", "waiting", "evaluating")


def _stage(play: Play, scene: str) -> None:
    play.submit(round={"n_rounds": 1})
    if scene == "empty":
        return
    play.join("a", "b")
    if scene == "survey":
        return
    play.survey("a", "b")
    if scene == "planning":
        return
    play.plan()
    if scene == "collecting":
        play.move("a", ExecState.TRAINING)
        return
    if scene == "waiting":
        play.move("a", ExecState.FAILED).leave("b").ticks(10.0).leave("a")
        play.plan()
        return
    play.trains("a", "b")
    if scene == "evaluating":
        play.fold()


@pytest.mark.parametrize("scene", SCENES)
def test_a_cancel_frees_everyone_in_every_phase(play: Play, scene: str) -> None:
    _stage(play, scene)
    busy = [a.id for a in play.fleet.state.agents.values() if a.task]
    round_ = play.job().round
    assert scene in {"empty", "survey"} or play.phase() == scene
    play.cancel().expects(act.Finish, job="j", phase="cancelled", reason="cancelled by the operator")
    for agent in busy:
        play.expects(act.Withdraw, agent=agent, cancel={"job": "j", "reason": "cancelled by the operator"})
    if round_:
        play.expects(act.Record, record={"round": round_.number, "outcome": "cancelled by the operator"})
    assert play.free()
    assert play.fleet.wake_at is None
    assert play.cancel().wishes == [], "a second cancel has nothing to end"


# ------------------------------------------------------------------------------------------------------------ restart


def test_after_a_restart_everything_under_way_is_asked_for_again(play: Play) -> None:
    play.ready("a", "b").plan()
    offer = play.offer("a")
    play.offers("a", offer).move("a", ExecState.UPLOADING).join("c")
    again = Fleet(decode_state(encode_state(play.fleet.state))).resume(play.now + 7.0)
    play.wishes = again
    play.expects(act.Announce, card={"phase": "collecting"})
    play.expects(act.Assign, agent="b", plan={"round": 1, "stop_after_s": 93.0})
    play.expects(act.Assign, agent="c", plan={"purpose": "survey", "stop_after_s": 43.0})
    play.expects(act.Fetch, agent="a", offer=offer)


def test_after_a_restart_slow_work_is_asked_for_again(play: Play) -> None:
    asked = play.ready("a").expects(act.MakePlan)
    assert asked in play.fleet.resume(play.now)
    fold = play.plan().trains("a").expects(act.Aggregate)
    assert fold in play.fleet.resume(play.now)
    play.fold()
    model = play.job().model
    assert model
    assert act.Serve(job="j", blob=model) in play.fleet.resume(play.now)


def test_a_snapshot_of_a_newer_version_is_refused(play: Play) -> None:
    play.ready("a")
    raw = msgspec.msgpack.decode(encode_state(play.fleet.state))
    newer = msgspec.msgpack.encode({**raw, "v": raw["v"] + 1})
    with pytest.raises(BadConfig, match="newer fedpipe"):
        decode_state(newer)


# ----------------------------------------------------------------------------------------------------- what plans say


def test_a_plan_is_complete(play: Play) -> None:
    play.ready(
        "a",
        adapter={"alpha": 4.0, "update_dtype": "fp32"},
        train={"learning_rate": 0.001, "max_tokens": 64},
        evaluate={"held_out_ratio": 0.2, "max_samples": 8, "metrics": ["rougeL"]},
        head={"data": "notes", "seed": 3},
    )
    choice = Choice(ranks={"q": 4}, bits="int8", n_steps=5, batch=2, accumulation=3, checkpointing=True)
    plan = play.feed(ev.PlanReady(job="j", round=1, attempt=0, choices={"a": choice})).expects(act.Assign).plan
    assert (plan.bits, plan.ranks, plan.alpha, plan.update_dtype) == ("int8", {"q": 4}, 4.0, "fp32")
    assert (plan.data, plan.data_seed, plan.held_out_ratio) == ("notes", 3, 0.2)
    assert plan.base.sha256 == play.job().base_sha256
    assert plan.max_update_bytes == 4 * (8 + 8) * 4 + 65_536 + 512
    train = plan.train
    assert (train.n_steps, train.batch, train.accumulation, train.checkpointing) == (5, 2, 3, True)
    assert (train.learning_rate, train.max_tokens) == (0.001, 64)
    assert (plan.evaluate.max_samples, plan.evaluate.metrics, plan.evaluate.max_tokens) == (8, ["rougeL"], 64)


def test_versions_are_measured_every_so_many_rounds_and_at_the_end(play: Play) -> None:
    play.ready("a", round={"n_rounds": 3}, evaluate={"every": 2}, train={"max_tokens": 64})
    measured = []
    for _ in range(3):
        measured.append(play.plan().expects(act.Assign).plan.evaluate is not None)
        play.trains("a").fold()
    assert measured == [True, False, True]
    last = play.expects(act.Assign, plan={"purpose": "evaluate"}).plan
    assert last.evaluate.max_tokens == 64, "the last version is measured on the same text as the first"


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"n_agents": 1, "min_agents": 2}, "n_agents = 1 is below min_agents = 2"),
        ({"train_s": 0}, "train_s"),
        ({"minimum": 3}, "minimum"),
    ],
)
def test_a_job_that_could_never_end_well_is_refused(table: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert({"job": {"name": "j"}, "model": {"source": "toy"}, "round": table}, JobSpec)
    assert Rounds(n_agents=0, min_agents=2).n_agents == 0
