"""Packed rows are their examples side by side and nothing more; the endless stream shuffles whole epochs."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch

from agent import loading
from agent.batches import endless, pack, pad, summed_loss, token_losses
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


def test_logits_are_formed_where_a_token_is_a_target_and_the_gradient_is_torchs_own(model: Any, tokenizer: Any) -> None:
    batch = pad([encode(Example(b"", *text), tokenizer, 64) for text in TEXTS], tokenizer.pad_token_id)
    shapes: list[tuple[int, ...]] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _head, _inputs, logits: shapes.append(tuple(logits.shape)))
    weight = next(model.parameters()).requires_grad_()
    try:
        (ours,) = torch.autograd.grad(summed_loss(model, batch), weight)
        whole = {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels, "use_cache": False}
        (theirs,) = torch.autograd.grad(model(**whole).loss * batch.n_targets, weight)
    finally:
        hook.remove()
        weight.requires_grad_(False)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    vocabulary = model.config.vocab_size
    assert shapes == [(1, batch.n_targets, vocabulary), (*batch.ids.shape, vocabulary)]
    assert batch.n_targets < batch.ids.numel()


def test_a_model_that_does_not_name_its_head_has_the_same_loss(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pad([encode(Example(b"", *text), tokenizer, 64) for text in TEXTS], tokenizer.pad_token_id)
    expected = summed_loss(model, batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(summed_loss(model, batch), expected)


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
