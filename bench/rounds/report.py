"""What the benchmark of rounds comes to: its summary for programs and its table for people."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

MIB = 2**20


def seconds(part: Mapping[str, Any] | None) -> float | None:
    """The mean round, as NVFlare's take 2.5 or 3.0 s by how its polls fall; None where the part has not been run."""
    return fmean(part["rounds_s"]) if part else None


def summary(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures that the goals name.

    overhead_s is our round less the bare publishes of the same bytes with one broadcast down, without what the aggregation
    takes; tensors_*_ratio compare rounds that took turns; vs_* are how many of our rounds one of theirs takes, NVFlare's against ours with TLS, as it has it too.
    """
    ours, tls = seconds(found.get("fedpipe")), seconds(found.get("fedpipe.tls"))
    beside = {n: seconds(found.get(f"in-turn.{n}-tensors")) for n in (64, 2, 448, 12_008)}
    return {
        "round_s": ours,
        "round_tls_s": tls,
        "overhead_s": _less(ours, seconds(found.get("bare.broadcast"))),
        "overhead_tls_s": _less(tls, seconds(found.get("bare.broadcast.tls"))),
        "fold_s": found["fedpipe"]["fold_s"] if ours else None,
        "vs_flower": _ratio(seconds(found.get("flower")), ours),
        "vs_flower_tls": _ratio(seconds(found.get("flower.tls")), tls),
        "vs_nvflare": _ratio(seconds(found.get("nvflare")), tls),
        "peak_over_payload": max((p["peak_over_payload"] for name, p in _own(found)), default=None),
        **{f"tensors_{n}_ratio": _ratio(seen, beside[64]) for n, seen in beside.items() if n != 64 and seen},
    }


def _own(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, part) for name, part in found.items() if name.split(".")[0] == "fedpipe"]


def _less(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def table(found: Mapping[str, Any]) -> str:
    """One line for each part, and the summary."""
    lines = [f"{'':22} {'round s':>8} {'down':>6} {'up':>6} {'fold':>6} {'plan':>6} {'CPU s':>6} {'MiB':>7}  peak MiB"]
    for name, part in found.items():
        if name in {"machine", "summary"}:
            continue
        phases, cpu = part.get("phases", {}), part.get("cpu_s")
        whole = sum(cpu.values()) if isinstance(cpu, dict) else cpu
        cells = [phases.get(key) for key in ("down", "up", "fold", "plan")]
        shown = " ".join(f"{cell:6.2f}" if cell is not None else " " * 6 for cell in [*cells, whole])
        through = f"{part['broker_bytes'] / MIB:7.1f}" if "broker_bytes" in part else " " * 7
        peak = ", ".join(f"{kind} {size / MIB:.0f}" for kind, size in part.get("peak_bytes", {}).items())
        lines.append(f"{name:22} {seconds(part):8.2f} {shown} {through}  {peak}")
    told = {key: value for key, value in found.get("summary", {}).items() if value is not None}
    return "\n".join([*lines, *(f"{key:22} {value:8.2f}" for key, value in told.items())])
