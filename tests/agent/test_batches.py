"""Packed rows are their examples side by side and nothing more; the endless stream shuffles whole epochs."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch

from agent import loading
from agent.batches import endless, pack, pad, token_losses
from agent.data import Example
from agent.data.tokens import IGNORED, encode
from protocol.messages import Training

TEXTS = [("a name is", " Iron Fox"), ("", "plain text without prompt"), ("near the river", " it is."), ("x", " y")]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return loading.load(request.getfixturevalue(f"{request.param}_folder"), "none", torch.device("cpu")).model


def test_a_packed_row_gives_the_logits_of_its_examples_alone(model: Any, tokenizer: Any) -> None:
    rows = [encode(Example(b"", *text), tokenizer, 64) for text in TEXTS]
    batch = pack([rows[:3], rows[3:]], tokenizer.pad_token_id)
    assert batch.mask is None
    with torch.no_grad():
        together = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        start = 0
        for tokens in rows[:3]:
            alone = model(input_ids=torch.tensor([tokens.ids]), use_cache=False).logits[0]
            torch.testing.assert_close(together[0, start : start + len(tokens.ids)], alone, atol=1e-4, rtol=1e-4)
            start += len(tokens.ids)
        packed_loss, packed_hits = token_losses(model, batch)
        padded_loss, padded_hits = token_losses(model, pad(rows, tokenizer.pad_token_id))
    torch.testing.assert_close(packed_loss, padded_loss, atol=1e-3, rtol=1e-5)
    assert packed_hits == padded_hits


def test_no_packed_prompt_and_no_border_is_learnt(tokenizer: Any) -> None:
    rows = [encode(Example(b"", *text), tokenizer, 64) for text in TEXTS]
    batch = pack([rows], tokenizer.pad_token_id)
    start = 0
    for (prompt, _), tokens in zip(TEXTS, rows, strict=True):
        n_hidden = max(1, len(tokenizer(prompt)["input_ids"]))
        labels = batch.labels[0, start : start + len(tokens.ids)].tolist()
        assert labels == [IGNORED] * n_hidden + tokens.ids[n_hidden:]
        start += len(tokens.ids)
    assert batch.n_samples == 4
    assert batch.n_targets == sum(tokens.n_targets for tokens in rows) == (batch.labels != IGNORED).sum()


def test_the_loss_is_torchs_own(model: Any, tokenizer: Any) -> None:
    rows = [encode(Example(b"", *text), tokenizer, 64) for text in TEXTS]
    batch = pad(rows, tokenizer.pad_token_id)
    loss, hits = token_losses(model, batch)
    theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels, use_cache=False)
    torch.testing.assert_close(loss / batch.n_targets, theirs.loss)
    assert hits == (theirs.logits[:, :-1].argmax(-1) == batch.labels[:, 1:]).sum()


@pytest.mark.parametrize("packing", [False, True])
def test_the_stream_is_whole_epochs_and_only_the_seed_decides(tokenizer: Any, packing: bool) -> None:
    examples = [Example(bytes([n]), "p", f" number {n}") for n in range(10)]
    training = Training(n_steps=1, batch=4, max_tokens=32, packing=packing)

    def first(n: int, seed: int) -> list[list[int]]:
        return [row for batch in islice(endless(examples, tokenizer, training, seed), n) for row in batch.ids.tolist()]

    assert first(5, 1) == first(5, 1) != first(5, 2)
    if not packing:
        seen = [tuple(i for i in row if i != tokenizer.pad_token_id) for row in first(5, 1)]
        assert set(Counter(seen).values()) == {2}
        assert set(seen[:10]) == set(seen[10:])
        assert seen[:10] != seen[10:]
