"""Tokenized examples -> tensors: padded to the longest of a batch, or packed.

Padding: one example per row, filled up on the right; the attention mask hides the fill.

Packing: each row holds several whole examples, at most max_tokens.  Positions start at 0 with every example and no attention
mask is given: from the restarts transformers builds a block-diagonal causal mask, so no token attends to another example
(tested: a packed row gives the logits of its examples alone).  The first token of an example is never a target, so its
neighbour's last token predicts nothing.  The fill at the row's end is one more example without targets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from agent.data import Example
from agent.data.tokens import IGNORED, Tokens, encode, packed
from protocol.messages import Training


class Batch(NamedTuple):
    """One micro-batch.  Shapes: ids, labels, mask, positions (rows, longest) int64; either mask or positions is None."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    row_samples: tuple[int, ...]
    n_targets: int

    @property
    def n_samples(self) -> int:
        """Examples in all rows."""
        return sum(self.row_samples)

    def split(self, n_rows: int) -> tuple[Batch, Batch]:
        """The first `n_rows` rows and the others, in the same padding."""
        first, rest = slice(None, n_rows), slice(n_rows, None)
        return self._part(first), self._part(rest)

    def _part(self, rows: slice) -> Batch:
        labels = self.labels[rows]
        return Batch(
            ids=self.ids[rows],
            labels=labels,
            mask=None if self.mask is None else self.mask[rows],
            positions=None if self.positions is None else self.positions[rows],
            row_samples=self.row_samples[rows],
            n_targets=int((labels[:, 1:] != IGNORED).sum()),
        )


def pad(rows: Sequence[Tokens], pad_id: int) -> Batch:
    """One example per row."""
    longest = max(len(row.ids) for row in rows)
    return Batch(
        ids=torch.tensor([_fill(row.ids, pad_id, longest) for row in rows]),
        labels=torch.tensor([_fill(row.labels, IGNORED, longest) for row in rows]),
        mask=torch.tensor([_fill([1] * len(row.ids), 0, longest) for row in rows]),
        positions=None,
        row_samples=(1,) * len(rows),
        n_targets=sum(row.n_targets for row in rows),
    )


def pack(rows: Sequence[Sequence[Tokens]], pad_id: int) -> Batch:
    """Several examples per row; what they have in common is the row and nothing else."""
    longest = max(sum(len(tokens.ids) for tokens in row) for row in rows)
    fills = [longest - sum(len(tokens.ids) for tokens in row) for row in rows]
    ids = [[i for tokens in row for i in tokens.ids] + [pad_id] * fill for row, fill in zip(rows, fills, strict=True)]
    labels = [[i for tokens in row for i in tokens.labels] for row in rows]
    positions = [
        [i for tokens in row for i in range(len(tokens.ids))] + list(range(fill))
        for row, fill in zip(rows, fills, strict=True)
    ]
    return Batch(
        ids=torch.tensor(ids),
        labels=torch.tensor([_fill(row, IGNORED, longest) for row in labels]),
        mask=None,
        positions=torch.tensor(positions),
        row_samples=tuple(len(row) for row in rows),
        n_targets=sum(tokens.n_targets for row in rows for tokens in row),
    )


def _fill(row: list[int], value: int, longest: int) -> list[int]:
    return row + [value] * (longest - len(row))


def endless(
    examples: Sequence[Example], tokenizer: Any, training: Training, seed: int, *, skip: int = 0
) -> Iterator[Batch]:
    """Micro-batches for ever: each epoch is a fresh shuffle that only the seed and the epoch's number decide.

    An epoch's end does not cut a batch short: the next one fills it up.  `skip` leaves out so many examples, without a look
    at their text: behind whole batches, packed or not, come the batches that would have come.
    """
    first, at = divmod(skip, len(examples))
    epochs = chain.from_iterable(_shuffled(examples, f"{seed}/{epoch}") for epoch in count(first))
    tokens = (encode(example, tokenizer, training.max_tokens) for example in islice(epochs, at, None))
    if training.packing:
        rows = packed(tokens, training.max_tokens)
        while True:
            yield pack(list(islice(rows, training.batch)), tokenizer.pad_token_id)
    else:
        while True:
            yield pad(list(islice(tokens, training.batch)), tokenizer.pad_token_id)


def _shuffled(examples: Sequence[Example], seed: str) -> list[Example]:
    return random.Random(seed).sample(examples, len(examples))


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Forward pass: the sum of -log p over the batch's targets, a scalar with gradient.

    Logits are formed where a token is a target and nowhere else: a prompt and the fill cost none, which with a vocabulary of
    100,000 is most of the memory of a short answer.  Cost: two fp32 copies of them, targets x vocabulary.
    """
    return _summed_loss(*_predicted(model, batch))


def token_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`summed_loss`, and how many targets were the likeliest token: one more look at all logits."""
    logits, labels = _predicted(model, batch)
    with torch.no_grad():
        hits = (logits.argmax(-1) == labels).sum()
    return _summed_loss(logits, labels), hits


def _predicted(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (targets, vocabulary) and the token that each of them predicts (targets,)."""
    device = model.device
    move = {"non_blocking": device.type == "cuda"}
    # The label moves to the position that predicts it; shifting labels instead of logits saves a copy of the logits.
    following = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
    at = (following != IGNORED).nonzero().flatten()
    labels, at = following[at].to(device, **move), at.to(device, **move)
    is_picked = False

    def pick(_head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal is_picked
        is_picked = True
        hidden, *others = inputs
        return hidden.flatten(0, 1).index_select(0, at).unsqueeze(0), *others

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        logits = model(
            input_ids=batch.ids.to(device, **move),
            attention_mask=None if batch.mask is None else batch.mask.to(device, **move),
            position_ids=None if batch.positions is None else batch.positions.to(device, **move),
            use_cache=False,
        ).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if is_picked else logits.flatten(0, 1).index_select(0, at), labels


def _summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")
