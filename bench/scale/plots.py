"""The four pictures of growth, in log-log with their exponents, legible on light and dark ground; and what they are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from bench.scale.growth import exponent
from fedpipe.plots import GREY, PALETTE

SIZE: Final = (6.0, 3.8)
Points: TypeAlias = dict[float, float]
PARTS: Final = ("agents", "coordinator", "broker")


class Picture(NamedTuple):
    """One plot: what grows, and lines by their names."""

    label: str
    cost: str
    lines: dict[str, Points]


def pictures(found: Mapping[str, Any]) -> dict[str, Picture]:
    """Those of which something was measured, by the part of the results that they show."""
    labels = {
        "agents": "agents (1 MiB each way)",
        "tensors": "tensors (10 agents, 8 MiB each way)",
        "bytes": "MiB each way (3 agents, 64 tensors)",
    }
    shown = {
        name: Picture(label, "processor s a round", _parts(found[name]))
        for name, label in labels.items()
        if found.get(name)
    }
    if found.get("columns"):
        shown["columns"] = Picture("columns of one 4096 x 4096 sum", "processor s", _columns(found["columns"]))
    return shown


def _parts(measured: Mapping[str, Any]) -> dict[str, Points]:
    keys = {"agents": ("agent", "child"), "coordinator": ("coordinator",), "broker": ("broker",)}
    return {
        name: {float(x): sum(run["cpu_s"].get(key, 0.0) for key in keys[name]) for x, run in _sorted(measured)}
        for name in PARTS
    }


def _columns(measured: Mapping[str, Any]) -> dict[str, Points]:
    return {
        f"{kept} components": {float(run["columns"]): run["cpu_s"] for _, run in _sorted(runs)}
        for kept, runs in _sorted(measured)
    }


def _sorted(measured: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(measured.items(), key=lambda item: int(item[0]))


def exponents(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By what grows and by line, where there are two points at least."""
    return {
        name: {line: exponent(points) for line, points in picture.lines.items() if len(points) > 1}
        for name, picture in pictures(found).items()
    }


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write scale-agents.svg, scale-tensors.svg, scale-bytes.svg and scale-columns.svg, as far as there is something to show."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    greys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    look = {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "scale",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(greys, GREY),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(look):
        for name, picture in pictures(found).items():
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.add_subplot(xscale="log", yscale="log", xlabel=picture.label, ylabel=picture.cost)
            for at, (line, points) in enumerate(picture.lines.items()):
                told = f"{line}: exponent {exponent(points):.2f}" if len(points) > 1 else line
                axes.plot(list(points), list(points.values()), label=told, color=PALETTE[at], marker="o", ms=4, lw=1.6)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
            path = folder / f"scale-{name}.svg"
            figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            written.append(path)
    return written
