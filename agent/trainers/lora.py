r"""The frozen base with two adapters on it: the fleet's, frozen, and this agent's own, trainable.

    y = W x  +  B_g A_g x  +  s B A x          W quantized and untouched, (B_g, A_g) the downloaded global adapter

    base ---------------------------------.
    global adapter  A_g (r_g, d_in)  B_g --+--> y        only A (r, d_in) and B (d_out, r) of the local adapter learn
    local adapter   A  (r, d_in)    B  ---'

B = 0 at the start, so training begins exactly at the received version, whatever A is.  A starts in the right subspace of the
global adapter, where the fleet has found what matters so far (method.md section 6; our design): its first rows are a random
rotation of an orthonormal basis of the rows of A_g, scaled to the norm that PEFT's own start would have; further rows, and
all rows where there is no global adapter, are PEFT's own.  So at version 0 this is a plain PEFT LoRA run.

Published baselines start otherwise (`Start`): on their own random A in every round, or from the global adapter's values, which
then are no frozen part of their own.

What leaves is s B A alone: a true delta on top of the version received, or for `continued` the adapter itself.  The base is never merged into, so taking the
adapters off restores it bit by bit and it serves the next round.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal

import numpy as np
import torch

from agent.loading import matrices
from protocol.adapters import Adapter, Factors, truncate
from protocol.errors import BadMessage, BadUpdate
from protocol.messages import Matrix
from protocol.tensors import F32

GLOBAL: Final = "global"
LOCAL: Final = "local"
STABLE_RANK: Final = 8

Start = Literal["subspace", "fresh", "continued", "frozen-a"]
"""Where the local adapter begins.

subspace   B = 0, A in the right subspace of the global adapter
fresh      B = 0, A random
continued  the first r components of the global adapter, which is not frozen beside it; B = 0 and an A that all agents with
           this seed share where it has no more
frozen-a   like continued, and A does not learn
"""


class Adapted:
    """A base model that carries adapters.  `model` is called like the base; `parameters` are what learns."""

    def __init__(self, model: Any, ranks: Mapping[str, int], alpha: float) -> None:
        self.model = model
        self.parameters: list[torch.nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self._ranks = ranks
        self._alpha = alpha

    def local(self) -> Adapter:
        """The local adapter as it is now, the scale folded into B."""
        found = {}
        for name in self._ranks:
            a, b = _weights(self.model, name, LOCAL)
            found[name] = Factors(a=_to_numpy(a), b=_to_numpy(b) * np.float32(scale_of(self._alpha, a.shape[0])))
        return found


@contextmanager
def adapted(
    base: Any, frozen: Adapter, ranks: Mapping[str, int], alpha: float, seed: int, *, start: Start = "subspace"
) -> Iterator[Adapted]:
    """Put both adapters on `base` for the time of the block and take them off behind it, whatever happens.

    Args:
        base: a model from agent/loading.py.
        frozen: the global adapter, {} at version 0.
        ranks: rank of the local adapter by matrix; {} for evaluation alone.
        alpha: the scale of a local adapter of rank STABLE_RANK, see `scale_of`.
        seed: decides the start of A.
        start: where the local adapter begins.

    Raises BadMessage for ranks and BadUpdate for a global adapter that do not fit the base.
    """
    shapes = {matrix.name: matrix for matrix in matrices(base)}
    _check_ranks(ranks, shapes)
    _check_frozen(frozen, shapes)
    if not frozen and not ranks:
        yield Adapted(base, {}, alpha)
        return
    try:
        yield Adapted(_wrap(base, frozen, ranks, alpha, seed, start), ranks, alpha)
    finally:
        _unwrap(base)


def _wrap(base: Any, received: Adapter, ranks: Mapping[str, int], alpha: float, seed: int, start: Start) -> Any:
    from peft import get_peft_model

    continues = start in {"continued", "frozen-a"}
    frozen = {name: f for name, f in received.items() if not (continues and name in ranks)}
    wanted = {}
    if frozen:
        wanted[GLOBAL] = _config({name: f.rank for name, f in frozen.items()}, lambda _: 1.0)
    if ranks:
        wanted[LOCAL] = _config(ranks, lambda rank: scale_of(alpha, rank))
    model = None
    for name, config in wanted.items():
        torch.manual_seed(seed)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    model.base_model.set_adapter(list(wanted))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{LOCAL}." in name and not (start == "frozen-a" and ".lora_A." in name))
    _copy_in(model, frozen)
    if continues:
        _continue(model, received, ranks, alpha, seed)
    elif start == "subspace":
        _start_in_subspace(model, frozen, ranks, seed)
    return model


def _unwrap(base: Any) -> None:
    # By hand and in place: PeftModel.unload() does the same from the wrapper, which may not exist if wrapping failed midway.
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def scale_of(alpha: float, rank: int) -> float:
    """What B A is multiplied by: alpha at rank STABLE_RANK, less for more components, so that one learning rate fits all.

    Adam moves every component at about the same rate, so an update of rank r grows with r; dividing by sqrt(r) keeps it
    stable (rsLoRA; Kalajdzievski, 2023, arXiv 2312.03732).
    """
    return alpha * math.sqrt(STABLE_RANK / rank)


def _config(ranks: Mapping[str, int], scale: Callable[[int], float]) -> Any:
    """PEFT's configuration for exactly these matrices, with the scale for each rank.

    Its patterns are regular expressions tried one by one for every module; one per rank instead of one per matrix keeps
    that linear.  PEFT divides alpha by the rank.
    """
    from peft import LoraConfig

    by_rank: dict[int, list[str]] = defaultdict(list)
    for name, rank in ranks.items():
        by_rank[rank].append(re.escape(name))
    patterns = {f"^({'|'.join(names)})": rank for rank, names in by_rank.items()}
    return LoraConfig(
        target_modules="|".join(re.escape(name) for name in ranks),  # a text is matched whole, a list also as a suffix
        rank_pattern=patterns,
        alpha_pattern={pattern: scale(rank) * rank for pattern, rank in patterns.items()},
        lora_dropout=0.0,
        bias="none",
    )


@torch.no_grad()
def _copy_in(model: Any, frozen: Adapter) -> None:
    for name, factors in frozen.items():
        a, b = _weights(model, name, GLOBAL)
        a.copy_(torch.from_numpy(factors.a))
        b.copy_(torch.from_numpy(factors.b))


@torch.no_grad()
def _start_in_subspace(model: Any, frozen: Adapter, ranks: Mapping[str, int], seed: int) -> None:
    for index, name in enumerate(sorted(ranks)):
        if name in frozen:
            a, _ = _weights(model, name, LOCAL)
            rows = subspace_rows(frozen[name].a, ranks[name], np.random.default_rng([seed, index]))
            a[: len(rows)].copy_(torch.from_numpy(rows))


@torch.no_grad()
def _continue(model: Any, received: Adapter, ranks: Mapping[str, int], alpha: float, seed: int) -> None:
    for name, rank in ranks.items():
        a, b = _weights(model, name, LOCAL)
        a.copy_(torch.from_numpy(common_rows(name, rank, a.shape[1], seed)))
        if name in received:
            known = truncate(received[name], rank)
            a[: known.rank].copy_(torch.from_numpy(known.a))
            b[:, : known.rank].copy_(torch.from_numpy(known.b / np.float32(scale_of(alpha, rank))))


def common_rows(name: str, rank: int, d_in: int, seed: int) -> F32:
    """A random start of A (rank, d_in) that depends on the seed and the matrix alone, so that all agents share it.

    Distributed as PEFT's own, uniform within +-1/sqrt(d_in); the rows of a smaller rank are the first of a larger one.
    """
    key = [seed, *hashlib.blake2b(name.encode(), digest_size=8).digest()]
    bound = 1.0 / np.sqrt(d_in)
    rows: F32 = np.random.default_rng(key).uniform(-bound, bound, (rank, d_in)).astype(np.float32)
    return rows


def subspace_rows(a: F32, n_rows: int, rng: np.random.Generator) -> F32:
    """At most n_rows orthogonal rows that span a random part of the row space of `a`, each of norm 1/sqrt(3).

    That is the root mean square norm of a row of PEFT's start, uniform within +-1/sqrt(d_in).  Fewer rows come back when
    the row space has fewer dimensions.  Shapes: a (r, d_in) -> (min(n_rows, rank of a), d_in).  Cost: O(r^2 d_in).
    """
    wide = a.astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)  # a = sum of sqrt(value) * vector * basis row
    kept = values > max(values.max(initial=0.0), 0.0) * 1e-10
    basis = (vectors[:, kept] / np.sqrt(values[kept])).T @ wide  # (k, d_in), orthonormal rows
    n = min(n_rows, len(basis))
    rotation, _ = np.linalg.qr(rng.standard_normal((len(basis), n)))  # (k, n), orthonormal columns
    rows: F32 = (rotation.T @ basis / np.sqrt(3.0)).astype(np.float32)
    return rows


def _weights(model: Any, name: str, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = model.get_base_model().get_submodule(name)
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _to_numpy(weight: torch.Tensor) -> F32:
    values: F32 = weight.detach().to("cpu", torch.float32, copy=True).numpy()
    return values


def _check_ranks(ranks: Mapping[str, int], shapes: Mapping[str, Matrix]) -> None:
    if unknown := sorted(ranks.keys() - shapes.keys()):
        raise BadMessage(
            f"plan names {len(unknown)} matrices that the base does not have: {unknown[0]!r}; survey again"
        )
    for name, rank in ranks.items():
        if rank > min(shapes[name].d_in, shapes[name].d_out):
            raise BadMessage(
                f"plan gives {name!r} rank {rank}, more than its {min(shapes[name].d_in, shapes[name].d_out)}"
            )


def _check_frozen(frozen: Adapter, shapes: Mapping[str, Matrix]) -> None:
    for name, factors in frozen.items():
        matrix = shapes.get(name)
        if matrix is None or factors.shape != (matrix.d_out, matrix.d_in):
            there = "no such matrix" if matrix is None else f"({matrix.d_out}, {matrix.d_in})"
            raise BadUpdate(f"global adapter has {name!r} of shape {factors.shape}; the base has {there}")
