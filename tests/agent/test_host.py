"""The policy on a scripted clock, and looks at this very machine while something else uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.host import Host, Sample, Verdict
from agent.limits import Limits, YieldTo
from agent.watch import CpuUse, Watch, other_ratio

GIB, MIB = 2**30, 2**20
NOON = 12 * 60
CALM = Sample(NOON, True, 8 * GIB, 4 * GIB, 0.0, 100.0, 50.0)
TIGHT = CALM._replace(free_bytes=100 * MIB)
BUSY = CALM._replace(other_ratio=0.8)


def play(*looks: tuple[Sample, int], **limits: Any) -> list[str]:
    """The levels that follow from (sample, times) one every two seconds."""
    host, now, levels = Host(Limits(**limits)), 0.0, []
    for sample, times in looks:
        for _ in range(times):
            now += 2.0
            levels.append(host.see(sample, now).level)
    return levels


def turns(levels: list[str]) -> list[str]:
    return [level for before, level in zip(["", *levels], levels, strict=False) if level != before]


def test_nothing_needed_is_nothing_given_up() -> None:
    assert play((CALM, 20)) == ["run"] * 20


def test_a_burst_is_no_need_and_a_gap_is_no_rest() -> None:
    assert turns(play((BUSY, 2), (CALM, 1), (BUSY, 2), (CALM, 1))) == ["run"]
    assert play((BUSY, 3))[-1] == "pause"
    assert turns(play((BUSY, 3), (CALM, 15), (BUSY, 1), (CALM, 15))) == ["run", "pause"]
    assert turns(play((BUSY, 3), (CALM, 17))) == ["run", "pause", "run"]


def test_memory_shrinks_first_and_then_frees_everything() -> None:
    levels = play((TIGHT, 10))
    assert levels == ["run"] * 2 + ["shrink"] * 3 + ["stop"] * 5, "what shrinking freed needs as long to show"
    assert turns(play((TIGHT, 3), (CALM, 20), (TIGHT, 3))) == ["run", "shrink", "run", "shrink"]
    assert turns(play((BUSY, 3), (TIGHT, 3))) == ["run", "pause", "stop"], "a paused child cannot shrink"
    assert turns(play((TIGHT, 6), (BUSY, 9), (CALM, 17))) == ["run", "shrink", "stop", "run"]


@pytest.mark.parametrize(
    ("sample", "limits", "level", "why"),
    [
        (CALM._replace(minute=0), {"hours": ["08:00-18:00"]}, "pause", "08:00-18:00"),
        (BUSY, {}, "pause", "80% of the GPU"),
        (BUSY._replace(is_gpu=False), {}, "run", ""),
        (BUSY._replace(is_gpu=False), {"yield_to": YieldTo(max_other_cpu=0.5)}, "pause", "80% of the CPU"),
        (BUSY, {"yield_to": YieldTo(max_other_gpu=1.0)}, "run", ""),
        (BUSY._replace(other_ratio=None), {}, "run", ""),
        (CALM._replace(power_w=301.0), {"max_power_w": 300.0}, "pause", "301 W of 300 W"),
        (CALM._replace(power_w=301.0), {}, "run", ""),
        (CALM._replace(temperature_c=91.0), {}, "pause", "91 °C of 90 °C"),
        (CALM._replace(temperature_c=None), {}, "run", ""),
        (TIGHT, {}, "shrink", "100 MiB are free, 256 MiB must be"),
        (TIGHT, {"yield_to": YieldTo(min_free_bytes=0)}, "run", ""),
        (CALM, {"memory_bytes": 3 * GIB}, "shrink", "training holds 4096 MiB, 3072 MiB are allowed"),
        (CALM, {"memory_ratio": 0.25}, "shrink", "training holds 4096 MiB, 3072 MiB are allowed"),
        (CALM._replace(own_bytes=None), {"memory_bytes": 3 * GIB}, "run", ""),
    ],
)
def test_each_need_has_its_answer_and_its_words(sample: Sample, limits: dict[str, Any], level: str, why: str) -> None:
    host = Host(Limits(**limits))
    for now in range(3):
        host.see(sample, float(now))
    assert host.verdict.level == level
    assert why in host.verdict.reason
    assert bool(host.verdict.reason) == (level != "run")


def test_the_wrong_hour_is_known_at_once() -> None:
    assert play((CALM._replace(minute=0), 1), hours=["08:00-18:00"]) == ["pause"]


def test_while_it_gives_way_a_little_less_is_not_yet_a_rest() -> None:
    nearly = CALM._replace(other_ratio=0.28)
    assert turns(play((nearly, 30))) == ["run"]
    assert turns(play((BUSY, 3), (nearly, 100))) == ["run", "pause"]
    assert turns(play((BUSY, 3), (CALM._replace(other_ratio=0.2), 17))) == ["run", "pause", "run"]


samples = st.builds(
    Sample,
    minute=st.sampled_from([NOON, NOON, NOON, 0]),
    is_gpu=st.booleans(),
    free_bytes=st.sampled_from([0, 270 * MIB, 8 * GIB, 8 * GIB]),
    own_bytes=st.none() | st.sampled_from([0, 4 * GIB, 9 * GIB]),
    other_ratio=st.none() | st.floats(0, 1),
    power_w=st.none() | st.floats(0, 400),
    temperature_c=st.none() | st.floats(20, 110),
)


@given(st.lists(samples, max_size=80), st.integers(1, 4), st.floats(0, 20))
def test_no_flapping(looks: list[Sample], patience: int, quiet_s: float) -> None:
    """Whatever is seen: it never goes up without need, and goes down only after a rest that was long enough."""
    limits = Limits(hours=["06:00-18:00"], memory_bytes=8 * GIB, yield_to=YieldTo(patience=patience, quiet_s=quiet_s))
    host, before, changed_at = Host(limits), Verdict(), -1e9
    for now, look in enumerate(looks):
        verdict = host.see(look, float(now))
        if verdict != before:
            order = ["run", "shrink", "pause", "stop"]
            if verdict.level == "run":
                assert now - changed_at >= quiet_s
            else:
                assert order.index(verdict.level) > order.index(before.level), "it only gives way further"
            changed_at = now
        before = verdict


@contextmanager
def hog(code: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_processor_time_of_others_is_what_was_busy_without_us() -> None:
    before = CpuUse(available_s=1000.0, busy_s=300.0, own_s=100.0)
    assert other_ratio(before, CpuUse(1008.0, 306.0, 104.0)) == pytest.approx(0.25)
    assert other_ratio(before, CpuUse(1008.0, 302.0, 104.0)) == 0.0
    assert other_ratio(before, CpuUse(1008.0, 306.0, 0.0)) == pytest.approx(0.75), "the child went"
    assert other_ratio(before, before) == 0.0


def test_another_process_on_the_cpu_is_seen() -> None:
    watch = Watch("cpu")
    assert watch.look(None).other_ratio is None, "there is nothing to compare with yet"
    with hog("print('ready', flush=True)\nwhile True: pass"):
        watch.look(None)
        time.sleep(1.0)
        seen = watch.look(None).other_ratio
    assert seen is not None
    assert 0.2 / (os.cpu_count() or 1) < seen <= 1


def test_memory_of_the_child_is_its_own() -> None:
    watch = Watch("cpu")
    n_bytes = 256 * MIB
    fill = f"import time\nx = b'x' * {n_bytes}\nprint('ready', flush=True)\ntime.sleep(600)"
    with hog(fill) as one:
        sample = watch.look(one.pid)
    assert sample.own_bytes is not None
    assert n_bytes <= sample.own_bytes < 1.2 * n_bytes
    assert watch.look(one.pid).own_bytes == 0, "it is gone"
