"""The results as pictures: held-out loss over virtual time and over uplink bytes, legible on light and dark ground."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.pipeline.running import Point
from bench.pipeline.summary import Report
from bench.pipeline.systems import EVERY, FEDPIPE
from fedpipe.plots import GREY, PALETTE

SIZE: Final = (7.0, 4.2)
AXES: Final[dict[str, tuple[str, Callable[[Point], float]]]] = {
    "time": ("virtual time (s)", lambda p: p.time_s),
    "bytes": ("uplink of the whole fleet (MB)", lambda p: p.up_bytes / 1e6),
}


def draw(found: Report, folder: Path) -> list[Path]:
    """Write pipeline-time.svg and pipeline-bytes.svg: one line per system and seed, fedpipe's in bold, parts taken away dashed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look = {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "pipeline",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GREY
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(look):
        for name, (label, x) in AXES.items():
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.add_subplot()
            for at, (system, line) in enumerate(_drawn(found)):
                for nth, run in enumerate(r for r in found.runs if r.system == system):
                    points = run.points
                    axes.plot(
                        [x(p) for p in points],
                        [p.loss for p in points],
                        label="_" if nth else system,
                        alpha=0.4 if nth else 1.0,
                        color=PALETTE[at % len(PALETTE)],
                        ls=line,
                        lw=2.4 if system == FEDPIPE.name else 1.1,
                    )
            axes.set_xlabel(label)
            axes.set_ylabel("held-out loss of the global model")
            axes.grid(alpha=0.25)
            figure.legend(loc="outside right upper", frameon=False)
            path = folder / f"pipeline-{name}.svg"
            figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            written.append(path)
    return written


def _drawn(found: Report) -> list[tuple[str, str]]:
    systems = {r.system for r in found.runs}
    is_part = {name: not system.is_baseline and name != FEDPIPE.name for name, system in EVERY.items()}
    return [(name, "--" if is_part[name] else "-") for name in EVERY if name in systems]
