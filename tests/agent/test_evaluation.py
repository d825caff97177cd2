"""Metrics are arithmetic that a reader can check; generation is the plain greedy loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agent import loading
from agent.child import Stepped
from agent.data import Example
from agent.evaluation import Score, evaluate, greedy, rouge_l
from protocol.messages import Evaluation

EXAMPLES = [Example(bytes([n]), f"number {n} is", f" {n} and {n}") for n in range(7)]


@pytest.fixture(scope="module")
def loaded(llama_folder: Path) -> loading.Loaded:
    return loading.load(llama_folder, "nf4", torch.device("cpu"))


def score(
    loaded: loading.Loaded, examples: list[Example], stop_at: int | None = None, **wanted: Any
) -> tuple[Score, int]:
    running = evaluate(loaded.model, loaded.tokenizer, examples, Evaluation(**wanted), batch=3, max_tokens=64)
    stop, n = False, 0
    try:
        while True:
            event = running.send(stop) if n else next(running)
            assert isinstance(event, Stepped)
            n += 1
            stop = n == stop_at
    except StopIteration as end:
        return end.value, n


def test_the_loss_is_per_token_and_does_not_depend_on_the_batch(loaded: loading.Loaded) -> None:
    loaded.model.train()
    whole, n_events = score(
        loaded, EXAMPLES, metrics=["perplexity", "token_accuracy", "exact_match", "rouge_l"], max_new_tokens=3
    )
    assert n_events == 3
    assert loaded.model.training
    singles = [score(loaded, [example], metrics=["token_accuracy"])[0] for example in EXAMPLES]
    n = sum(single.n_tokens for single in singles)
    assert whole.n_tokens == n
    assert whole.n_samples == 7
    assert whole.loss == pytest.approx(sum(s.loss * s.n_tokens for s in singles) / n, rel=1e-4)
    assert whole.metrics["perplexity"] == pytest.approx(math.exp(whole.loss))
    assert whole.metrics["token_accuracy"] == pytest.approx(
        sum(s.metrics["token_accuracy"] * s.n_tokens for s in singles) / n
    )
    assert whole.metrics.keys() == {"perplexity", "token_accuracy", "exact_match", "rouge_l"}


def test_a_limit_takes_the_same_sample_from_any_order(loaded: loading.Loaded) -> None:
    first, _ = score(loaded, EXAMPLES, max_samples=4)
    again, _ = score(loaded, EXAMPLES[::-1], max_samples=4)
    assert first == again
    assert first.n_samples == 4


def test_it_can_be_stopped_and_can_have_nothing_to_do(loaded: loading.Loaded) -> None:
    stopped, n_events = score(loaded, EXAMPLES, stop_at=1)
    assert (stopped.n_samples, n_events) == (3, 1)
    assert score(loaded, [], metrics=["exact_match"]) == (Score(0, 0, 0.0, {"exact_match": 0.0}), 0)


def test_greedy_is_the_libraries_own_greedy_search(loaded: loading.Loaded) -> None:
    from transformers import GenerationConfig

    prompts = [
        loaded.tokenizer(text)["input_ids"] for text in ("name [ Iron Fox ]", "near", "a longer prompt than those =>")
    ]
    ours = greedy(loaded.model, loaded.tokenizer, prompts, 8)
    pad, eos = loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id
    plain = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=pad, eos_token_id=eos, use_cache=True)
    for prompt, got in zip(prompts, ours, strict=True):
        theirs = loaded.model.eval().generate(input_ids=torch.tensor([prompt]), generation_config=plain)
        assert got == loaded.tokenizer.decode(theirs[0, len(prompt) :], skip_special_tokens=True)


def test_exact_match_sees_the_greedy_answer(loaded: loading.Loaded) -> None:
    prompt = "name [ Iron Fox ]"
    (answer,) = greedy(loaded.model, loaded.tokenizer, [loaded.tokenizer(prompt)["input_ids"]], 6)
    right, wrong = Example(b"a", prompt, f"  {answer}\n"), Example(b"b", prompt, "something else entirely")
    found, _ = score(loaded, [right, wrong], metrics=["exact_match"], max_new_tokens=6)
    assert found.metrics == {"exact_match": 0.5}


def test_rouge_l_by_hand() -> None:
    assert rouge_l("the cat sat", "The cat sat") == 1.0
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)
    assert rouge_l("a b c d", "b d") == pytest.approx(2 * 2 / 6)
    assert rouge_l("", "a") == 0.0
    assert rouge_l("", "") == 1.0


words = st.lists(st.sampled_from("abc"), max_size=12).map(" ".join)


@given(words, words)
def test_rouge_l_is_a_symmetric_share(one: str, other: str) -> None:
    assert 0.0 <= rouge_l(one, other) == rouge_l(other, one) <= 1.0
    assert (rouge_l(one, other) == 1.0) == (one == other)
