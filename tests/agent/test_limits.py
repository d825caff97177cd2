"""What an owner may write, what it means at which hour, and how many bytes are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.caps import Caps
from agent.config import AgentConfig
from agent.limits import Limits, parse_hours
from protocol.daemon import load_toml
from protocol.errors import BadConfig
from protocol.messages import Base, Calibration, Plan, Report, Training

GIB = 2**30


def minute(hour: int, past: int = 0) -> int:
    return hour * 60 + past


@pytest.mark.parametrize(
    ("hours", "open_at", "closed_at"),
    [
        ([], [0, minute(12), minute(23, 59)], []),
        (["08:00-12:30"], [minute(8), minute(12, 29)], [minute(7, 59), minute(12, 30), 0]),
        (["20:00-06:00"], [minute(20), minute(23, 59), 0, minute(5, 59)], [minute(6), minute(19, 59)]),
        (["20:00-24:00"], [minute(20), minute(23, 59)], [0, minute(19, 59)]),
        (["0:00 - 6:00", "12:00-13:00"], [0, minute(12, 30)], [minute(6), minute(13), minute(23)]),
    ],
)
def test_hours_and_those_over_midnight(hours: list[str], open_at: list[int], closed_at: list[int]) -> None:
    limits = Limits(hours=hours)
    assert all(limits.is_open(at) for at in open_at)
    assert not any(limits.is_open(at) for at in closed_at)


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_an_interval_and_its_opposite_share_the_day(start: int, end: int, at: int) -> None:
    def span(a: int, b: int) -> Limits:
        return Limits(hours=[f"{a // 60:02}:{a % 60:02}-{b // 60:02}:{b % 60:02}"])

    if start == end:
        with pytest.raises(ValueError, match='write them as "20:00-06:00"'):
            span(start, end)
    else:
        assert span(start, end).is_open(at) != span(end, start).is_open(at)


@pytest.mark.parametrize("text", ["", "20-6", "25:00-06:00", "20:00-24:30", "08:00-08:00", "night"])
def test_hours_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match='write them as "20:00-06:00"'):
        parse_hours(text)


@pytest.mark.parametrize(
    ("limits", "free", "own", "allowed"),
    [
        ({"reserve_bytes": 0}, 10, 0, 10),
        ({"reserve_bytes": GIB}, 10, 4, 13),
        ({"reserve_bytes": 0, "memory_ratio": 0.5}, 10, 4, 7),
        ({"reserve_bytes": 8 * GIB, "memory_ratio": 0.5}, 10, 4, 6),
        ({"reserve_bytes": GIB, "memory_bytes": 5 * GIB}, 10, 4, 5),
        ({"reserve_bytes": GIB, "memory_bytes": 50 * GIB}, 10, 4, 13),
        ({"reserve_bytes": 20 * GIB}, 10, 4, 0),
    ],
)
def test_what_is_left_for_training(limits: dict[str, Any], free: int, own: int, allowed: int) -> None:
    assert Limits(**limits).allowed_bytes(free * GIB, own * GIB) == allowed * GIB


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40))
def test_what_the_child_takes_does_not_change_its_allowance(free: int, own: int, taken: int) -> None:
    limits = Limits(memory_ratio=0.8, memory_bytes=2**38)
    taken = min(taken, free)
    assert limits.allowed_bytes(free, own) == limits.allowed_bytes(free - taken, own + taken)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('hours = ["late"]', r'hours "late" are none: write them as "20:00-06:00".*limits'),
        ("memory_ratio = 1.5", r"limits\.memory_ratio"),
        ("memory_bytes = -1", r"limits\.memory_bytes"),
        ("max_batch = 0", r"limits\.max_batch"),
        ('bits = ["int4"]', r"limits\.bits"),
        ("bits = []", r"limits\.bits"),
        ("yield_to = { patience = 0 }", r"limits\.yield_to\.patience"),
        ("yield_to = { patients = 1 }", r"patients.*limits\.yield_to"),
    ],
)
def test_a_bad_limit_is_named_with_its_place(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(f'agent = "a1"\n[limits]\n{line}\n')
    with pytest.raises(BadConfig, match=told):
        load_toml(path, AgentConfig)


# --------------------------------------------------------------------------------------------------- a plan, as it came


def plan(purpose: Any = "train", **fields: Any) -> Plan:
    base = Base(source="toy", sha256="")
    said: dict[str, Any] = {"job": "j", "round": 1, "attempt": 0, "method": "qlora", "issued_at": 0.0}
    return Plan(base=base, purpose=purpose, stop_after_s=9.0, ttl_s=9.0, **said | fields)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_rank": 4}, r"the plan asks for rank 8, this server allows 4 \(limits.max_rank\)"),
        ({"max_batch": 2}, r"the plan asks for batch 16, this server allows 2 \(limits.max_batch\)"),
        ({"bits": ["int8"]}, r"the plan asks for nf4, this server allows int8 \(limits.bits\)"),
    ],
)
def test_training_beyond_a_limit_is_refused_by_the_agent_itself(limits: dict[str, Any], told: str) -> None:
    asked = plan(ranks={"q": 8, "v": 2}, train=Training(n_steps=3, batch=16))
    assert Limits().kept(asked) == asked
    with pytest.raises(BadConfig, match=told):
        Limits(**limits).kept(asked)


def test_only_what_is_allowed_is_measured() -> None:
    asked = plan("survey", round=0, calibration=Calibration(bits=["none", "nf4"], batches=[4, 8]))
    kept = Limits(bits=["nf4"], max_batch=4).kept(asked).calibration
    assert kept
    assert (kept.bits, kept.batches) == (["nf4"], [4])
    assert Limits(bits=["int8"]).kept(asked).calibration is None


def test_outside_its_hours_bulk_waits_and_the_report_says_so() -> None:
    limits = Limits(transfer_hours=["22:00-06:00"], up_bytes_per_s=1e6)
    caps = Caps(limits, 12 * 60)
    report = caps.applied(Report(up_bytes_per_s=5e6, down_bytes_per_s=5e6, notes=["x"] * 16))
    assert (caps.up.is_open, caps.down.is_open) == (False, False)
    assert (report.up_bytes_per_s, report.down_bytes_per_s) == (1e6, 5e6)
    assert (len(report.notes), report.notes[0]) == (16, "updates and models move at 22:00-06:00 only")
    assert caps.renew(limits, 22 * 60)
    assert not caps.renew(limits, 23 * 60)
    assert caps.is_open
    assert caps.applied(Report()).up_bytes_per_s == 1e6, "of a link that was not measured the cap is what is known"
    assert caps.applied(Report()).notes == []
