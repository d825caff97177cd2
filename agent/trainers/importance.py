r"""Which matrices matter, and how far: the gain of every rank-1 direction that an adapter could add, by matrix.

Scorers, chosen by name; both look at the agent's own text through a probe, a small adapter on every candidate matrix, so
no d x d gradient is ever formed and the base may be quantized.  With W -> W + s B A and G = dL/dW (d_out, d_in):

    dL/dB = s G A^T          dL/dA = s B^T G          so a probe reads G's product with whatever it is filled with

gradient   The singular values of the mean gradient by a randomized SVD (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061).
           Pass 1 with A random and B = 0 gives the sketch Y = G A^T, whose columns span the range of G; pass 2 over the same
           micro-batches with B = Q = orth(Y) and A = 0 gives Q^T G exactly.  Either way B A = 0, so the model is the
           untouched base throughout.  Score of triplet i is sigma_i^2: to first order, an update of rank r and given norm
           lowers the loss by its inner product with G, at best sum sigma_i^2 over the r largest (our design).
triplet    The sensitivity of the rank-1 triplets of a probe that is trained for a while (AdaLoRA; Zhang et al., 2023,
           arXiv 2303.10512); without training it would be zero, since B = 0.  The triplets and their gradients follow from
           B, A, g_B and g_A alone, see `triplets`.  The same code scores the real adapters while they train.

Pass 1 also tells how noisy the gradient is: the noise scale tr(Sigma) / |G|^2 in samples, the batch beyond which more samples
per step bring less and less ("simple" noise scale; McCandlish et al., 2018, arXiv 1812.06162).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from agent.batches import Batch, summed_loss
from agent.child import Stepped
from agent.loading import Loaded, matrices
from agent.trainers import TrainingFailed
from agent.trainers.lora import LOCAL, adapted, scale_of
from protocol.messages import Calibration
from protocol.tensors import F32

OVERSAMPLED: Final = 8
"""Columns of the sketch beyond the probe's rank: they catch what leaks out of the leading directions (Halko et al., 4.2)."""
SMOOTHING: Final = 0.85
"""Both of AdaLoRA's moving averages."""
MAX_SCORE: Final = 1e30
GROUP_NUMBERS: Final = 2**22
"""Matrices are observed together up to this many numbers, so that it takes less memory than a step has just given back."""
MAX_NOISE_BATCHES: Final = 10.0
"""A noise scale above this many times the samples that were seen is not told apart from a larger one."""


class Scored(NamedTuple):
    """scores (n_matrices, probe_rank) in the order of agent.loading.matrices, rows descending; noise scale in samples."""

    scores: F32
    noise_scale: float


Scoring = Generator[Stepped, bool, Scored | None]
Weights = tuple[torch.Tensor, torch.Tensor]
"""A (r, d_in) and B (d_out, r) of one matrix, or their gradients."""


def score(
    base: Loaded, batches: Iterator[Batch], ask: Calibration, *, is_enough: Callable[[], bool] = lambda: False
) -> Scoring:
    """Score every candidate matrix of `base` on ask.n_batches micro-batches with ask.scorer.

    Yields a Stepped after every micro-batch and hears whether to stop; a stop returns None.  `is_enough` is asked after
    each micro-batch of the first pass: once it says so the rest is done with the micro-batches so far.  The same seed and
    text give the same scores.  Raises TrainingFailed when a loss is not finite.

    Cost: gradient 2 n_batches forward and backward passes, triplet n_batches + warmup_steps + 8; beside the model the
    probe's (ask.probe_rank + 4) (d_out + d_in) numbers per matrix three times, and all the micro-batches.
    """
    match ask.scorer:
        case "gradient":
            return _gradient(base, batches, ask, is_enough)
        case "triplet":
            return _triplet(base, batches, ask, is_enough)


class _Probe:
    """The weights of an adapter on all candidate matrices, in the order of `names`."""

    def __init__(self, model: Any, names: Iterable[str], n_steps: int, seed: int) -> None:
        self.model = model
        self.weights = weights_of(model, names)
        self.a = [a for a, _ in self.weights.values()]
        self.b = [b for _, b in self.weights.values()]
        self._n_steps = n_steps
        self._step = self._samples = self._tokens = 0
        self._started, self._seed = time.monotonic(), seed

    def begin(self, learning: Sequence[torch.Tensor]) -> None:
        """Start a pass in which only `learning` gets gradients; each pass draws the same dropout, if the base has any."""
        for weight in [*self.a, *self.b]:
            weight.requires_grad_(any(weight is other for other in learning))
            weight.grad = None
        self.model.train()
        torch.manual_seed(self._seed)

    def backward(self, batch: Batch, share: float = 1.0) -> Stepped:
        """Add `share` of the gradient of the batch's mean loss per token."""
        loss = summed_loss(self.model, batch)
        mean = loss / max(1, batch.n_targets)
        torch.autograd.backward(mean * share)
        if not math.isfinite(value := mean.item()):
            raise TrainingFailed("loss is not finite", "while matrices were scored")
        self._step += 1
        self._samples, self._tokens = self._samples + batch.n_samples, self._tokens + batch.n_targets
        return Stepped(
            step=min(self._step, self._n_steps),
            n_steps=self._n_steps,
            samples=self._samples,
            loss=value,
            tokens=self._tokens,
            seconds=time.monotonic() - self._started,
        )


def _gradient(base: Loaded, batches: Iterator[Batch], ask: Calibration, is_enough: Callable[[], bool]) -> Scoring:
    ranks = _ranks(base, ask.probe_rank + OVERSAMPLED)
    with adapted(base.model, {}, ranks, 1.0, ask.seed) as model:
        probe = _Probe(model.model, ranks, 2 * ask.n_batches, ask.seed)
        sketched = yield from _sketch(probe, islice(batches, ask.n_batches), is_enough)
        if sketched is None:
            return None
        with torch.no_grad():
            for a, b, sketch in zip(probe.a, probe.b, sketched.means, strict=True):
                b.copy_(torch.linalg.qr(sketch).Q)  # (d_out, p)
                a.zero_()
        probe.begin(probe.a)
        for batch in sketched.batches:
            if (yield probe.backward(batch, 1 / len(sketched.batches))):
                return None
        scores = np.zeros((len(probe.a), ask.probe_rank), np.float32)
        for row, a in zip(scores, probe.a, strict=True):
            assert a.grad is not None
            gram = (a.grad.double() @ a.grad.double().T).cpu()  # (p, p): its eigenvalues are sigma^2
            found = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)[: len(row)].numpy() / scale_of(1.0, len(gram)) ** 2
            row[: len(found)] = found
        return Scored(scores, sketched.noise_scale)


def _triplet(base: Loaded, batches: Iterator[Batch], ask: Calibration, is_enough: Callable[[], bool]) -> Scoring:
    ranks = _ranks(base, ask.probe_rank)
    n_steps = ask.warmup_steps + 8  # of which the averages remember about the last 1 / (1 - SMOOTHING)
    with adapted(base.model, {}, ranks, 1.0, ask.seed) as model:
        probe = _Probe(model.model, ranks, ask.n_batches + n_steps, ask.seed)
        sketched = yield from _sketch(probe, islice(batches, ask.n_batches), is_enough)
        if sketched is None:
            return None
        probe.begin([*probe.a, *probe.b])
        optimizer = torch.optim.AdamW(model.parameters, lr=ask.learning_rate, weight_decay=0.0)
        sensitivity = Sensitivity(probe.weights, is_exact=True)
        for step, batch in enumerate(islice(batches, n_steps)):
            stepped = probe.backward(batch)
            if step:  # B = 0 in the first
                sensitivity.observe()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (yield stepped):
                return None
            if step and is_enough():
                break
        scores = np.zeros((len(ranks), ask.probe_rank), np.float32)
        for row, found in zip(scores, sensitivity.scores().values(), strict=True):
            row[: len(found)] = found
        return Scored(scores, sketched.noise_scale)


def _ranks(base: Loaded, rank: int) -> dict[str, int]:
    return {matrix.name: min(rank, matrix.d_in, matrix.d_out) for matrix in matrices(base.model)}


# ------------------------------------------------------------------------------------------- pass 1: sketch and noise


class _Sketched(NamedTuple):
    """means: G A^T of the mean gradient, (d_out, p) by matrix; the micro-batches that it is the mean of."""

    means: list[torch.Tensor]
    batches: list[Batch]
    noise_scale: float


def _sketch(
    probe: _Probe, batches: Iterator[Batch], is_enough: Callable[[], bool]
) -> Generator[Stepped, bool, _Sketched | None]:
    probe.begin(probe.b)
    # E |G A^T|^2 = |G|^2 |A|^2 / d_in for independent entries of A, so these weights make squared norms of sketches ones of G.
    weights = [a.shape[1] / float(a.detach().square().sum()) / scale_of(1.0, len(a)) ** 2 for a in probe.a]
    sums = [torch.zeros_like(b) for b in probe.b]
    used: list[Batch] = []
    squares = 0.0
    for batch in batches:
        stepped = probe.backward(batch)
        gradients = [_gradient_of(b) for b in probe.b]
        squares += _norm(gradients, weights)
        used.append(batch)
        for whole, gradient, b in zip(sums, gradients, probe.b, strict=True):
            whole.add_(gradient)
            b.grad = None
        if (yield stepped):
            return None
        if is_enough():
            break
    means = [whole / len(used) for whole in sums]
    samples = sum(batch.n_samples for batch in used) / len(used)
    return _Sketched(means, used, noise_scale(squares / len(used), _norm(means, weights), samples, len(used)))


def _norm(gradients: Sequence[torch.Tensor], weights: Sequence[float]) -> float:
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).double().cpu().square()
    return float(norms @ torch.tensor(weights, dtype=torch.float64))


def noise_scale(mean_square: float, square_of_mean: float, samples: float, n: int) -> float:
    """tr(Sigma) / |G|^2 in samples, from n micro-batches of `samples` each; 0 when n = 1 tells nothing.

    McCandlish et al. (2018), appendix A.1: with E |G_b|^2 = |G|^2 + tr(Sigma) / b, the mean square of the micro-batches'
    gradients and the square of their mean (a batch n times as large) give both unknowns without bias.  tr(Sigma) is clipped
    at 0; |G|^2 from below so that the result stays within MAX_NOISE_BATCHES times the samples seen.
    """
    if n < 2 or square_of_mean <= 0:
        return 0.0
    spread = max(0.0, (mean_square - square_of_mean) / (1 / samples - 1 / (n * samples)))
    square = (n * square_of_mean - mean_square) / (n - 1)
    return min(spread / square if square > 0 else math.inf, MAX_NOISE_BATCHES * n * samples) if spread else 0.0


# ------------------------------------------------------------------------------------ triplets of an adapter in training


def weights_of(model: Any, names: Iterable[str]) -> dict[str, Weights]:
    """The trainable adapter's factors by matrix, of a model that agent/trainers/lora.py wrapped."""
    layers = {name: model.get_base_model().get_submodule(name) for name in names}
    return {name: (layer.lora_A[LOCAL].weight, layer.lora_B[LOCAL].weight) for name, layer in layers.items()}


def is_due(step: int, n_steps: int) -> bool:
    """Whether a run of n_steps observes its adapter in this step: seldom, and more often in the last quarter.

    The early observations are for runs that end early; a later one outweighs them soon.
    """
    return step > 0 and step % (4 if 4 * step >= 3 * n_steps else 16) == 0


class Triplets(NamedTuple):
    """|w dL/dw| of the entries of dW = P diag(Lambda) Q.  Shapes, for n matrices: (n, r), (n, d_out, r), (n, r, d_in)."""

    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def triplets(a: torch.Tensor, b: torch.Tensor, g_a: torch.Tensor, g_b: torch.Tensor) -> Triplets:
    """First-order sensitivity of the rank-1 triplets of B A, in descending order of Lambda, from factors and their gradients.

    With B = Qb Rb, A^T = Qa Ra and the SVD Rb Ra^T = U Lambda V^T: P = Qb U, Q = V^T Qa^T, and since g_B = G A^T and
    g_A = B^T G, with U Lambda = Rb Ra^T V and V Lambda = Ra Rb^T U,

        dL/dP = G Q^T Lambda = g_B Rb^T U      dL/dQ = Lambda P^T G = V^T Ra g_A      Lambda dL/dLambda = diag(P^T dL/dP)

    No inverse, so B = 0 and lost ranks do no harm; a scale s before B A cancels in every product with its gradient.
    Shapes: a (n, r, d_in), b (n, d_out, r) and their gradients.  Cost: O(n (d_in + d_out) r^2).
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, _, v_t = torch.linalg.svd(r_b @ r_a.mT)
    p, q = q_b @ u, v_t @ q_a.mT
    left = p * (g_b @ (r_b.mT @ u))
    return Triplets(left.sum(1).abs(), left.abs(), (q * (v_t @ r_a @ g_a)).abs())


class Sensitivity:
    """AdaLoRA's importance of the triplets of an adapter in training, smoothed over the calls of `observe`.

    For I = |w dL/dw|: mean I' = 0.85 I' + 0.15 I, uncertainty U' = 0.85 U' + 0.15 |I - I'|, s = I' U', and the score of a
    triplet is s(lambda) + mean_j s(P_ji) + mean_j s(Q_ij).  `is_exact` smooths every entry of P and Q, which takes 8 bytes
    for each; otherwise their means are smoothed (our shortening), which takes nothing worth counting.
    """

    def __init__(self, weights: Mapping[str, Weights], *, is_exact: bool = False) -> None:
        self._weights = weights
        self._is_exact = is_exact
        # Matrices of one shape go through QR and SVD together: on small models the calls cost more than the arithmetic.
        groups: dict[tuple[torch.Size, torch.Size], list[str]] = {}
        for name, (a, b) in weights.items():
            groups.setdefault((a.shape, b.shape), []).append(name)
        self._groups = [
            part
            for (a, b), names in groups.items()
            for part in _parts(names, max(1, GROUP_NUMBERS // (a.numel() + b.numel())))
        ]
        self._smooth: list[list[Weights]] = []

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the present weights and gradients.  Matrices without a gradient count as zero."""
        try:
            seen = [self._seen(names) for names in self._groups]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # documented, but not declared
            return  # an SVD that does not converge is one observation less, not the end of a run
        if not self._smooth:
            self._smooth = [[(torch.zeros_like(part), torch.zeros_like(part)) for part in parts] for parts in seen]
        for parts, smooth in zip(seen, self._smooth, strict=True):
            for now, (mean, uncertainty) in zip(parts, smooth, strict=True):
                mean.lerp_(now, 1 - SMOOTHING)
                uncertainty.lerp_((now - mean).abs(), 1 - SMOOTHING)

    def state(self) -> list[torch.Tensor]:
        """All moving averages; [] before the first observation."""
        return [average for parts in self._smooth for pair in parts for average in pair]

    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Go on from the `state` of a Sensitivity of the same weights."""
        pairs = list(zip(state[::2], state[1::2], strict=True))
        self._smooth = [pairs[at : at + 3] for at in range(0, len(pairs), 3)]

    def scores(self) -> dict[str, list[float]]:
        """Scores of the triplets by matrix, descending; {} before the first observation."""
        found: dict[str, list[float]] = {}
        for names, smooth in zip(self._groups, self._smooth, strict=False):
            values, left, right = (mean * uncertainty for mean, uncertainty in smooth)
            if self._is_exact:
                left, right = left.mean(1), right.mean(2)
            total = (values + left + right).nan_to_num().clamp(0, MAX_SCORE).sort(dim=-1, descending=True).values
            found |= dict(zip(names, total.double().cpu().tolist(), strict=True))
        return {name: found[name] for name in self._weights if name in found}

    def _seen(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pairs = [self._weights[name] for name in names]
        a, b = (torch.stack([pair[i].detach() for pair in pairs]).float() for i in range(2))
        g_a, g_b = (torch.stack([_gradient_of(pair[i]) for pair in pairs]).float() for i in range(2))
        values, left, right = triplets(a, b, g_a, g_b)
        return (values, left, right) if self._is_exact else (values, left.mean(1), right.mean(2))


def _parts(names: list[str], n: int) -> list[list[str]]:
    return [names[at : at + n] for at in range(0, len(names), n)]


def _gradient_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
