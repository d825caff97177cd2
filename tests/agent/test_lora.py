"""Two adapters on a frozen base: the same function as the dense sum, and nothing of them is left behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent import loading
from agent.trainers.lora import adapted, scale_of, subspace_rows
from protocol.adapters import Adapter, Factors, canonical
from protocol.errors import BadMessage, BadUpdate
from protocol.messages import Bits

CPU = torch.device("cpu")
SCALE = 2.0


def random_adapter(shapes: dict[str, tuple[int, int]], ranks: dict[str, int], seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(
            a=rng.normal(0, 0.1, (rank, shapes[name][1])).astype(np.float32),
            b=rng.normal(0, 0.1, (shapes[name][0], rank)).astype(np.float32),
        )
        for name, rank in ranks.items()
    }


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    return {matrix.name: (matrix.d_out, matrix.d_in) for matrix in loading.matrices(model)}


def logits(model: Any, seed: int = 5) -> torch.Tensor:
    ids = torch.randint(0, 384, (2, 12), generator=torch.Generator().manual_seed(seed))
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def add_dense(model: Any, adapter: Adapter) -> None:
    from transformers.pytorch_utils import Conv1D

    for name, factors in adapter.items():
        layer, delta = model.get_submodule(name), torch.from_numpy(factors.b @ factors.a)
        with torch.no_grad():
            layer.weight += delta.T if isinstance(layer, Conv1D) else delta


def set_local(model: Any, adapter: Adapter) -> None:
    with torch.no_grad():
        for name, factors in adapter.items():
            layer = model.model.get_base_model().get_submodule(name)
            layer.lora_A["local"].weight.copy_(torch.from_numpy(factors.a))
            layer.lora_B["local"].weight.copy_(torch.from_numpy(factors.b / scale_of(SCALE, factors.rank)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_forward_pass_is_the_dense_sum(architecture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{architecture}_folder")
    base = loading.load(folder, "none", CPU).model
    shapes = shapes_of(base)
    names = list(shapes)
    frozen = random_adapter(shapes, {name: 1 + n % 6 for n, name in enumerate(names[:-2])}, seed=1)
    ranks = {name: 1 + n % 3 for n, name in enumerate(names[1:])}
    local = random_adapter(shapes, ranks, seed=2)
    dense = copy.deepcopy(base)
    add_dense(dense, frozen)
    with adapted(base, frozen, ranks, SCALE, seed=0) as model:
        torch.testing.assert_close(logits(model.model), logits(dense), atol=1e-4, rtol=1e-4)
        set_local(model, local)
        add_dense(dense, local)
        torch.testing.assert_close(logits(model.model), logits(dense), atol=1e-4, rtol=1e-4)
        for name, factors in model.local().items():
            np.testing.assert_allclose(factors.a, local[name].a)
            np.testing.assert_allclose(factors.b, local[name].b, rtol=1e-6)


def test_gpt2_matrices_have_the_shapes_of_the_map(gpt2_folder: Path) -> None:
    found = {m.name: (m.d_out, m.d_in) for m in loading.survey(gpt2_folder)}
    assert found["transformer.h.0.attn.c_attn"] == (192, 64)
    assert found["transformer.h.1.mlp.c_proj"] == (64, 256)
    assert len(found) == 8
    assert found == shapes_of(loading.load(gpt2_folder, "nf4", CPU).model)


def test_the_survey_lists_what_the_loaded_model_has(llama_folder: Path, all_ranks: dict[str, int]) -> None:
    surveyed = loading.survey(llama_folder)
    assert {matrix.name for matrix in surveyed} == set(all_ranks)
    for bits in ("none", "int8", "nf4"):
        assert surveyed == loading.matrices(loading.load(llama_folder, bits, CPU).model)


def test_only_the_local_adapter_learns(llama_folder: Path) -> None:
    base = loading.load(llama_folder, "nf4", CPU).model
    frozen = random_adapter(shapes_of(base), dict.fromkeys(shapes_of(base), 4))
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 3}
    with adapted(base, frozen, ranks, SCALE, seed=0) as model:
        learning = [name for name, p in model.model.named_parameters() if p.requires_grad]
        assert len(learning) == 4
        assert all(".local." in name for name in learning)
        assert sorted(tuple(p.shape) for p in model.parameters) == [(2, 64), (3, 64), (64, 3), (128, 2)]


@pytest.mark.parametrize("bits", ["none", "int8", "nf4"])
def test_rounds_leave_no_residue(llama_folder: Path, all_ranks: dict[str, int], bits: Bits) -> None:
    base = loading.load(llama_folder, bits, CPU).model
    before, layout = logits(base), str(base)
    plans = [all_ranks, dict.fromkeys(list(all_ranks)[::3], 8), {}, {list(all_ranks)[5]: 1}]
    frozen: Adapter = {}
    for seed, ranks in enumerate(plans):
        with adapted(base, frozen, ranks, SCALE, seed) as model:
            model.model.train()
            if ranks:
                model.model(input_ids=torch.arange(12)[None], use_cache=False).logits.sum().backward()
        frozen = random_adapter(shapes_of(base), dict.fromkeys(list(all_ranks)[seed:], 3), seed)
        assert torch.equal(logits(base), before)
        assert str(base) == layout
        assert not hasattr(base, "peft_config")
        assert not any(p.requires_grad for p in base.parameters())


def test_an_error_inside_the_block_takes_the_adapters_off_too(llama_folder: Path, all_ranks: dict[str, int]) -> None:
    base = loading.load(llama_folder, "none", CPU).model
    layout = str(base)
    with pytest.raises(ZeroDivisionError), adapted(base, {}, all_ranks, SCALE, seed=0):
        _ = 1 / 0
    assert str(base) == layout


def test_a_starts_in_the_right_subspace_of_the_global_adapter(llama_folder: Path, all_ranks: dict[str, int]) -> None:
    base = loading.load(llama_folder, "none", CPU).model
    names = list(all_ranks)
    made = random_adapter(shapes_of(base), dict.fromkeys(names[1:], 6))
    frozen = {name: canonical(factors) for name, factors in made.items()}
    ranks = dict.fromkeys(names, 4) | {names[2]: 10}
    starts = []
    for seed in (1, 1, 2):
        with adapted(base, frozen, ranks, SCALE, seed) as model:
            starts.append(model.local())
    for name in names:
        np.testing.assert_array_equal(starts[0][name].a, starts[1][name].a)
        assert not np.array_equal(starts[0][name].a, starts[2][name].a)
        assert not starts[0][name].b.any()
    a, subspace = starts[0][names[1]].a, frozen[names[1]].a
    q, _ = np.linalg.qr(subspace.T)
    np.testing.assert_allclose(a @ q @ q.T, a, atol=1e-5)
    np.testing.assert_allclose(a @ a.T, np.eye(4) / 3, atol=1e-5)
    beyond = starts[0][names[2]].a[6:]  # rows that the global adapter has no room for are PEFT's own
    q, _ = np.linalg.qr(frozen[names[2]].a.T)
    assert np.linalg.norm(beyond @ q) < 0.9 * np.linalg.norm(beyond)


def test_a_deficient_global_adapter_gives_fewer_rows() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 64)).astype(np.float32)
    a[2] = a[0] - a[1]
    assert len(subspace_rows(a, 5, rng)) == 2
    assert len(subspace_rows(np.zeros((3, 64), np.float32), 5, rng)) == 0


def test_what_does_not_fit_the_base_is_refused_by_name(llama_folder: Path) -> None:
    base = loading.load(llama_folder, "none", CPU).model
    name, shapes = "model.layers.0.mlp.up_proj", shapes_of(base)
    wrong = Factors(a=np.zeros((2, 63), np.float32), b=np.zeros((128, 2), np.float32))
    with pytest.raises(BadUpdate, match=r"up_proj' of shape \(128, 63\); the base has \(128, 64\)"):
        adapted(base, {name: wrong}, {}, SCALE, 0).__enter__()
    with pytest.raises(BadUpdate, match="no such matrix"):
        adapted(base, {"lm_head": random_adapter(shapes, {name: 1})[name]}, {}, SCALE, 0).__enter__()
    with pytest.raises(BadMessage, match="does not have: 'lm_head'"):
        adapted(base, {}, {"lm_head": 2}, SCALE, 0).__enter__()
    with pytest.raises(BadMessage, match="rank 65"):
        adapted(base, {}, {name: 65}, SCALE, 0).__enter__()
