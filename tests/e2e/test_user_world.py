"""What is exported in the programs that people use: lm-eval scores the merged model and base + adapter alike, without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from coordinator.export import export_peft
from coordinator.lineage import Card
from coordinator.merge import merge
from coordinator.shards import read_tensors
from protocol.adapters import Adapter, Factors

PROGRAM = shutil.which("lm_eval") or ""
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not PROGRAM, reason="lm_eval is not installed: pip install lm-eval"),
]

CARD = Card(job="j", method="qlora", base_source="base", base_sha256="", adapter_sha256="")
TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
EXAMPLES = [
    {"prompt": "def add(a, b):", "completion": " Return the sum of a and b."},
    {"prompt": "def size(folder):", "completion": " Return how many bytes a folder takes."},
]


def adapter(base: Path) -> Adapter:
    """Small changes of mixed rank to every matrix of the blocks."""
    rng = np.random.default_rng(1)
    found = {}
    for i, (name, tensor) in enumerate(sorted(read_tensors(base / "model.safetensors").items())):
        if "layers" in name and len(tensor.shape) == 2:
            d_out, d_in = tensor.shape
            a, b = rng.normal(size=(1 + i % 3, d_in), scale=0.1), rng.normal(size=(d_out, 1 + i % 3), scale=0.1)
            found[name.removesuffix(".weight")] = Factors(a.astype(np.float32), b.astype(np.float32))
    return found


def log_perplexity(model: str, folder: Path) -> float:
    """What lm-eval finds for `--model_args model`; its logarithm, since small models are far off."""
    tasks, out = folder / "tasks", folder / "out"
    tasks.mkdir(exist_ok=True)
    (tasks / "mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in EXAMPLES))
    (tasks / "mine.yaml").write_text(TASK.format(data=tasks / "mine.jsonl"))
    shutil.rmtree(out, ignore_errors=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    words = ["--model", "hf", "--model_args", f"{model},dtype=float32", "--include_path", tasks, "--tasks", "mine"]
    words += ["--device", "cpu", "--output_path", out]
    done = subprocess.run(
        [PROGRAM, *map(str, words)], env=os.environ | offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = out.rglob("results_*.json")
    return float(np.log(json.loads(found.read_text())["results"]["mine"]["perplexity,none"]))


def test_lm_eval_scores_the_merged_model_like_base_and_adapter(base: Path, tmp_path: Path) -> None:
    export_peft(adapter(base), tmp_path / "adapter", card=CARD)
    merge(base, adapter(base), tmp_path / "merged", card=CARD)
    merged = log_perplexity(f"pretrained={tmp_path / 'merged'}", tmp_path)
    together = log_perplexity(f"pretrained={base},peft={tmp_path / 'adapter'}", tmp_path)
    alone = log_perplexity(f"pretrained={base}", tmp_path)
    assert merged == pytest.approx(together, rel=1e-3)
    assert abs(merged - alone) > 0.01
