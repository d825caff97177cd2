"""Whose memory on the GPU is whose, and the bound that torch keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agent.gpus import gpus, usage

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA on this machine"),
]

HOLD = "import torch; x = torch.ones(2**28, device='cuda'); print('ready', flush=True); import time; time.sleep(600)"
BOUNDED = """
import torch
from agent.trainers.bound import CONTEXT_BYTES, bound
device = torch.device("cuda:0")
bound(device, CONTEXT_BYTES + 2**29)
held = torch.ones(2**26, device=device)
try:
    torch.ones(2**27, device=device)
except torch.OutOfMemoryError:
    print("refused")
bound(device, 0)
torch.ones(2**27, device=device)
print("allowed")
"""


def test_what_the_child_holds_is_its_own() -> None:
    gpu = gpus([])[0][0]
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            seen = usage(gpu.index, [child.pid])
        finally:
            child.kill()
    assert seen is not None
    if seen.own_bytes is None:
        pytest.skip("the driver does not know our process ids (a container of its own?)")
    assert 2**30 <= seen.own_bytes < 2**31
    assert seen.other_ratio is None or 0 <= seen.other_ratio <= 1


def test_beyond_the_bound_there_is_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "allowed"]
