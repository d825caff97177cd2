"""What training needs on this server: the GPU and its driver, torch with its 4-bit backend, base models, data sets."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from agent.bases import BasesConfig, resolve
from agent.config import AgentConfig
from agent.data import DataConfig
from fedpipe.doctor.findings import Finding, failed, objected, ok, warning
from protocol.errors import OutsideFault
from protocol.messages import Base

GIB: Final = 2**30
TORCH_S: Final = 150.0
READ_S: Final = 60.0
FIRST: Final = 1000
"""So many examples are read in a quick look."""
DEPTH: Final = 3

TORCH: Final = ("torch", "cuda", "bitsandbytes")
_TRY_TORCH: Final = """
import json, torch
found = {"torch": torch.__version__, "built": torch.version.cuda or "", "gpus": [], "unreachable": "", "fault": ""}
try:
    if found["built"]:
        torch.cuda.init()
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
except Exception as error:
    found["unreachable"] = str(error).partition("\\n")[0]
try:
    import bitsandbytes as bnb
    found["bitsandbytes"] = bnb.__version__
    place = "cuda" if found["gpus"] else "cpu"
    packed, state = bnb.functional.quantize_4bit(torch.randn(64, 64, device=place), quant_type="nf4")
    bnb.functional.dequantize_4bit(packed, state)
except Exception as error:
    found["fault"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class _Torch(msgspec.Struct):
    torch: str
    built: str
    gpus: list[str]
    unreachable: str
    fault: str
    bitsandbytes: str = ""


def gpu(device: str) -> Iterator[Finding]:
    """Finding gpu: what the driver says."""
    from agent.gpus import gpus

    notes: list[str] = []
    found, driver = gpus(notes)
    if not found:
        why = notes[0].partition(":")[0] if notes else "no GPU is visible (CUDA_VISIBLE_DEVICES?)"
        if device.startswith("cuda"):
            advice = "install the driver until nvidia-smi works, or set device in the agent's configuration"
            yield failed("gpu", f'{why}, and device = "{device}" needs one', advice)
        elif device == "cpu":
            yield ok("gpu", f"{why}; none is wanted")
        else:
            advice = 'if this server has a GPU, install its driver until nvidia-smi works; else set device = "cpu"'
            yield warning("gpu", f"{why}: training runs on the CPU", advice)
        return
    text = ", ".join(
        f"{one.name} with {one.free_bytes / GIB:.1f} of {one.total_bytes / GIB:.1f} GiB free" for one in found
    )
    text = f"driver {driver}: {text}"
    number = device.partition(":")[2]
    if number and int(number) >= len(found):
        yield failed("gpu", f'{text}; there is no "{device}"', f"set device to cuda:0 .. cuda:{len(found) - 1}")
    elif sick := [str(one.index) for one in found if one.ecc_errors]:
        yield warning(
            "gpu",
            f"{text}; uncorrected memory errors on {', '.join(sick)}",
            "nvidia-smi -q -d ECC; reset or replace it",
        )
    else:
        yield ok("gpu", text)


def torch(device: str) -> Iterator[Finding]:
    """The findings of TORCH: imported in a process of its own, a GPU that it reaches, one matrix held in 4 bits."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY_TORCH], capture_output=True, text=True, timeout=TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield failed(
            "torch",
            f"not imported within {TORCH_S:.0f} s",
            "see how busy the machine is, and try python -c 'import torch'",
        )
        return
    try:
        found = msgspec.json.decode(done.stdout.strip().rpartition("\n")[2], type=_Torch)
    except msgspec.MsgspecError:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        yield failed("torch", f"it cannot be imported ({last})", "install it anew: fedpipe-setup agent")
        return
    yield ok("torch", found.torch)
    yield _cuda(device, found)
    text = f"bitsandbytes {found.bitsandbytes or 'missing'}"
    if found.fault:
        advice = 'without it no base can be held in 4 or 8 bits: fedpipe-setup agent, or limits.bits = ["none"]'
        yield warning("bitsandbytes", f"{text}; 4 bits do not work ({found.fault})", advice)
    else:
        yield ok("bitsandbytes", f"{text}, holds a matrix in 4 bits")


def _cuda(device: str, found: _Torch) -> Finding:
    from agent.gpus import gpus

    if found.gpus:
        return ok("cuda", f"CUDA {found.built} reaches {', '.join(found.gpus)}")
    text = f"this torch is built for CUDA {found.built}" if found.built else "this torch is built without CUDA"
    text += f", and reaches no GPU{found.unreachable and f' ({found.unreachable})'}"
    advice = "install a build of torch for this driver (pytorch.org, get started), and load nvidia-uvm before the agent"
    if device.startswith("cuda"):
        return failed("cuda", f'{text}; device = "{device}" needs one', advice)
    if device != "cpu" and gpus([])[0]:
        return warning("cuda", f"{text}, though the driver shows one: training runs on the CPU", advice)
    return ok("cuda", f"{text}; none is wanted or there")


def models(config: BasesConfig) -> Iterator[Finding]:
    """Finding models: every folder that is named, and what lies below those that are opened."""
    found: list[str] = []
    for source in config.models:
        try:
            found.append(f"{source} ({_size(resolve(Base(source=source), config)) / GIB:.1f} GiB)")
        except OutsideFault as error:
            yield objected("models", error)
            return
        except OSError as error:
            yield failed(
                "models",
                f"{source}: {error.filename} cannot be read ({error.strerror})",
                "let the daemon's user read it",
            )
            return
    for opened in config.model_dirs:
        folder = Path(opened).expanduser()
        if not folder.is_dir():
            yield failed("models", f"model_dirs: {folder} does not exist", "correct it in the agent's configuration")
            return
        found += [str(place.relative_to(folder)) for place in below(folder)]
    if found or config.allow_hub:
        yield ok("models", ", ".join(found) + ("; others from the hub" if config.allow_hub else ""))
    else:
        yield warning(
            "models", "no base model is here", "put one below one of model_dirs, or name its folder in [base] models"
        )


def below(folder: Path) -> list[Path]:
    """Model folders below `folder`, some levels deep, by name."""
    patterns = ["/".join(["*"] * depth) + "/config.json" for depth in range(1, DEPTH + 1)]
    return sorted(file.parent for pattern in patterns for file in folder.glob(pattern) if _has_weights(file.parent))


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _size(folder: Path) -> int:
    """Bytes of the weights.  Raises OSError for a file that cannot be read."""
    total = 0
    for file in [folder / "config.json", *folder.glob("*.safetensors")]:
        with file.open("rb") as content:
            content.read(1)
            total += os.fstat(content.fileno()).st_size
    return total


def data(config: AgentConfig, *, quick: bool) -> Iterator[Finding]:
    """Finding data: every set is read, as training would, and counted."""
    from agent.data.files import rows
    from agent.data.shapes import examples

    if not config.data:
        yield warning(
            "data", "no data set is named: no job can use this server", "add a table [data.default] with its path"
        )
        return
    told = []
    for name, one in config.data.items():
        try:
            found = examples(rows(Path(one.path).expanduser()), one)
            n, is_all = _count(found, min(FIRST, one.max_examples or FIRST) if quick else one.max_examples)
        except OutsideFault as error:
            yield _named(name, one, objected("data", error))
            return
        except OSError as error:
            yield failed(
                "data", f"{name}: {error.filename or one.path}: {error.strerror}", "let the daemon's user read it"
            )
            return
        if n == 0:
            yield failed("data", f"{name}: {one.path} holds no example", "correct its path, shape or fields")
            return
        told.append(f"{name} has {n}{'' if is_all else ' or more'} examples")
    yield ok("data", ", ".join(told))


def _count(found: Iterator[object], most: int) -> tuple[int, bool]:
    """How many there are, and whether that is all: at most `most` (0: all) are read, and no longer than READ_S."""
    n, end_s = 0, time.monotonic() + READ_S
    for _ in itertools.islice(found, most or None):
        n += 1
        if time.monotonic() > end_s:
            return n, False
    return n, not most or n < most


def _named(name: str, config: DataConfig, finding: Finding) -> Finding:
    return msgspec.structs.replace(finding, found=f"{name} ({config.path}): {finding.found}")
