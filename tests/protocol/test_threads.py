"""Files are opened by several threads at a time, also for the first time: msgspec must have worked their types out before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from protocol.adapters import Factors
from protocol.models import write_model
from protocol.updates import write_update

SCRIPT = """
import sys, threading
from pathlib import Path
from protocol.models import read_model
from protocol.updates import open_update

update, model = map(Path, sys.argv[1:])
sys.setswitchinterval(1e-6)
together = threading.Barrier(16)

def work(opened):
    together.wait()
    opened()

ways = [lambda: open_update(update, "lora", job="j", round=1, attempt=0, max_bytes=2**20), lambda: read_model(model, max_bytes=2**20)]
threads = [threading.Thread(target=work, args=[way]) for way in ways * 8]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_the_first_files_may_be_opened_by_many_threads(tmp_path: Path) -> None:
    adapter = {"m": Factors(a=np.ones((1, 3), np.float32), b=np.ones((2, 1), np.float32))}
    write_update(tmp_path / "update", adapter, job="j", round=1, attempt=0, dtype="fp32", kind="lora", scores={})
    write_model(tmp_path / "model", adapter, version=1, dtype="fp32")
    for _ in range(5):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "update"), str(tmp_path / "model")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
