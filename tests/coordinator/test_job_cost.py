"""What a job has cost: each share once, energy as far as it is known, money at the prices of now."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.config import CoordinatorConfig
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.cost import FREE, CostView, Price, Prices, cost_so_far, spent_text, worked
from coordinator.intake import to_event
from coordinator.past import Past, extended
from coordinator.trackers import points_of
from protocol.codec import decode, encode
from protocol.daemon import to_struct
from protocol.errors import BadConfig
from protocol.messages import Energy, ExecState, Execution

Play = Any
"""The fixture's type; it lives in conftest.py."""

HOUR = {"wall_s": 3600.0, "entered": {ExecState.TRAINING: 1.0}}
MEASURED, DECLARED = Energy(joules=7.2e6, source="measured"), Energy(joules=1.8e6, source="declared")


def record(attempt: int, *, opened_at: float = 0.0, **shares: ShareRecord) -> RoundRecord:
    return RoundRecord(
        round=1,
        attempt=attempt,
        purpose="train",
        version=0,
        outcome="x",
        opened_at=opened_at,
        wall_s=9.0,
        loss=None,
        shares=shares,
    )


def cost_of(records: list[RoundRecord], devices: dict[str, str], prices: Prices = FREE) -> CostView:
    return cost_so_far(extended(Past(), records).spent, devices, prices)


def test_a_share_that_a_failed_attempt_left_to_the_next_one_costs_once() -> None:
    kept = ShareRecord(
        state="DONE", samples=8, train_s=10.0, bytes_up=100, bytes_down=7, assigned_at=1.0, energy=MEASURED
    )
    lost = ShareRecord(state="FAILED", train_s=0.0, assigned_at=1.0)
    again = ShareRecord(state="DONE", samples=4, train_s=5.0, bytes_up=50, assigned_at=12.0)
    cost = cost_of([record(0, a=kept, b=lost), record(1, a=kept, b=again)], {"a": "RTX 3090", "b": "cpu"})
    assert (cost.train_s, cost.gpu_s, cost.joules) == (15.0, 10.0, 7.2e6)
    assert (cost.samples, cost.bytes_up, cost.bytes_down) == (12, 150, 7)
    assert (cost.n_shares, cost.n_failed) == (3, 1)


def test_what_is_counted_as_it_happens_is_counted_in_the_attempt_that_did_it() -> None:
    kept = ShareRecord(state="DONE", train_s=10.0, assigned_at=1.0, ended_at=11.0, energy=MEASURED)
    fresh = ShareRecord(state="DONE", train_s=5.0, assigned_at=21.0, ended_at=30.0, energy=DECLARED)
    second = record(1, opened_at=20.0, a=kept, b=fresh)
    assert list(worked(second)) == [fresh]
    assert list(worked(record(0, a=kept))) == [kept]
    (points,) = points_of("j", second)
    assert points.values["round/energy_joules"] == 1.8e6
    assert points.values["round/work_seconds"] == 5.0
    (points,) = points_of("j", record(0, a=ShareRecord(state="DONE")))
    assert "round/energy_joules" not in points.values, "what nobody knows is not told as nothing"


def test_hours_and_energy_are_paid_at_each_agents_own_price() -> None:
    shares = {
        "a": ShareRecord(state="DONE", energy=MEASURED, **HOUR),
        "b": ShareRecord(state="FAILED", energy=DECLARED, **HOUR),
        "c": ShareRecord(state="TIMED_OUT", **HOUR),
        "d": ShareRecord(state="TIMED_OUT", wall_s=3600.0),
    }
    prices = Prices(currency="EUR", per_kwh=0.3, agents={"c": Price(per_hour=2.5)})
    cost = cost_of([record(0, **shares)], {}, prices)
    assert cost.work_s == 3 * 3600.0, "d never took its plan"
    assert (cost.joules, cost.declared_j, cost.unmetered_s) == (9e6, 1.8e6, 3600.0)
    assert cost.money == pytest.approx(2 * 0.3 + 0.5 * 0.3 + 2.5)
    assert spent_text(cost) == "3:00:00 at work; 2.5 kWh (500 Wh of it declared), unknown for 1:00:00; 3.25 EUR"


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (CostView(), "0:00 at work"),
        (CostView(work_s=60, unmetered_s=60), "1:00 at work; energy not known"),
        (CostView(work_s=60, joules=3600), "1:00 at work; 1.0 Wh"),
        (CostView(work_s=60, joules=180, declared_j=180), "1:00 at work; 0.05 Wh declared"),
        (CostView(work_s=60, money=1234.5, currency="CHF"), "1:00 at work; 1,234.50 CHF"),
    ],
)
def test_what_is_not_known_is_said(cost: CostView, text: str) -> None:
    assert spent_text(cost) == text


def test_a_price_without_its_currency_is_refused() -> None:
    raw = {"prices": {"agents": {"a": {"per_kwh": 0.3}}}}
    with pytest.raises(BadConfig, match=r"add currency = 'EUR' under \[prices\]"):
        to_struct(raw, CoordinatorConfig, "coordinator.toml")
    raw["prices"]["currency"] = "EUR"  # type: ignore[assignment]
    assert to_struct(raw, CoordinatorConfig, "").prices.of("a") == Price(per_kwh=0.3)


def test_the_energy_of_a_failed_share_is_recorded_and_that_of_an_update_comes_with_it(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 1, "quorum_ratio": 0.5}).plan()
    play.move("b", ExecState.FAILED, reason="broken", energy=DECLARED)
    play.trains("a", energy=MEASURED).fold()
    (found,) = [wish.record for wish in play.wishes if isinstance(wish, act.Record)]
    assert {name: share.energy for name, share in found.shares.items()} == {"a": MEASURED, "b": DECLARED}


def test_what_an_agent_says_of_it_reaches_the_core() -> None:
    said = Execution(job="j", round=1, attempt=0, serial=1, state=ExecState.FAILED, energy=DECLARED)
    fact = to_event("a", decode(encode(said, session="a" * 16, seq=1, now=1.0)))
    assert isinstance(fact, ev.ShareMoved)
    assert fact.energy == DECLARED


def test_an_older_agent_is_understood() -> None:
    said = Execution(job="j", round=1, attempt=0, serial=1, state=ExecState.DONE)
    older = msgspec.msgpack.encode({k: v for k, v in msgspec.to_builtins(said).items() if k != "energy"})
    assert msgspec.msgpack.decode(older, type=Execution) == said
