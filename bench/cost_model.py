"""Predicted against measured: python bench/cost_model.py.  Calibrates random models as an agent would, then trains otherwise.

For each model shape and width a fresh process runs the micro-benchmark, fits the cost model, and then runs configurations that
the benchmark did not: mixed ranks per matrix, some matrices only, other batches, skipped blocks, a global adapter,
checkpointing.  Prints predicted / measured for each and the median relative errors.  Time is the fastest of two runs over the
same three micro-batches, on a CPU in CPU seconds of one thread, so that a busy machine does not matter; memory as in
Finished.peak_bytes.

    --quick         nf4 only (3 minutes)           --json FILE    the same as data
    --device cuda   larger models, longer text     --bits nf4,none
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.batches import Batch
    from agent.loading import Loaded
    from coordinator.planner.cost import CostModel, Setting
    from protocol.messages import Matrix


class Llama(NamedTuple):
    """A model's shape."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "cpu": [
        Llama(512, 1408, 8, 8, 8, 8000),  # 33 M parameters
        Llama(768, 2048, 10, 12, 4, 16000),  # 88 M, grouped queries
        Llama(384, 1024, 20, 6, 6, 2048),  # 37 M, deep
    ],
    "cuda": [
        Llama(2048, 5632, 22, 32, 4, 32000),  # 1.1 G, grouped queries
        Llama(1024, 2816, 24, 16, 16, 50304),  # 0.4 G, wide vocabulary
        Llama(4096, 11008, 8, 32, 32, 32000),  # 1.9 G, a quarter of a 7B
    ],
}
MAX_TOKENS = {"cpu": 64, "cuda": 512}
SECONDS = {"cpu": 45.0, "cuda": 25.0}
CLOCK = {"cpu": time.process_time, "cuda": time.perf_counter}
BATCHES = {"cpu": [1, 2, 4, 8], "cuda": [1, 2, 4, 8, 16]}


def build(shape: Llama, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="a"))  # noqa: S106 - no password
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)  # noqa: S106


def text(size: int, max_tokens: int, vocabulary: int, seed: int) -> Iterator[Batch]:
    """Micro-batches of random tokens whose lengths vary as those of real text do."""
    from agent.batches import pad
    from agent.data.tokens import Tokens

    rng = random.Random(seed)
    while True:
        rows = []
        for _ in range(size):
            ids = [rng.randrange(vocabulary) for _ in range(rng.randint(max_tokens // 4, max_tokens))]
            rows.append(Tokens(ids=ids, labels=ids))
        yield pad(rows, 0)


def held_out(matrices: list[Matrix], n_layers: int, rng: random.Random) -> tuple[dict[str, int], dict[str, int], bool]:
    """Ranks, ranks of the global adapter and checkpointing that no point of the benchmark has."""
    from protocol.memory import block

    skip = rng.choice([0, 0, n_layers // 4, n_layers // 2, 3 * n_layers // 4])
    share = rng.choice([0.3, 0.6, 1.0])
    ranks = {
        m.name: rng.choice([1, 2, 4, 8, 16, 32, 64]) for m in matrices if block(m.name) >= skip and rng.random() < share
    }
    frozen = dict.fromkeys((m.name for m in matrices), rng.choice([8, 32])) if rng.random() < 0.4 else {}
    return ranks, frozen, rng.random() < 0.3


def one(shape: Llama, bits: Any, device: str, n_held_out: int) -> dict[str, Any]:
    """Everything for one shape and width, in this process."""
    import torch

    from agent import loading
    from agent.trainers import benchmark
    from agent.trainers.meter import held_bytes
    from coordinator.planner import cost
    from protocol.memory import block
    from protocol.messages import Calibrated, Calibration, Surveyed

    max_tokens = MAX_TOKENS[device]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(shape, folder)
        base = loading.load(folder, bits, torch.device(device if device == "cpu" else "cuda:0"))
        surveyed = Surveyed(
            base_sha256="0" * 64,
            matrices=loading.matrices(base.model),
            n_train=1,
            n_eval=0,
            dimensions=loading.dimensions(folder),
        )
        began = time.monotonic()
        running = benchmark.measure(
            base,
            lambda size: text(size, max_tokens, shape.vocabulary, 1),
            Calibration(batches=BATCHES[device]),
            bits=bits,
            dimensions=surveyed.dimensions,
            limit_bytes=0,
            deadline=began + SECONDS[device],
            clock=CLOCK[device],
        )
        try:
            while True:
                next(running)
        except StopIteration as end:
            found = end.value
        seconds = time.monotonic() - began
        benchmark.give_back()
        held = held_bytes(base.device)
        calibrated = Calibrated(
            device=device, compute=base.compute, probe_rank=1, scores=b"", points=found.points, notes=found.notes
        )
        model = cost.fit(surveyed, calibrated)
        rng = random.Random(f"{shape}{bits}")
        rows = []
        for _ in range(n_held_out):
            ranks, frozen, checkpointing = held_out(surveyed.matrices, shape.layers, rng)
            if not ranks:
                continue
            size = rng.choice(BATCHES[device][1:])
            batches = list(islice(text(size, max_tokens, shape.vocabulary, rng.randrange(10**6)), 3))
            tokens = [batch.ids.numel() for batch in batches]
            setting = cost.Setting(
                bits=bits,
                n_tokens_mean=statistics.fmean(tokens),
                n_tokens_max=max(tokens),
                ranks=ranks,
                frozen=frozen,
                checkpointing=checkpointing,
                skip=min(block(n) for n in ranks),
            )
            rows.append(compared(base, model, setting, batches, surveyed.matrices))
        fitted = [
            {
                "point": f"{p.batch}/{p.n_tokens:.0f}/r{p.rank}/s{p.skip}/f{p.frozen_rank}/{'c' if p.checkpointing else '-'}",
                "step_s": p.step_s,
                "peak_bytes": p.peak_bytes,
            }
            for p in found.points
        ]
    return {
        "shape": list(shape),
        "bits": bits,
        "compute": base.compute,
        "calibration_s": seconds,
        "points": fitted,
        "notes": found.notes,
        "held_bytes": held,
        "held_out": rows,
    }


def compared(
    base: Loaded, model: CostModel, setting: Setting, batches: list[Batch], matrices: list[Matrix]
) -> dict[str, Any]:
    """One configuration, really trained."""
    import numpy as np

    from agent.trainers.benchmark import checkpointed, give_back
    from agent.trainers.loop import MicroBatch, fit
    from agent.trainers.lora import adapted
    from agent.trainers.meter import Meter, held_bytes
    from protocol.adapters import Factors
    from protocol.messages import Training

    frozen = {
        m.name: Factors(
            a=np.full((setting.frozen[m.name], m.d_in), 1e-3, np.float32),
            b=np.zeros((m.d_out, setting.frozen[m.name]), np.float32),
        )
        for m in matrices
        if m.name in setting.frozen
    }
    give_back()
    held = held_bytes(base.device)
    meter, times, clock = Meter(), [], CLOCK[base.device.type]
    training = Training(n_steps=1 + 2 * len(batches), batch=len(batches[0].ids), learning_rate=1e-6)
    with (
        adapted(base.model, frozen, setting.ranks, 2.0, 0) as model_,
        checkpointed(base.model, is_on=setting.checkpointing),
    ):
        meter.watch(base.device)
        before = clock()
        for _ in fit(
            model_.model,
            cycle([batches[-1], *batches[:-1]]),
            model_.parameters,
            training,
            micro_batch=MicroBatch(training.batch),
            after_forward=meter.see,
        ):
            if base.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            now = clock()
            times.append(now - before)
            before = now
    n = len(batches)
    step_s = statistics.fmean(min(times[1 + i], times[1 + n + i]) for i in range(n))
    predicted_s, predicted_bytes = model.predict(setting)
    return {
        "setting": f"batch {training.batch} ({setting.n_tokens_max} tokens), {len(setting.ranks)} of {len(matrices)} matrices, "
        f"ranks {sum(setting.ranks.values())}, skip {setting.skip}, global {max(setting.frozen.values(), default=0)}"
        + (", checkpointing" if setting.checkpointing else ""),
        "step_s": step_s,
        "predicted_s": predicted_s,
        "peak_bytes": meter.peak_bytes,
        "predicted_bytes": predicted_bytes,
        "held_bytes": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bits", default="none,int8,nf4")
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", type=int, default=3, help="only the first so many")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        shape, bits = json.loads(asked.one)
        print(json.dumps(one(Llama(*shape), bits, asked.device, asked.held_out)))
        return
    results = []
    for shape in SHAPES[asked.device][: asked.shapes]:
        for bits in ["nf4"] if asked.quick else asked.bits.split(","):
            command = [sys.executable, __file__, "--one", json.dumps([shape, bits]), "--device", asked.device]
            command += ["--held-out", str(asked.held_out)]
            paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
            environment = {"OMP_NUM_THREADS": "1"} | os.environ | paths
            said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
            results.append(json.loads(said.splitlines()[-1]))
            show(results[-1])
    for name, key in [("memory", "bytes"), ("time", "s")]:
        found = errors([row for result in results for row in result["held_out"]], key)
        print(f"{name}: median error {statistics.median(found):.1%}, largest {max(found):.1%} of {len(found)}")
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1))


def errors(rows: list[dict[str, Any]], key: str) -> list[float]:
    measured = {"s": "step_s", "bytes": "peak_bytes"}[key]
    return [abs(row[f"predicted_{key}"] / row[measured] - 1) for row in rows]


def show(result: dict[str, Any]) -> None:
    shape = Llama(*result["shape"])
    print(
        f"\n{shape}, {result['bits']}, {result['compute']}: calibrated in {result['calibration_s']:.1f} s", flush=True
    )
    for point in result["points"]:
        print(f"  point {point['point']:30} {point['step_s'] * 1e3:8.1f} ms {point['peak_bytes'] / 2**20:8.0f} MiB")
    for note in result["notes"]:
        print("  note", note)
    for row in result["held_out"]:
        time_, bytes_ = row["predicted_s"] / row["step_s"], row["predicted_bytes"] / row["peak_bytes"]
        print(
            f"  time {time_:5.2f}  memory {bytes_:5.2f}   {row['step_s'] * 1e3:7.1f} ms"
            f" {row['held_bytes'] / 2**20:6.0f} -> {row['peak_bytes'] / 2**20:6.0f} MiB  {row['setting']}"
        )
    for name, key in [("memory", "bytes"), ("time", "s")]:
        print(f"  median error of {name} {statistics.median(errors(result['held_out'], key)):.1%}", flush=True)


if __name__ == "__main__":
    main()
