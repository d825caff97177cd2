"""The merged model is base + B A, to the rounding of the base's own type, whatever its shards and its layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from coordinator import merge as merging
from coordinator.export import export_peft
from coordinator.lineage import LINEAGE_FILE, Card
from coordinator.merge import merge
from protocol.adapters import Adapter, Factors
from protocol.errors import BadConfig

TOKENS = torch.arange(24).reshape(2, 12)
CARD = Card(job="j", method="qlora", base_source="some/base", base_sha256="", adapter_sha256="")
LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=80,
    initializer_range=0.2,
)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=80, n_positions=16, initializer_range=0.2)


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("the base's own card")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA)


def make_adapter(shapes: dict[str, tuple[int, int]], scale: float = 0.2) -> Adapter:
    rng = np.random.default_rng(2)
    adapter = {}
    for i, (name, (d_out, d_in)) in enumerate(shapes.items()):
        a = rng.normal(size=(1 + i % 4, d_in), scale=scale)
        b = rng.normal(size=(d_out, 1 + i % 4), scale=scale)
        adapter[name] = Factors(a.astype(np.float32), b.astype(np.float32))
    return adapter


def llama_adapter(model: Any) -> Adapter:
    linears = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    return make_adapter({name: (shape[0], shape[1]) for name, shape in linears.items()})


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("shard", ["1GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_merged_model_computes_what_peft_does_on_the_base(
    llama: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype, shard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BLOCK_BYTES", 1000)  # several blocks of rows per matrix
    base, adapter = save(llama, tmp_path / "base", dtype, shard), llama_adapter(llama)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard == "60KB")
    steps: list[tuple[int, int]] = []
    merge(base, adapter, tmp_path / "merged", card=CARD, progress=lambda done, total: steps.append((done, total)))
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        factors = adapter.get(name.removesuffix(".weight"))
        delta = 0 if factors is None else torch.from_numpy(factors.b @ factors.a)
        assert after[name].dtype == dtype
        assert torch.allclose(after[name], (tensor.float() + delta).to(dtype), rtol=1e-5, atol=1e-6)
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    export_peft(adapter, tmp_path / "adapter", card=CARD)
    tolerance = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}[dtype]
    expected = logits(base, tmp_path / "adapter")
    assert torch.allclose(logits(tmp_path / "merged"), expected, atol=tolerance)
    assert not torch.allclose(logits(base), expected, atol=1.0)


def test_everything_but_the_weights_is_copied_and_the_card_is_ours(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base", shard="60KB")
    merge(base, llama_adapter(llama), tmp_path / "merged", card=CARD)
    here = {path.name for path in (tmp_path / "merged").iterdir()}
    assert here == {path.name for path in base.iterdir()} - {"pytorch_model.bin"} | {LINEAGE_FILE}
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert "Merged model" in (tmp_path / "merged/README.md").read_text()
    with safe_open(next((tmp_path / "merged").glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_keeps_its_weights_transposed(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    base = save(GPT2LMHeadModel(GPT2), tmp_path / "base")
    if not prefix:  # checkpoints saved without the head, like the published ones
        path = base / "model.safetensors"
        named = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        save_file(named, path, metadata={"format": "pt"})
    shapes = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    adapter = make_adapter({f"transformer.h.1.{name}": shape for name, shape in shapes.items()})
    merge(base, adapter, tmp_path / "merged", card=CARD)
    export_peft(adapter, tmp_path / "adapter", card=CARD)
    expected = logits(base, tmp_path / "adapter")
    assert torch.allclose(logits(tmp_path / "merged"), expected, atol=1e-4)
    assert not torch.allclose(logits(base), expected, atol=1.0)


def square(name: str = "model.layers.0.self_attn.q_proj", d_out: int = 64, d_in: int = 64) -> Adapter:
    return make_adapter({name: (d_out, d_in)})


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({}, "the adapter is empty"),
        (square("model.layers.9.self_attn.q_proj"), r"no tensor 'model\.layers\.9\.self_attn\.q_proj\.weight'"),
        (square(d_out=64, d_in=63), r"64 x 63, but the base's weight has the shape \(64, 64\)"),
    ],
)
def test_an_adapter_of_another_base_is_refused_before_anything_is_written(
    llama: LlamaForCausalLM, tmp_path: Path, adapter: Adapter, text: str
) -> None:
    base = save(llama, tmp_path / "base")
    with pytest.raises(BadConfig, match=text):
        merge(base, adapter, tmp_path / "merged", card=CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_quantized_base_is_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(BadConfig, match="merge into the full-precision model"):
        merge(base, square(), tmp_path / "merged", card=CARD)
    (base / "config.json").write_text(json.dumps(config))
    named = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(named | {name: named[name].to(torch.int8)}, base / "model.safetensors")
    with pytest.raises(BadConfig, match="stored as I8"):
        merge(base, square(), tmp_path / "merged", card=CARD)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]"])
def test_a_damaged_shard_is_named(llama: LlamaForCausalLM, tmp_path: Path, content: bytes) -> None:
    base = save(llama, tmp_path / "base")
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(BadConfig, match=r"model\.safetensors"):
        merge(base, square(), tmp_path / "merged", card=CARD)


def test_a_truncated_shard_is_named(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = save(llama, tmp_path / "base") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadConfig, match="lies outside the file"):
        merge(path.parent, square(), tmp_path / "merged", card=CARD)


def test_an_index_cannot_point_outside_the_folder(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../base/model.safetensors"}}))
    with pytest.raises(BadConfig, match="names the shard"):
        merge(base, square(), tmp_path / "merged", card=CARD)


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadConfig, match="safe_serialization"):
        merge(tmp_path, square(), tmp_path / "merged", card=CARD)
    with pytest.raises(BadConfig, match=r"config\.json cannot be read"):
        merge(tmp_path / "nowhere", square(), tmp_path / "merged", card=CARD)


def test_an_update_that_leaves_the_range_of_the_base_stops_the_merge(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base", torch.float16)
    with pytest.raises(BadConfig, match="leaves the range of fp16"):
        merge(base, make_adapter({"model.layers.0.self_attn.q_proj": (64, 64)}, 1e4), tmp_path / "merged", card=CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
