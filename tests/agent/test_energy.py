"""Energy: from real files shaped like the kernel's, from NVML's own functions answering as a device would, and by the clock."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pynvml as nvml
import pytest

from agent import energy
from agent.energy import Counter, Meter, look, measured, rapl, spent
from protocol.messages import Energy


def zone(root: Path, name: str, kind: str, microjoules: int, range_: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", kind), ("energy_uj", microjoules), ("max_energy_range_uj", range_)):
        (folder / file).write_text(f"{text}\n")
    return folder


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two sockets, as Linux shows them."""
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 4_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 99_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_every_package_and_its_memory_counts_once(powercap: Path) -> None:
    range_ = 262_143.32885
    assert rapl(powercap) == {
        "intel-rapl:0": Counter(5.0, range_),
        "intel-rapl:0:1": Counter(1.0, range_),
        "intel-rapl:1": Counter(7.0, range_),
    }


def test_half_of_it_is_not_taken_for_the_whole(powercap: Path) -> None:
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert rapl(powercap) is None
    assert rapl(powercap / "nowhere") is None
    zone(powercap, "intel-rapl:1", "package-1", 0)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("garbage")
    assert look(None, powercap) is None


def test_a_counter_that_wraps_is_followed(powercap: Path) -> None:
    meter = Meter()
    zone(powercap, "intel-rapl:0", "package-0", 262_143_000_000)
    meter.see(look(None, powercap), 0.0)
    zone(powercap, "intel-rapl:0", "package-0", 671_150)
    meter.see(look(None, powercap), 5.0)
    assert meter.energy == Energy(joules=pytest.approx(1.0), source="measured")


def test_a_counter_that_was_reset_says_nothing_of_that_time() -> None:
    assert spent({"gpu": Counter(5e6)}, {"gpu": Counter(7.0)}, 5.0) == 0.0
    assert spent({"gpu": Counter(5.0)}, 100.0, 5.0) == 0.0


def test_power_is_integrated() -> None:
    meter = Meter(declared_w=9.0)
    for second, watts in ((0.0, 100.0), (2.0, 200.0), (4.0, 200.0)):
        meter.see(watts, second)
    assert meter.energy == Energy(joules=700.0, source="measured")


def test_a_pause_is_not_counted() -> None:
    meter = Meter(declared_w=10.0)
    counted = Meter()
    for second, joules, counts in ((0, 0, True), (5, 500, True), (10, 900, False), (15, 1500, False), (20, 1700, True)):
        meter.see(None, second, counts=counts)
        counted.see({"gpu": Counter(joules)}, second, counts=counts)
    assert meter.energy == Energy(joules=100.0, source="declared")
    assert counted.energy == Energy(joules=700.0, source="measured")


def test_what_nobody_knows_is_unknown() -> None:
    meter = Meter()
    assert meter.energy is None
    for second in range(3):
        meter.see(None, second)
    assert meter.energy is None
    meter.see({"gpu": Counter(1.0)}, 4.0)
    assert meter.energy is None, "one look has nothing to be compared with"


def test_a_look_that_fails_costs_nothing_where_there_is_a_counter() -> None:
    meter = Meter()
    for second, seen in enumerate(({"gpu": Counter(10.0)}, None, {"gpu": Counter(30.0)})):
        meter.see(seen, second)
    assert meter.energy == Energy(joules=20.0, source="measured")


class Device:
    """NVML's answers: what it has counted in mJ or the error instead, and what it draws in mW."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, counted: int | Exception) -> None:
        self.counted = counted
        monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
        monkeypatch.setattr(nvml, "nvmlDeviceGetTotalEnergyConsumption", self.energy)
        monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", lambda _: 250_000)

    def energy(self, _: int) -> int:
        if isinstance(self.counted, Exception):
            raise self.counted
        return self.counted


def test_a_gpu_counts_or_else_tells_what_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 123_456)
    assert look(0) == {"gpu": Counter(123.456)}
    device.counted = nvml.NVMLError_NotSupported()
    assert look(0) == 250.0
    device.counted = nvml.NVMLError_GpuIsLost()
    assert look(0) is None


async def test_a_block_is_measured_from_its_beginning_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "LOOK_S", 0.001)
    looks = asyncio.Event()
    counters = iter(range(0, 10**9, 10))
    loop = asyncio.get_running_loop()

    def count() -> dict[str, Counter]:
        if (joules := next(counters)) >= 30:
            loop.call_soon_threadsafe(looks.set)
        return {"gpu": Counter(float(joules))}

    meter = Meter()
    async with measured(meter, count, lambda: True):
        await looks.wait()
    assert meter.energy is not None
    assert meter.energy.joules >= 30
    before = meter.energy.joules
    next(counters)  # 10 J between two blocks, which are nobody's
    async with measured(meter, count, lambda: True):
        pass
    assert meter.energy.joules <= before + 10
    short = Meter(declared_w=1.0)
    async with measured(short, lambda: None, lambda: True):
        pass
    assert short.energy is not None, "too short for a second look, but it took its time"
    with pytest.raises(RuntimeError, match="of the block"):
        async with measured(meter, count, lambda: True):
            raise RuntimeError("of the block")
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "energy" and not task.cancelling()]
