"""How well does a model answer on text it has not seen?  Loss per token always; the rest on request.

    loss             mean -log p over the tokens of the held-out completions, end token included
    perplexity       exp(loss)
    token_accuracy   share of these tokens that were the likeliest
    exact_match      share of samples whose greedy answer is the completion, up to white space
    rouge_l          mean F1 of the longest common subsequence of lower-case words (Lin, 2004: ROUGE-L)

The first three come from one forward pass.  The others generate: max_new_tokens forward passes per batch, by a plain greedy
loop, so that no sampling setting in a model's folder changes a number.  An unknown metric is left out of the answer, so that
an older agent can take part in a newer job.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Final, NamedTuple

import torch

from agent.batches import pad, token_losses
from agent.child import Stepped
from agent.data import Example
from agent.data.tokens import IGNORED, Tokens, encode
from protocol.messages import Evaluation

GENERATED: Final = frozenset({"exact_match", "rouge_l"})


class Score(NamedTuple):
    """The outcome over the samples that were reached.  loss is 0 when there were none (n_tokens = 0)."""

    n_samples: int
    n_tokens: int
    loss: float
    metrics: dict[str, float]


def evaluate(
    model: Any, tokenizer: Any, examples: Sequence[Example], wanted: Evaluation, *, batch: int, max_tokens: int
) -> Generator[Stepped, bool, Score]:
    """Score `model` on at most wanted.max_samples examples, always the same ones; send(True) ends it early.

    Leaves the model in the mode in which it was, with all gradients as they were.
    """
    # By key, which is a hash: a fixed random sample that new data hardly changes.
    chosen = sorted(examples, key=attrgetter("key"))[: wanted.max_samples]
    was_training = model.training
    model.eval()
    try:
        return (yield from _evaluate(model, tokenizer, chosen, wanted, batch, max_tokens))
    finally:
        model.train(was_training)


def _evaluate(
    model: Any, tokenizer: Any, chosen: Sequence[Example], wanted: Evaluation, batch: int, max_tokens: int
) -> Generator[Stepped, bool, Score]:
    started = time.monotonic()
    n_samples = n_tokens = n_hits = 0
    total = 0.0
    answers: list[tuple[str, str]] = []
    n_steps = -(-len(chosen) // batch)
    for step in range(n_steps):
        examples = chosen[step * batch : (step + 1) * batch]
        rows = [encode(example, tokenizer, max_tokens) for example in examples]
        padded = pad(rows, tokenizer.pad_token_id)
        with torch.no_grad():
            loss, hits = token_losses(model, padded)
        n_samples += padded.n_samples
        n_tokens += padded.n_targets
        n_hits += int(hits)
        total += float(loss)
        if GENERATED & set(wanted.metrics):
            prompts = [_prompt(row) for row in rows]
            written = greedy(model, tokenizer, prompts, wanted.max_new_tokens)
            answers += zip(written, (example.completion for example in examples), strict=True)
        mean = total / max(1, n_tokens)
        seconds = time.monotonic() - started
        if (
            yield Stepped(
                step=step + 1, n_steps=n_steps, samples=n_samples, loss=mean, tokens=n_tokens, seconds=seconds
            )
        ):
            break
    loss_per_token = total / max(1, n_tokens)
    return Score(
        n_samples, n_tokens, loss_per_token, _metrics(wanted, loss_per_token, n_hits / max(1, n_tokens), answers)
    )


def _prompt(row: Tokens) -> list[int]:
    first = next((at for at, label in enumerate(row.labels) if label != IGNORED), len(row.ids))
    return row.ids[:first]


def _metrics(
    wanted: Evaluation, loss: float, token_accuracy: float, answers: Sequence[tuple[str, str]]
) -> dict[str, float]:
    n = max(1, len(answers))
    known = {
        "perplexity": lambda: math.exp(min(loss, 700.0)),
        "token_accuracy": lambda: token_accuracy,
        "exact_match": lambda: sum(got.split() == want.split() for got, want in answers) / n,
        "rouge_l": lambda: sum(rouge_l(got, want) for got, want in answers) / n,
    }
    return {name: known[name]() for name in wanted.metrics if name in known}


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """The likeliest continuation, token by token, of each prompt; ends at the model's end token.  Prompts are not empty."""
    ends = _ends(model, tokenizer)
    longest = max(len(prompt) for prompt in prompts)
    pad_id = tokenizer.pad_token_id
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (rows, longest): the prompt starts at 0 behind its fill
    is_done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    cache, written = None, []
    for _ in range(max_new_tokens):
        seen = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        token = seen.logits[:, -1].argmax(-1)  # (rows,)
        is_done |= torch.isin(token, ends)
        written.append(token.masked_fill(is_done, pad_id))
        if is_done.all():
            break
        cache, ids = seen.past_key_values, written[-1][:, None]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = positions[:, -1:] + 1
    kept = torch.stack(written, 1).tolist()
    return [tokenizer.decode([i for i in row if i != pad_id], skip_special_tokens=True) for row in kept]


def _ends(model: Any, tokenizer: Any) -> torch.Tensor:
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = chain([tokenizer.eos_token_id], own if isinstance(own, list) else [own])
    return torch.tensor(sorted({i for i in ids if i is not None}), device=model.device, dtype=torch.long)


def rouge_l(got: str, want: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1.  Cost: O(n m) for n and m words."""
    a, b = got.lower().split(), want.lower().split()
    if not a or not b:
        return float(a == b)
    lengths = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, 1):
            previous, lengths[j] = lengths[j], previous + 1 if word == other else max(lengths[j], lengths[j - 1])
    common = lengths[-1]
    return 2 * common / (len(a) + len(b))
