"""What the agent adds to training: its trainer beside the same QLoRA loop written directly against PEFT.

    OMP_NUM_THREADS=1 python -m bench.training        an hour or more on a busy machine; --only demo: the small base
    python -m bench.training --json                   the figures as JSON on standard output
    python -m bench.training --device cuda            where there is one; CPU seconds say little there, wall seconds count

The agent's side is the real trainer on a real task: text read and tokenized as it goes, losses checked, memory metered,
importance observed, every event encoded as for the daemon.  The plain side is transformers, PEFT's LoraConfig and AdamW, on
text that was tokenized before the clock started.  Base, bits, adapter, batches, rate and clipping are the same, so the losses are too.

The two take turns of a few steps in one process, so what else the machine does disturbs both alike.  A pair is one run of each;
`ratio` is the agent's samples per second over the plain loop's, the median over pairs.  A checkpoint is timed by itself
and counted once in the minute that lies between two.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict

import torch
from torch.nn.utils.rnn import pad_sequence

from agent import child, loading
from agent.batches import Batch, endless
from agent.child import Stepped, TrainTask
from agent.data import DataConfig, split
from agent.data.tokens import IGNORED
from agent.trainers.lora import scale_of
from agent.trainers.qlora import QLora, draw_seed
from fedpipe import corpus, pretrain
from fedpipe.corpus import Pair
from protocol.messages import Base, Bits, Plan, Training

RANK: Final = 16
"""Of every matrix on both sides."""
RATE: Final = 1e-3
N_PAIRS: Final = 1600
N_WARM_UP: Final = 2
"""Steps before the clock starts: the optimizer makes its state in the first."""
TURN: Final = 4
"""Steps of one side before it is the other's turn."""
PAIR_TOKENS: Final = 48
"""Of the demo's text, in most pairs; so many are joined to an example that it is about as long as a row."""


class Setting(NamedTuple):
    """One line of the table."""

    base: str
    bits: Bits
    batch: int
    max_tokens: int
    has_prompts: bool = False
    """Half of the text is prompts, which are read and not learnt; otherwise every token is learnt."""

    def __str__(self) -> str:
        """As the table shows it."""
        return f"{self.base}, {self.bits}, {self.batch} x {self.max_tokens}" + ", prompts" * self.has_prompts


class Spent(NamedTuple):
    """Of one turn or run."""

    cpu_s: float
    wall_s: float


class Row(TypedDict):
    """One setting's figures; ratios are the agent's samples per second over the plain loop's."""

    setting: str
    ratio: float
    ratio_with_checkpoints: float
    ratio_wall: float
    worst_ratio: float
    plain_samples_per_cpu_s: float
    checkpoint_cpu_s: float
    loss: float
    loss_gap: float


class Run(NamedTuple):
    """One pair: the same steps on both sides."""

    agent: Spent
    plain: Spent
    checkpoint: Spent
    losses: list[float]
    """Of each step."""
    plain_losses: list[float]


SETTINGS: Final = [
    Setting(base, bits, *shape)
    for base in ("demo", "512 x 4")
    for bits in ("none", "nf4")
    for shape in ((8, 96), (4, 256), (4, 256, True))
]


HEAD: Final = """\
| setting | ratio | with checkpoints | by the wall clock | worst pair | plain, samples/CPU s | last loss | gap |
|---|---|---|---|---|---|---|---|"""


def agent_steps(trainer: QLora, task: TrainTask) -> Generator[float]:
    """The losses of the real trainer's steps; every event goes where the daemon's pipe would be."""
    with Path(os.devnull).open("wb") as pipe, closing(trainer.train(task)) as running:
        for event in running:
            pipe.write(child.encode(event))
            pipe.flush()
            if isinstance(event, Stepped):
                assert event.loss is not None
                yield event.loss


class Plain:
    """QLoRA as one writes it against PEFT."""

    def __init__(self, task: TrainTask) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        plan, device = task.plan, loading.pick_device(task.device)
        assert plan.train is not None
        self.training, self.device = plan.train, device
        dtype = torch.bfloat16 if loading.compute_type(Path(task.base_folder), device) == "bf16" else torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        base = AutoModelForCausalLM.from_pretrained(
            task.base_folder,
            dtype=dtype,
            quantization_config=quantization if plan.bits == "nf4" else None,
            device_map={"": str(device)},
        )
        base.config.use_cache = False
        (rank,) = set(plan.ranks.values())
        torch.manual_seed(draw_seed(plan, "adapter"))
        config = LoraConfig(r=rank, lora_alpha=scale_of(plan.alpha, rank) * rank, target_modules=list(plan.ranks))
        self.model = get_peft_model(base, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        tokenizer = AutoTokenizer.from_pretrained(task.base_folder)
        self.pad_id = tokenizer.pad_token_id
        parts = split.load(task.data, plan.data_seed, plan.held_out_ratio)
        drawn = endless(parts.train, tokenizer, self.training, draw_seed(plan, "order"))
        self.batches = [_rows(batch) for batch in islice(drawn, self.training.n_steps)]

    def steps(self) -> Generator[torch.Tensor]:
        """The loss of each step; reading it is left to who wants it."""
        training = self.training
        optimizer = torch.optim.AdamW(
            self.parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        self.model.train()
        for rows in self.batches:
            ids = pad_sequence([row for row, _ in rows], batch_first=True, padding_value=self.pad_id)
            labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORED)
            mask = pad_sequence([torch.ones_like(row) for row, _ in rows], batch_first=True)
            loss = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), labels=labels.to(self.device)
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, training.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()


def _rows(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of each example, without the fill."""
    assert batch.mask is not None
    lengths = batch.mask.sum(1).tolist()
    return [
        (ids[:n].clone(), labels[:n].clone()) for ids, labels, n in zip(batch.ids, batch.labels, lengths, strict=True)
    ]


def compare(task: TrainTask, trainer: QLora) -> Run:
    """One pair, taking turns.  The task says where its checkpoint goes; its update is not kept."""
    assert task.plan.train is not None
    plain = Plain(task)
    sides: list[Generator[Any]] = [agent_steps(trainer, task), plain.steps()]
    losses: list[list[Any]] = [list(islice(side, N_WARM_UP)) for side in sides]
    gc.collect()
    spent: list[list[Spent]] = [[], []]
    for turn in range(-(-(task.plan.train.n_steps - N_WARM_UP) // TURN)):
        for which in (0, 1) if turn % 2 else (1, 0):
            n = min(TURN, task.plan.train.n_steps - len(losses[which]))
            began = _now(plain.device)
            losses[which] += islice(sides[which], n)
            spent[which].append(_since(began, plain.device))
    began = _now(plain.device)
    assert trainer.suspend() is not None
    checkpoint = _since(began, plain.device)
    for side in sides:
        side.close()
    return Run(_sum(spent[0]), _sum(spent[1]), checkpoint, losses[0], [float(loss) for loss in losses[1]])


def _now(device: torch.device) -> Spent:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Spent(time.process_time(), time.perf_counter())


def _since(began: Spent, device: torch.device) -> Spent:
    now = _now(device)
    return Spent(now.cpu_s - began.cpu_s, now.wall_s - began.wall_s)


def _sum(turns: Sequence[Spent]) -> Spent:
    return Spent(sum(turn.cpu_s for turn in turns), sum(turn.wall_s for turn in turns))


def task_for(base: Path, data: Path, folder: Path, bits: Bits, device: str, training: Training) -> TrainTask:
    """A round's share as a coordinator would ask for it, all matrices at RANK, with the agent's own defaults."""
    plan = Plan(
        job="bench",
        round=1,
        attempt=0,
        purpose="train",
        method="fedpipe",
        base=Base(source=str(base)),
        bits=bits,
        ranks={m.name: RANK for m in loading.survey(base)},
        train=training,
        issued_at=0.0,
        stop_after_s=3600.0,
        ttl_s=3600.0,
    )
    return TrainTask(
        plan=plan,
        base_folder=str(base),
        data=DataConfig(path=str(data)),
        out_file=str(folder / "update"),
        digest_cache=str(folder / "digests.json"),
        checkpoint=str(folder / "checkpoint"),
        device=device,
    )


def larger(demo: Path, folder: Path) -> Path:
    """A random Llama of 15 M parameters in 4 layers of width 512, with the tokenizer of the demo's base."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_text(pairs: Sequence[Pair], path: Path, max_tokens: int, *, has_prompts: bool) -> Path:
    """Put `pairs` together to examples of about `max_tokens`, with their prompts in front of all, or as a part of the text."""
    n = max_tokens // PAIR_TOKENS
    joined = [pairs[at : at + n] for at in range(0, len(pairs) - n + 1, n)]
    if has_prompts:
        texts = [Pair("".join(p.prompt for p in some), "".join(p.completion for p in some)) for some in joined]
    else:
        texts = [Pair("", "\n".join(p.prompt + p.completion for p in some)) for some in joined]
    corpus.write_jsonl(texts, path)
    return path


def measured(setting: Setting, base: Path, data: Path, options: argparse.Namespace) -> Row:
    """All pairs of one setting."""
    training = Training(
        n_steps=N_WARM_UP + options.steps, batch=setting.batch, learning_rate=RATE, max_tokens=setting.max_tokens
    )
    trainer, runs = QLora(), []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory() as folder:
            task = task_for(base, data, Path(folder), setting.bits, options.device, training)
            runs.append(compare(task, trainer))
            print(f"{setting}: {runs[-1].plain.cpu_s / runs[-1].agent.cpu_s:.3f}", file=sys.stderr, flush=True)
    return summary(setting, runs, options.steps, task.checkpoint_s)


def summary(setting: Setting, runs: Sequence[Run], n_steps: int, checkpoint_s: float) -> Row:
    """What one setting's pairs say, with a checkpoint every `checkpoint_s` of training."""
    ratios = [run.plain.cpu_s / run.agent.cpu_s for run in runs]
    checkpoint = statistics.median(run.checkpoint.cpu_s for run in runs)
    return Row(
        setting=str(setting),
        ratio=statistics.median(ratios),
        worst_ratio=min(ratios),
        ratio_with_checkpoints=statistics.median(ratios) * checkpoint_s / (checkpoint_s + checkpoint),
        ratio_wall=statistics.median(run.plain.wall_s / run.agent.wall_s for run in runs),
        plain_samples_per_cpu_s=statistics.median(n_steps * setting.batch / run.plain.cpu_s for run in runs),
        checkpoint_cpu_s=checkpoint,
        loss=runs[0].losses[-1],
        loss_gap=max(abs(a - b) for run in runs for a, b in zip(run.losses, run.plain_losses, strict=True)),
    )


def main() -> None:
    options = _options()
    loading.quiet()
    warnings.simplefilter("ignore")  # the libraries' advice, as in agent/worker.py
    with tempfile.TemporaryDirectory() as name:
        folder, demo = Path(name), pretrain.base_model()
        bases = {"demo": demo, "512 x 4": larger(demo, folder / "larger")}
        pairs = corpus.mine(corpus.STDLIB, limit=N_PAIRS)
        wanted = [s for s in SETTINGS if str(s).startswith(options.only)]
        texts = {
            (n, prompts): write_text(pairs, folder / f"{n}-{prompts}.jsonl", n, has_prompts=prompts)
            for n, prompts in {(s.max_tokens, s.has_prompts) for s in wanted}
        }
        if not options.json:
            print(HEAD)
        rows = []
        for setting in wanted:
            rows.append(measured(setting, bases[setting.base], texts[setting.max_tokens, setting.has_prompts], options))
            if not options.json:
                _print(rows[-1])
    if options.json:
        json.dump(rows, sys.stdout, indent=1)


def _print(row: Row) -> None:
    print(
        f"| {row['setting']} | {row['ratio']:.3f} | {row['ratio_with_checkpoints']:.3f} | {row['ratio_wall']:.3f} "
        f"| {row['worst_ratio']:.3f} | {row['plain_samples_per_cpu_s']:.1f} | {row['loss']:.4f} | {row['loss_gap']:.1e} |",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--steps", type=int, default=32, help="steps of a run that count (default 32)")
    parser.add_argument("--only", default="", help="settings whose name begins so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
