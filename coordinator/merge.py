"""Merge the global adapter into the full-precision base: W <- W + B A, once, at the end, on the coordinator.

Never into a quantized base: rounding the sum back to four bits would lose a large part of the update.  No torch is needed.
A merged weight has the type and the size of the original, so a merged shard is a copy of the base's shard in which some
byte ranges are rewritten, a block of rows at a time: memory stays at a block whatever the model's size, and tensors that
no adapter touches are copied bit for bit.

GPT-2 and its relatives keep Conv1D weights transposed, (d_in, d_out).  The shape tells; where it is square the model type
in config.json does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from coordinator.export import present
from coordinator.lineage import LINEAGE_FILE, Card, export_folder
from coordinator.shards import Tensor, read_tensors
from protocol import tensors
from protocol.adapters import Adapter, Factors
from protocol.errors import BadConfig, Unavailable
from protocol.tensors import F32

BLOCK_BYTES: Final = 64 * 2**20
_CONV1D_MODELS: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"})
_OURS: Final = frozenset({"README.md", LINEAGE_FILE})

_USAGE = """
## Use

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(THIS_FOLDER)

The update is part of the weights: same size and same speed as the base model.
"""


@dataclass(frozen=True, slots=True)
class _Site:
    """Where one matrix's delta goes: left @ right is added to the tensor as it is stored."""

    shard: str
    tensor: Tensor
    left: F32
    right: F32


def merge(
    base_folder: Path,
    adapter: Adapter,
    out_folder: Path,
    *,
    card: Card,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write the base model with `adapter` merged into it to `out_folder`: weights, config, tokenizer and model card.

    `progress(done, total)` is called after each shard copied and each matrix merged.  Raises BadConfig when the base is
    quantized, is not in safetensors format or lacks a matrix, or the adapter is empty (before anything is written), and
    Unavailable without enough disk.  Cost: one copy of the base and O(d_out d_in r) per matrix.
    """
    config = _json(base_folder / "config.json")
    if "quantization_config" in config:
        raise BadConfig(f"{base_folder} holds a quantized model: merge into the full-precision model it was made from")
    shards = {name: read_tensors(base_folder / name) for name in _shard_names(base_folder)}
    sites = _sites(
        {name: adapter[name] for name in present(adapter)}, shards, conv1d=config.get("model_type") in _CONV1D_MODELS
    )
    _check_disk(out_folder, sum((base_folder / name).stat().st_size for name in shards))
    done, total = 0, len(shards) + len(sites)
    with export_folder(out_folder, card) as part:
        for path in base_folder.iterdir():
            if path.is_file() and path.suffix not in _WEIGHTS and path.name not in _OURS:
                shutil.copyfile(path, part / path.name)
        (part / "README.md").write_text(card.readme("Merged model", _USAGE, "transformers"), encoding="utf-8")
        for name in shards:
            shutil.copyfile(base_folder / name, part / name)
            progress(done := done + 1, total)
        for site in sites:
            with (part / site.shard).open("r+b") as file:
                _add(file, site)
            progress(done := done + 1, total)


def _shard_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        found = sorted(set(_json(index).get("weight_map", {}).values()))
    else:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        raise BadConfig(f"{folder} has no *.safetensors weights: save the base model with safe_serialization=True")
    for name in found:
        if Path(name).name != name or not (folder / name).is_file():
            raise BadConfig(f"{index} names the shard {name!r}, which is not in {folder}")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadConfig(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BadConfig(f"{path} does not hold a JSON object")
    return found


def _sites(adapter: Adapter, shards: Mapping[str, Mapping[str, Tensor]], *, conv1d: bool) -> list[_Site]:
    place = {key: (shard, tensor) for shard, content in shards.items() for key, tensor in content.items()}
    sites = []
    for name, factors in adapter.items():
        # Some checkpoints leave out the model's own prefix ("transformer.") that module names have.
        keys = [f"{name}.weight", f"{name.partition('.')[2]}.weight"]
        found = next((place[key] for key in keys if key in place), None)
        if found is None:
            raise BadConfig(f"the base has no tensor {keys[0]!r}: is it the model this adapter was trained on?")
        sites.append(_site(name, factors, *found, conv1d=conv1d))
    return sites


def _site(name: str, factors: Factors, shard: str, tensor: Tensor, *, conv1d: bool) -> _Site:
    d_out, d_in = factors.shape
    if tensor.shape not in {(d_out, d_in), (d_in, d_out)}:
        raise BadConfig(f"matrix {name!r} is {d_out} x {d_in}, but the base's weight has the shape {tensor.shape}")
    if tensor.wire is None:
        raise BadConfig(f"matrix {name!r} is stored as {tensor.dtype}: merging needs F32, F16 or BF16 weights")
    transposed = conv1d if d_out == d_in else tensor.shape == (d_in, d_out)
    left, right = (factors.a.T, factors.b.T) if transposed else (factors.b, factors.a)
    return _Site(shard, tensor, left, right)


def _check_disk(folder: Path, n_bytes: int) -> None:
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise Unavailable(f"{existing} has {free} bytes free, the merged model takes {n_bytes}: free {n_bytes - free}")


def _add(file: BinaryIO, site: _Site) -> None:
    wire, (n_rows, n_columns) = site.tensor.wire, site.tensor.shape
    assert wire is not None
    row_bytes = n_columns * tensors.ITEM_BYTES[wire]
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, n_rows, step):
        left = site.left[start : start + step]
        place, shape = site.tensor.offset + start * row_bytes, (len(left), n_columns)
        file.seek(place)
        weight = tensors.decode(file.read(len(left) * row_bytes), shape, wire)
        block = tensors.encode(weight + left @ site.right, wire)
        if not np.isfinite(tensors.decode(block, shape, wire)).all():
            raise BadConfig(
                f"a merged weight of {site.shard} leaves the range of {wire}: convert the base to bf16 first"
            )
        file.seek(place)
        file.write(block)
