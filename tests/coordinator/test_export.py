"""An export loads in PEFT as it is, and the loaded model computes base + B A."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from coordinator.export import export_peft
from coordinator.lineage import LINEAGE_FILE, Card, RoundEntry
from protocol.adapters import Adapter, Factors
from protocol.errors import BadConfig, Unavailable
from tests.full_disk import largest_file

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with 21 matrices: from 20 on PEFT shortens lists of target modules, which must not confuse it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(model: Any, ranks: list[int]) -> Adapter:
    """Factors for every linear of the blocks, with ranks in turn."""
    rng = np.random.default_rng(1)
    adapter = {}
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    for i, (name, module) in enumerate(linears):
        rank, (d_out, d_in) = ranks[i % len(ranks)], module.weight.shape
        a = rng.normal(size=(rank, d_in), scale=0.2)
        adapter[name] = Factors(a.astype(np.float32), rng.normal(size=(d_out, rank), scale=0.2).astype(np.float32))
    return adapter


def card(base: Path | str = "some/base") -> Card:
    return Card(
        job="hotel-reviews",
        method="qlora",
        base_source=str(base),
        base_sha256="ab" * 32,
        adapter_sha256="cd" * 32,
        license="apache-2.0",
        software="fedpipe 0.1.0",
        rounds=[
            RoundEntry(round=1, agents=["rome", "oslo"], samples=300, loss=2.5),
            RoundEntry(round=2, agents=["rome"], samples=100),
        ],
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def add_dense(model: Any, adapter: Adapter) -> Any:
    modules = dict(model.named_modules())
    for name, factors in adapter.items():
        modules[name].weight.data += torch.from_numpy(factors.b @ factors.a)
    return model


@pytest.mark.parametrize("n_matrices", [21, 8])
def test_peft_loads_it_and_computes_the_dense_sum(base_folder: Path, tmp_path: Path, n_matrices: int) -> None:
    adapter = dict(list(make_adapter(load(base_folder), [1, 3, 8, 2]).items())[:n_matrices])
    export_peft(adapter, tmp_path / "out", card=card(base_folder))
    model = PeftModel.from_pretrained(load(base_folder), tmp_path / "out").eval()
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(adapter)
    expected = logits(add_dense(load(base_folder), adapter))
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert not torch.allclose(logits(load(base_folder)), expected, atol=0.1)
    assert torch.allclose(logits(model.merge_and_unload()), expected, atol=1e-4)


def test_one_alpha_and_each_matrix_s_own_shape_are_enough_to_compute_it(base_folder: Path, tmp_path: Path) -> None:
    """As llama.cpp does it: scale = lora_alpha / rank, the rank read from the matrix, no patterns."""
    adapter = make_adapter(load(base_folder), [1, 3, 8, 2])
    export_peft(adapter, tmp_path / "out", card=card(base_folder))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    arrays = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, factors in adapter.items():
        a, b = (arrays[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert len(a) == b.shape[1] == config["r"]
        assert np.allclose(config["lora_alpha"] / b.shape[1] * b @ a, factors.b @ factors.a, atol=1e-6)


def test_a_matrix_without_a_component_is_left_out(base_folder: Path, tmp_path: Path) -> None:
    adapter = make_adapter(load(base_folder), [4, 0])
    export_peft(adapter, tmp_path / "out", card=card(base_folder))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name for name, factors in adapter.items() if factors.rank)
    model = PeftModel.from_pretrained(load(base_folder), tmp_path / "out").eval()
    assert torch.allclose(logits(model), logits(add_dense(load(base_folder), adapter)), atol=1e-4)


@pytest.mark.parametrize("rank", [None, 0])
def test_an_adapter_without_any_component_is_an_error(tmp_path: Path, rank: int | None) -> None:
    void = Factors(np.zeros((0, 3), np.float32), np.zeros((2, 0), np.float32))
    with pytest.raises(BadConfig, match="the adapter is empty"):
        export_peft({} if rank is None else {"m": void}, tmp_path / "out", card=card())
    assert list(tmp_path.iterdir()) == []


def one_matrix() -> Adapter:
    return {"layers.0.q": Factors(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))}


def test_the_card_tells_the_lineage_to_people_and_machines(tmp_path: Path) -> None:
    export_peft(one_matrix(), tmp_path / "out", card=card())
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith('---\nlibrary_name: "peft"\nbase_model: "some/base"\nlicense: "apache-2.0"\n')
    for fact in (
        "hotel-reviews",
        "oslo, rome",
        "ab" * 32,
        "cd" * 32,
        "400",
        "| 1 | 2 | 300 | 2.5000 |",
        "| 2 | 1 | 100 |  |",
    ):
        assert fact in text
    assert json.loads((tmp_path / "out" / LINEAGE_FILE).read_text())["rounds"][0]["agents"] == ["rome", "oslo"]


def test_names_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    hostile = Card(
        job="j",
        method="qlora",
        base_source='x"\n---\nlicense: mit',
        base_sha256="",
        adapter_sha256="",
        license="`a`|b\n# title",
    )
    export_peft(one_matrix(), tmp_path / "out", card=hostile)
    lines = (tmp_path / "out/README.md").read_text().splitlines()
    assert lines.count("---") == 2
    assert "license: mit" not in lines
    assert "# title" not in lines


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    for _ in range(2):
        export_peft(one_matrix(), tmp_path / "out", card=card())
        (tmp_path / "out/stale").touch()
    export_peft(one_matrix(), tmp_path / "out", card=card())
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", LINEAGE_FILE}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nobody_elses_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_peft(one_matrix(), tmp_path / "out", card=card())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with pytest.raises(BadConfig, match="no earlier export"):
        export_peft(one_matrix(), tmp_path / "mine", card=card())
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_disk_that_refuses_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    big = {"model.q": Factors(rng.normal(size=(8, 512)).astype(np.float32), np.ones((512, 8), np.float32))}
    with largest_file(4096), pytest.raises(Unavailable, match="cannot be written"):
        export_peft(big, tmp_path / "adapter", card=card())
    assert list(tmp_path.iterdir()) == []
    export_peft(big, tmp_path / "adapter", card=card())
