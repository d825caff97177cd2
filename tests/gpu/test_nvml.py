"""The profiler against the driver's own tool, on a machine that has both."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.profiler import profile
from protocol.messages import Gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA driver on this machine"),
]

FIELDS = "index,name,driver_version,memory.total,memory.free,utilization.gpu,temperature.gpu,power.draw,compute_cap,mig.mode.current"


def smi() -> list[dict[str, str]]:
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nvidia-smi does not work here: {done.stdout.strip()[:200]}")
    rows = csv.reader(io.StringIO(done.stdout), skipinitialspace=True)
    return [dict(zip(FIELDS.split(","), row, strict=True)) for row in rows]


def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Gpu]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return profile(tmp_path).gpus


def test_agrees_with_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, expected = seen(tmp_path, monkeypatch), smi()
    assert [g.index for g in gpus] == [int(e["index"]) for e in expected]
    for gpu, want in zip(gpus, expected, strict=True):
        mib = 2**20
        assert gpu.name == want["name"]
        assert gpu.compute == want["compute_cap"]
        assert gpu.mig == (want["mig.mode.current"] == "Enabled")
        assert gpu.total_bytes == pytest.approx(float(want["memory.total"]) * mib, rel=0.01)
        assert gpu.free_bytes == pytest.approx(float(want["memory.free"]) * mib, abs=0.05 * gpu.total_bytes)
        assert gpu.temperature_c == pytest.approx(float(want["temperature.gpu"]), abs=8)
        if want["power.draw"].replace(".", "").isdigit():
            assert gpu.power_w == pytest.approx(float(want["power.draw"]), abs=0.5 * float(want["power.draw"]) + 30)
    assert profile(tmp_path).driver == expected[0]["driver_version"]


def test_hidden_devices_are_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [g.index for g in profile(tmp_path).gpus] == [0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert profile(tmp_path).gpus == []


def test_our_own_child_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    code = "import torch; x = torch.ones(2**28, device='cuda'); print('ready', flush=True); input()"
    before = seen(tmp_path, monkeypatch)[0]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            pytest.skip("torch cannot use this GPU")
        during = seen(tmp_path, monkeypatch)[0]
        child.stdin.write("\n")
    assert during.free_bytes <= before.free_bytes - 2**29
    assert during.n_other_processes == before.n_other_processes
