"""The formula against torch itself: parameters exactly, saved activations as autograd counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agent import loading
from agent.trainers.lora import adapted
from protocol import memory
from protocol.messages import Dimensions, Matrix

BATCH, LENGTH = 4, 64


def dimensions(folder: Path) -> Dimensions:
    found = loading.dimensions(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["llama_folder", "gpt2_folder"])
def test_the_dimensions_account_for_every_parameter(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    dims, matrices = dimensions(folder), loading.survey(folder)
    model: Any = loading.load(folder, "none", torch.device("cpu")).model
    n_true = sum(parameter.numel() for parameter in model.parameters())
    assert memory.weight_bytes(matrices, dims.n_other, "none", "fp32") == pytest.approx(4 * n_true, rel=0.03)


def saved_bytes(model: Any) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model.base_model.model.model(input_ids=torch.zeros(BATCH, LENGTH, dtype=torch.long), use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("part", ["all", "q_proj", "layers.1", "layers.1.self_attn"])
def test_saved_activations_are_what_autograd_saves(llama_folder: Path, all_ranks: dict[str, int], part: str) -> None:
    base = loading.load(llama_folder, "none", torch.device("cpu")).model
    ranks = {name: rank for name, rank in all_ranks.items() if part == "all" or part in name}
    dims, matrices = dimensions(llama_folder), loading.matrices(base)
    predicted = memory.activation_bytes(
        dims, matrices, ranks, compute="fp32", n_tokens=BATCH * LENGTH, checkpointing=False
    )
    with adapted(base, {}, ranks, 2.0, seed=0) as model:
        model.model.train()
        measured = saved_bytes(model.model)
    assert predicted == pytest.approx(measured, rel=0.15)


def test_more_of_anything_takes_more(llama_folder: Path, all_ranks: dict[str, int]) -> None:
    dims, matrices = dimensions(llama_folder), loading.survey(llama_folder)

    def predicted(**changes: Any) -> int:
        settings = {"frozen": {}, "bits": "nf4", "compute": "bf16", "n_tokens": 512, "checkpointing": False} | changes
        ranks = settings.pop("ranks", all_ranks)
        return memory.predicted_bytes(dims, matrices, ranks, **settings)

    least = predicted(checkpointing=True)
    assert least < predicted() < predicted(n_tokens=1024)
    assert predicted() < predicted(frozen=all_ranks) < predicted(ranks=dict.fromkeys(all_ranks, 64), frozen=all_ranks)
    assert predicted(bits="nf4") < predicted(bits="int8") < predicted(bits="none", compute="fp32")


def test_seven_billion_as_measured_without_a_gpu(tmp_path: Path) -> None:
    """Reference: Llama-7B, sequence 512, batch 1, NF4, all linear at rank 8: 3687 MB weights, 305 adapter, 4348 saved."""
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,'
        ' "num_hidden_layers": 32, "vocab_size": 32000, "tie_word_embeddings": false}'
    )
    dims = dimensions(tmp_path)
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    matrices = [
        Matrix(name=f"{layer}.{n}", d_out=d_out, d_in=d_in)
        for layer in range(32)
        for n, (d_out, d_in) in enumerate(shapes)
    ]
    ranks = {matrix.name: 8 for matrix in matrices}
    mb = 2**20
    assert memory.weight_bytes(matrices, dims.n_other, "nf4", "bf16") / mb == pytest.approx(3687, rel=0.05)
    assert memory.adapter_bytes(matrices, ranks, 16) / mb == pytest.approx(305, rel=0.01)
    saved = memory.activation_bytes(dims, matrices, ranks, compute="bf16", n_tokens=512, checkpointing=False)
    assert (saved + 4 * 512 * 32000) / mb == pytest.approx(4348, rel=0.05)


def test_an_unknown_architecture_has_no_dimensions(tmp_path: Path) -> None:
    assert loading.dimensions(tmp_path) is None
    for text in ("[]", "{", '{"hidden_size": 64}', '{"n_embd": 64, "n_head": 0, "n_layer": 2, "vocab_size": 9}'):
        (tmp_path / "config.json").write_text(text)
        assert loading.dimensions(tmp_path) is None


def test_dimensions_guessed_from_the_matrices_are_of_the_right_magnitude(llama_folder: Path) -> None:
    true, guessed = dimensions(llama_folder), memory.guessed(loading.survey(llama_folder))
    assert (guessed.hidden, guessed.mlp, guessed.n_layers) == (true.hidden, true.mlp, true.n_layers)
