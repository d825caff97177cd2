"""The report of this very machine, the kernel's limits on written-out control groups, and when a report is worth sending."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.limits import Limits
from agent.profiler import Cap, Link, cgroup_cap, changed, own_ram, profile, training_gpu
from protocol.messages import Allowance, Gpu, Report


def test_report_of_this_machine_is_true_and_legal(tmp_path: Path) -> None:
    report = profile(tmp_path / "not" / "yet" / "there")
    assert 1 <= report.n_cpus <= len(os.sched_getaffinity(0))
    assert 0 < report.ram_available_bytes <= report.ram_total_bytes <= psutil.virtual_memory().total
    assert report.disk_free_bytes == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.05)
    assert set(report.bits) == {"none", "int8", "nf4"}
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_the_allowance_is_what_the_limits_leave_of_this_machine(tmp_path: Path) -> None:
    limits = Limits(memory_bytes=2**20, reserve_bytes=0, max_rank=8, max_batch=4, bits=["nf4"])
    report = profile(tmp_path, limits=limits, device="cpu", paused="not before 20:00")
    assert report.allowance == Allowance(memory_bytes=2**20, max_rank=8, max_batch=4, paused="not before 20:00")
    assert report.bits == ["nf4"]
    free = profile(tmp_path, limits=Limits(reserve_bytes=2**29), device="cpu", child=os.getpid())
    assert free.allowance is not None
    room = free.ram_available_bytes + own_ram(os.getpid()) - 2**29
    assert free.allowance.memory_bytes == pytest.approx(room, rel=0.1)


def test_limits_that_leave_no_width_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.profiler._bits", lambda _: ["none"])  # as without bitsandbytes
    report = profile(tmp_path, limits=Limits(bits=["int8", "nf4"]))
    assert report.bits == []
    assert any("limits.bits" in note and "allow one of these" in note for note in report.notes)


@pytest.mark.parametrize(("wanted", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1), ("cuda:7", 0), ("cpu", None)])
def test_the_device_that_torch_will_take(monkeypatch: pytest.MonkeyPatch, wanted: str, index: int | None) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.9.0+cu128")
    devices = [GPU, msgspec.structs.replace(GPU, index=1)]
    found = training_gpu(wanted, devices)
    assert (found.index if found else None) == index
    assert training_gpu(wanted, []) is None
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.9.0+cpu")
    assert training_gpu(wanted, devices) is None


def test_no_gpu_is_said_and_not_raised(tmp_path: Path) -> None:
    report = profile(tmp_path)
    if report.gpus:
        pytest.skip("this machine has a GPU; see tests/gpu")
    assert any("CPU" in note for note in report.notes)


def test_affinity_limits_the_processors(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert profile(tmp_path).n_cpus == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_look_imports_no_training_library(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
from agent.profiler import profile
profile(pathlib.Path({str(tmp_path)!r}))
print(sorted({{'torch', 'transformers', 'bitsandbytes', 'numpy'}} & set(sys.modules)))
"""
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def cgroup(root: Path, path: str, **files: str) -> Path:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text + "\n")
    own = root / "own"
    own.write_text("12:memory:/elsewhere\n0::/system.slice/fedpipe-agent.service\n")
    return own


def test_the_tightest_of_the_groups_counts(tmp_path: Path) -> None:
    cgroup(tmp_path, "system.slice", memory_max="8000", memory_current="7000", memory_stat="anon 1\ninactive_file 500")
    own = cgroup(
        tmp_path,
        "system.slice/fedpipe-agent.service",
        memory_max="4000",
        memory_current="1000",
        memory_stat="inactive_file 400\nactive_file 1",
        cpu_max="150000 100000",
    )
    # 4000 - (1000 - 400) = 3400 are left here, but only 8000 - (7000 - 500) = 1500 in the slice above.
    assert cgroup_cap(tmp_path, own) == Cap(n_cpus=1.5, memory_bytes=4000, free_bytes=1500)


def test_groups_without_limits_say_nothing(tmp_path: Path) -> None:
    own = cgroup(tmp_path, "system.slice/fedpipe-agent.service", memory_max="max", cpu_max="max 100000")
    assert cgroup_cap(tmp_path, own) == Cap()
    assert cgroup_cap(tmp_path, tmp_path / "absent") == Cap()
    assert cgroup_cap(tmp_path / "no-such-mount", own) == Cap()


def test_more_in_use_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    own = cgroup(tmp_path, "system.slice/fedpipe-agent.service", memory_max="1000", memory_current="1500")
    assert cgroup_cap(tmp_path, own).free_bytes == 0


GPU = Gpu(index=0, name="A", total_bytes=100, free_bytes=80, utilization_ratio=0.2, temperature_c=40)
ALLOWANCE = Allowance(device="A", memory_bytes=1000)
CALM = Report(
    gpus=[GPU],
    driver="1",
    n_cpus=8,
    cpu_load_ratio=0.3,
    ram_total_bytes=1000,
    ram_available_bytes=600,
    disk_free_bytes=1000,
    up_bytes_per_s=100,
    down_bytes_per_s=100,
    bits=["none"],
    allowance=ALLOWANCE,
)


@pytest.mark.parametrize(
    "change",
    [
        {"driver": "2"},
        {"gpus": []},
        {"n_cpus": 4},
        {"cpu_load_ratio": 0.9},
        {"ram_available_bytes": 400},
        {"disk_free_bytes": 800},
        {"disk_free_bytes": 0},
        {"up_bytes_per_s": 0},
        {"down_bytes_per_s": 130},
        {"bits": ["none", "nf4"]},
        {"notes": ["something"]},
        {"allowance": None},
        {"allowance": msgspec.structs.replace(ALLOWANCE, memory_bytes=890)},
        {"allowance": msgspec.structs.replace(ALLOWANCE, paused="not before 20:00")},
        {"allowance": msgspec.structs.replace(ALLOWANCE, max_batch=2)},
        {"gpus": [msgspec.structs.replace(GPU, free_bytes=60)]},
        {"gpus": [msgspec.structs.replace(GPU, n_other_processes=1)]},
        {"gpus": [msgspec.structs.replace(GPU, utilization_ratio=0.9)]},
        {"gpus": [msgspec.structs.replace(GPU, temperature_c=60)]},
        {"gpus": [msgspec.structs.replace(GPU, ecc_errors=1)]},
    ],
)
def test_what_a_planner_would_notice_is_a_change(change: dict[str, object]) -> None:
    other = msgspec.structs.replace(CALM, **change)
    assert changed(CALM, other)
    assert changed(other, CALM)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"cpu_load_ratio": 0.4},
        {"ram_available_bytes": 550},
        {"disk_free_bytes": 950},
        {"up_bytes_per_s": 110},
        {"allowance": msgspec.structs.replace(ALLOWANCE, memory_bytes=950)},
        {"gpus": [msgspec.structs.replace(GPU, free_bytes=75, power_w=200, temperature_c=45, utilization_ratio=0.4)]},
    ],
)
def test_flutter_is_no_change(change: dict[str, object]) -> None:
    assert not changed(CALM, msgspec.structs.replace(CALM, **change))


Transfers = st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.001, 1000)), min_size=1, max_size=20)


@given(Transfers)
def test_a_measured_rate_lies_between_the_slowest_and_the_fastest(seen: list[tuple[int, float]]) -> None:
    link = Link()
    for n_bytes, seconds in seen:
        link.up(n_bytes, seconds)
    rates = [n / s for n, s in seen]
    assert min(rates) * 0.999 <= link.up_bytes_per_s <= max(rates) * 1.001
    assert link.down_bytes_per_s == 0


@given(Transfers, st.integers(1, 10**9))
def test_a_link_that_changed_is_believed_after_some_half_lives(seen: list[tuple[int, float]], rate: int) -> None:
    link = Link(half_life_s=1.0)
    for n_bytes, seconds in seen:
        link.down(n_bytes, seconds)
    for _ in range(60):
        link.down(rate, 1.0)
    assert math.isclose(link.down_bytes_per_s, rate, rel_tol=0.01)


def test_nothing_moved_says_nothing() -> None:
    link = Link()
    link.up(0, 5.0)
    link.up(100, 0.0)
    assert link.up_bytes_per_s == 0
    link.up(100, 0.5)
    assert link.up_bytes_per_s == 200
