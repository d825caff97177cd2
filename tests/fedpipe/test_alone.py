"""The demo's comparison and its figures: an agent alone does what the plan gave it, and the report says what the API says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.core.state import Purpose, RoundRecord, ShareRecord
from coordinator.plan_views import PlanView
from fedpipe.alone import Alone, shares_of
from fedpipe.client import Coordinator
from fedpipe.demo_options import DemoOptions
from fedpipe.summary import summarise

Planned = Callable[..., PlanView]
Served = Any
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


def a_round(number: int, attempt: int, n_samples: int, purpose: Purpose = "train") -> RoundRecord:
    """As it is recorded, of anna's share alone."""
    share = ShareRecord(state="DONE", planned_samples=n_samples)
    said = {"version": 0, "outcome": "", "opened_at": 0.0, "wall_s": 1.0, "loss": None}
    return RoundRecord(round=number, attempt=attempt, purpose=purpose, shares={"anna": share}, **said)  # type: ignore[arg-type]


def test_the_last_plan_for_the_steps_of_all_rounds(planned: Planned) -> None:
    view = planned()
    shares = shares_of(
        view, [a_round(1, 0, 640), a_round(1, 1, 640), a_round(2, 0, 320), a_round(3, 0, 99, "evaluate")], 3
    )
    assert shares["anna"].n_steps == 60  # 960 samples, 16 per step
    assert shares["anna"].ranks == view.agents["anna"].choice.ranks
    assert shares["berta"].n_steps == 120  # nothing is known of the past: 40 in each of 3 rounds


def test_the_report_says_what_the_coordinator_says(served: Served) -> None:
    with Coordinator(served.url) as coordinator:
        coordinator.submit(JOB)
        served.join("a")
        served.survey("a")
        served.run_round("a", loss=3.0)
        served.finish("a", loss=1.5)
        job, plan = coordinator.job("j"), coordinator.plan("j")
    alone = [Alone(agent="a", losses={"a": 2.0})]
    report = summarise(DemoOptions(), job, plan, alone, [], [], Path("adapter"), 9.0)
    assert report.eval.per_agent == {"a": (3.0, 1.5)}
    assert report.plan == plan
    choice, found = plan.agents["a"].choice, report.agents["a"]
    assert (found.bits, found.n_matrices, found.n_train) == (choice.bits, len(choice.ranks), 90)
    assert found.rank == sum(choice.ranks.values()) / len(choice.ranks)
    share = report.rounds[0].agents["a"]
    assert (share.samples, share.planned_samples) == (100, job.history[0].shares["a"].planned_samples)
