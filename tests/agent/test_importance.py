"""Scores of matrices: they are what a dense decomposition would say, on any base, without moving the model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent import loading
from agent.batches import Batch, endless, token_losses
from agent.child import Stepped
from agent.data import DataConfig, Example, split
from agent.loading import Loaded
from agent.trainers import importance
from agent.trainers.importance import MAX_NOISE_BATCHES, SMOOTHING, Scored, Sensitivity, noise_scale, score, triplets
from protocol.messages import Bits, Calibration, Training

CPU = torch.device("cpu")
ASK = Calibration(n_batches=4)


@pytest.fixture(scope="module")
def text(data_file: Path) -> list[Example]:
    return split.load(DataConfig(path=str(data_file)), 0, 0.1).train


@pytest.fixture(scope="module")
def base(llama_folder: Path) -> Loaded:
    return loading.load(llama_folder, "none", CPU)


def batches(base: Loaded, text: list[Example], seed: int = 3) -> Iterator[Batch]:
    return endless(text, base.tokenizer, Training(n_steps=1, batch=8, max_tokens=64), seed)


def drain(running: Generator[Stepped, bool, Scored | None]) -> tuple[list[Stepped], Scored]:
    seen = []
    try:
        while True:
            seen.append(next(running))
    except StopIteration as end:
        return seen, end.value


def scored(base: Loaded, text: list[Example], ask: Calibration = ASK, seed: int = 3) -> Scored:
    return drain(score(base, batches(base, text, seed), ask))[1]


def dense(base: Loaded, text: list[Example], n: int) -> list[torch.Tensor]:
    """The true mean gradient of every matrix."""
    weights = [base.model.get_submodule(matrix.name).weight for matrix in loading.matrices(base.model)]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in islice(batches(base, text), n):
            loss, _ = token_losses(base.model, batch)
            torch.autograd.backward(loss / batch.n_targets / n)
        return [weight.grad.clone() for weight in weights]
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def top(found: Scored, n: int = 8) -> set[int]:
    return set(np.argsort(-found.scores.sum(1))[:n].tolist())


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("folder", ["llama_folder", "gpt2_folder"])
def test_they_are_the_squared_singular_values_of_the_mean_gradient(
    folder: str, text: list[Example], request: pytest.FixtureRequest
) -> None:
    loaded = loading.load(request.getfixturevalue(folder), "none", CPU)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = scored(loaded, text)
    truth = np.array([torch.linalg.svdvals(g)[:8].numpy() for g in dense(loaded, text, 4)])
    values = np.sqrt(found.scores)
    assert found.scores.shape == truth.shape
    assert found.scores.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all()
    np.testing.assert_allclose(values[:, 0], truth[:, 0], rtol=0.02)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), np.linalg.norm(truth, axis=1), rtol=0.02)
    assert (values <= truth * 1.001).all(), "a projection has no larger singular values"


@pytest.mark.parametrize("scorer", ["gradient", "triplet"])
def test_the_base_is_scored_as_it_is_and_left_as_it_was(base: Loaded, text: list[Example], scorer: Any) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    with torch.no_grad():
        losses = [float(token_losses(base.model, b)[0]) / b.n_targets for b in islice(batches(base, text), 4)]
    steps, _ = drain(score(base, batches(base, text), Calibration(n_batches=4, scorer=scorer, warmup_steps=4)))
    seen = [step.loss for step in steps]
    assert seen[:4] == pytest.approx(losses, rel=1e-6)
    if scorer == "gradient":
        assert seen[4:] == seen[:4], "the second pass sees the same text with the untouched base"
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_quantized_base_gives_the_same_set(llama_folder: Path, base: Loaded, text: list[Example], bits: Bits) -> None:
    quantized = loading.load(llama_folder, bits, CPU)
    assert jaccard(top(scored(quantized, text)), top(scored(base, text))) > 0.75


def test_the_same_seed_gives_the_same_scores_and_others_nearly(base: Loaded, text: list[Example]) -> None:
    ask = Calibration(n_batches=8)
    first, again, other = (scored(base, text, ask, seed) for seed in (3, 3, 4))
    assert (first.scores == again.scores).all()
    assert first.noise_scale == again.noise_scale
    assert jaccard(top(first), top(other)) > 0.75


@pytest.mark.parametrize(("scorer", "share"), [("gradient", 1e-6), ("triplet", 0.05)])
def test_what_cannot_matter_scores_nothing(llama_folder: Path, text: list[Example], scorer: Any, share: float) -> None:
    """Behind an output projection of zeros nothing of the first attention is heard, but the projection itself could learn."""
    deaf = loading.load(llama_folder, "none", CPU)
    deaf.model.model.layers[0].self_attn.o_proj.weight.zero_()
    found = scored(deaf, text, Calibration(n_batches=2, scorer=scorer, warmup_steps=10, learning_rate=1e-3))
    assert np.isfinite(found.scores).all()
    names = [matrix.name for matrix in loading.matrices(deaf.model)]
    total = dict(zip(names, found.scores.sum(1), strict=True))
    most = max(total.values())
    assert most > 0
    for part in "qkv":
        assert total[f"model.layers.0.self_attn.{part}_proj"] < share * most
    assert total["model.layers.0.self_attn.o_proj"] > 0


@pytest.mark.parametrize("scorer", ["gradient", "triplet"])
def test_a_stop_and_a_lack_of_time(base: Loaded, text: list[Example], scorer: Any) -> None:
    ask = Calibration(n_batches=4, scorer=scorer, warmup_steps=20)
    running = score(base, batches(base, text), ask)
    next(running)
    with pytest.raises(StopIteration) as stopped:
        running.send(True)
    assert stopped.value.value is None
    steps, found = drain(score(base, batches(base, text), ask, is_enough=lambda: True))
    assert len(steps) < 5
    assert found.scores[:, 0].min() >= 0
    assert found.scores.max() > 0
    assert found.noise_scale == 0, "one micro-batch tells nothing about noise"


# --------------------------------------------------------------------------------------------------------------- noise


def test_the_noise_scale_of_a_known_noise() -> None:
    rng = np.random.default_rng(0)
    mean, spread, samples, n = rng.standard_normal(400), 3.0, 8, 200
    drawn = mean + spread / np.sqrt(samples) * rng.standard_normal((n, 400))
    found = noise_scale((drawn**2).sum(1).mean(), float((drawn.mean(0) ** 2).sum()), samples, n)
    assert found == pytest.approx(spread**2 * 400 / (mean @ mean), rel=0.05)
    assert noise_scale(2.0, 2.0, 8, 4) == 0
    assert noise_scale(2.0, 0.5, 8, 4) == MAX_NOISE_BATCHES * 32, "all noise: bounded by what was seen"
    assert noise_scale(2.0, 1.9, 8, 1) == 0


def test_the_noise_scale_is_that_of_the_whole_gradient(base: Loaded, text: list[Example]) -> None:
    """The sketch's norms stand for those of the gradients themselves."""
    drawn = list(islice(batches(base, text), 8))
    by_batch = [np.concatenate([g.flatten() for g in dense_of(base, batch)]) for batch in drawn]
    square = np.mean([g @ g for g in by_batch])
    mean = np.mean(by_batch, axis=0)
    truth = noise_scale(float(square), float(mean @ mean), 8, 8)
    assert scored(base, text, Calibration(n_batches=8)).noise_scale == pytest.approx(truth, rel=0.25)


def dense_of(base: Loaded, batch: Batch) -> list[Any]:
    weights = [base.model.get_submodule(matrix.name).weight for matrix in loading.matrices(base.model)]
    for weight in weights:
        weight.requires_grad_(True)
    loss, _ = token_losses(base.model, batch)
    found = torch.autograd.grad(loss / batch.n_targets, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return [g.numpy() for g in found]


# ------------------------------------------------------------------------------------------------------------ triplets


def test_triplets_follow_from_the_factors_alone() -> None:
    torch.manual_seed(0)
    g, a, b, scale = torch.randn(20, 30), torch.randn(4, 30), torch.randn(20, 4), 0.5
    u, values, v_t = torch.linalg.svd(scale * b @ a, full_matrices=False)
    p, q, kept = u[:, :4], v_t[:4], values[:4]
    found = triplets(a[None], b[None], scale * (b.T @ g)[None], scale * (g @ a.T)[None])
    torch.testing.assert_close(found.values[0], (kept * ((p.T @ g) * q).sum(1)).abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.left[0], (p * (g @ q.T * kept)).abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.right[0], (q * (kept[:, None] * (p.T @ g))).abs(), rtol=1e-4, atol=1e-4)
    lost = torch.cat([b[:, :2], torch.zeros(20, 2)], 1)  # rank 2 of 4
    for part in triplets(a[None], lost[None], (lost.T @ g)[None], (g @ a.T)[None]):
        assert torch.isfinite(part).all()
    nothing = triplets(a[None], torch.zeros(1, 20, 4), torch.zeros(1, 4, 30), (g @ a.T)[None])
    assert float(nothing.values.max()) == 0


@pytest.mark.parametrize("is_exact", [True, False])
def test_sensitivity_is_adaloras_product_of_two_averages(is_exact: bool) -> None:
    torch.manual_seed(1)
    weights = {name: (torch.randn(3, 6), torch.randn(5, 3)) for name in ("x", "y")}
    sensitivity = Sensitivity(weights, is_exact=is_exact)
    assert sensitivity.scores() == {}
    mean: Any = {}
    uncertainty: Any = {}
    for _ in range(3):
        for name, (a, b) in weights.items():
            a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
            seen = [part[0] for part in triplets(a[None], b[None], a.grad[None], b.grad[None])]
            now = seen if is_exact else [seen[0], seen[1].mean(0), seen[2].mean(1)]
            for i, part in enumerate(now):
                was = mean.get((name, i), torch.zeros_like(part))
                mean[name, i] = SMOOTHING * was + (1 - SMOOTHING) * part
                spread = uncertainty.get((name, i), torch.zeros_like(part))
                uncertainty[name, i] = SMOOTHING * spread + (1 - SMOOTHING) * (part - mean[name, i]).abs()
        sensitivity.observe()
    for name, found in sensitivity.scores().items():
        parts = [mean[name, i] * uncertainty[name, i] for i in range(3)]
        whole = parts[0] + (parts[1].mean(0) + parts[2].mean(1) if is_exact else parts[1] + parts[2])
        np.testing.assert_allclose(found, np.sort(whole.numpy())[::-1], rtol=1e-4)


def test_large_matrices_are_observed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    weights = {name: (torch.randn(3, 6), torch.randn(5, 3)) for name in "abc"}
    for a, b in weights.values():
        a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    together = Sensitivity(weights)
    together.observe()
    monkeypatch.setattr(importance, "GROUP_NUMBERS", 1)
    apart = Sensitivity(weights)
    apart.observe()
    assert apart.scores().keys() == weights.keys()
    for name, found in apart.scores().items():
        assert found == pytest.approx(together.scores()[name], rel=1e-5)


def test_a_run_observes_seldom_and_more_often_at_its_end() -> None:
    due = [step for step in range(64) if importance.is_due(step, 64)]
    assert due == [16, 32, 48, 52, 56, 60]
    assert 0 not in due, "B = 0 there"
