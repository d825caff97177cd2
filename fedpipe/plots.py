"""The report's pictures: matplotlib draws them once, the page's own colours show them in light and in dark.

Text and lines are drawn in two marker colours that `svg` replaces by CSS's currentColor; agents have mid-tone colours that
are legible on both grounds.  Text stays text, so it is set in the page's font and can be selected.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from fedpipe.outcome import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE: Final = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#ec4899", "#84cc16")
INK, FAINT = "#1a1e23", "#dee1e5"
"""Stand-ins for the page's text and line colours; in the PNG they are what they say."""
GREY: Final = "#8a8f98"
SIZE: Final = (4.2, 2.75)
"""Inches; small enough for its 9 points to be legible on a phone."""

Drawing = Callable[[Report, "Axes"], None]


def drawings(report: Report) -> dict[str, str]:
    """Return title -> inline SVG, of the pictures that the report has figures for.  Costs about 0.1 s each."""
    wanted: dict[str, tuple[Drawing, object]] = {
        "Held-out loss": (held_out, len(report.mean_curve) > 1),
        "Gain over the base on everybody's text": (comparison, report.eval.alone),
        "Gain over the base on each agent's own text": (per_agent, report.eval.per_agent),
        "Training loss": (training, any(a.loss for r in report.rounds for a in r.agents.values())),
        "Bytes on the wire": (traffic, report.bytes_moved),
        "Time": (timeline, any(a.wall_s or a.train_s for r in report.rounds for a in r.agents.values())),
    }
    return {title: svg(draw, report) for title, (draw, has_data) in wanted.items() if has_data}


def svg(draw: Drawing, report: Report) -> str:
    """Draw one picture as an SVG element that scales with its place and takes its colours from the page."""
    out = io.StringIO()
    figure = _figure(draw, report)
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": draw.__name__}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    head, _, rest = text[text.index("<svg") :].partition(">")
    text = re.sub(r' (?:width|height)="[^"]*"', "", head).replace("<svg", '<svg role="img"', 1) + ">" + rest
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: (\d+)px [^;\"]*", r"font: \1px var(--font)", text)
    return text.replace(INK, "currentColor").replace(FAINT, "var(--line)")


def png(report: Report) -> bytes:
    """Draw the held-out loss as a picture on white, for a terminal or a README."""
    out = io.BytesIO()
    figure = _figure(held_out if len(report.mean_curve) > 1 else comparison, report)
    figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()


def _figure(draw: Drawing, report: Report) -> Figure:
    """Draw without pyplot: no global state, no window system, safe in any thread."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    look = {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(report, figure.add_subplot())
        return figure


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour per agent; a crowd is grey, because nobody tells thirty colours apart."""
    many = len(names) > len(PALETTE)
    return {name: GREY if many else PALETTE[i] for i, name in enumerate(names)}


def held_out(report: Report, axes: Axes) -> None:
    """Held-out loss over rounds: each agent on its own text, and their mean."""
    colour, few = colours(report.names), len(report.names) <= len(PALETTE)
    for agent, points in report.curves.items():
        axes.plot(
            *_columns(points),
            color=colour[agent],
            lw=1.6 if few else 0.6,
            marker="o",
            ms=3,
            label=agent if few else None,
        )
    axes.plot(*_columns(report.mean_curve), color=INK, lw=2.4, marker="o", ms=4, label="mean")
    if report.eval.alone:
        best = report.eval.best_alone
        axes.axhline(report.eval.alone[best], color=GREY, lw=1.2, ls="--", label=f"mean of {best} alone")
    _rounds_axis(axes, "rounds of the federation", [n for n, _ in report.mean_curve])
    axes.set_ylabel("nats per token")
    axes.legend()


def comparison(report: Report, axes: Axes) -> None:
    """What was gained on everybody's text, in the mean: each agent alone, and the federation."""
    found, colour = report.eval, colours(report.names)
    alone = sorted(found.alone.items(), key=lambda item: -item[1])[:12]
    names = [*(f"{_short(agent)} alone" for agent, _ in alone), "federation"]
    gains = [found.base - loss for loss in [*(loss for _, loss in alone), found.final]]
    bars = axes.barh(names, gains, color=[*(colour.get(agent, GREY) for agent, _ in alone), INK], height=0.6)
    axes.bar_label(bars, [f"{gain:.3f}" for gain in gains], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.axvline(0, color=FAINT)
    axes.margins(x=0.15)
    axes.set_xlabel("nats per token, mean over all texts")


def per_agent(report: Report, axes: Axes) -> None:
    """What was gained on each agent's own text: alone (faint), with the federation (solid)."""
    from matplotlib.patches import Patch

    found, colour = report.eval, colours(report.names)
    names = list(found.per_agent)[:12]
    gains = [found.per_agent[n][0] - found.per_agent[n][1] for n in names]
    alone = [found.per_agent[n][0] - found.alone_on.get(n, {}).get(n, found.per_agent[n][0]) for n in names]
    shades = [colour[n] for n in names]
    width = 0.36 if found.alone_on else 0.0
    axes.bar([x + width / 2 for x in range(len(names))], gains, 0.36, color=shades)
    handles = [Patch(color=INK, label="federation")]
    if found.alone_on:
        axes.bar([x - width / 2 for x in range(len(names))], alone, 0.36, color=shades, alpha=0.4)
        handles.insert(0, Patch(color=INK, alpha=0.4, label="alone"))
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=45 if len(names) > 5 else 0)
    axes.set_ylabel("nats per token below the base")
    axes.legend(handles=handles, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def training(report: Report, axes: Axes) -> None:
    """Training loss of each agent's share, round by round."""
    colour, few = colours(report.names), len(report.names) <= len(PALETTE)
    for agent in report.names:
        points = [(r.round, a.loss) for r in report.rounds if (a := r.agents.get(agent)) and a.loss is not None]
        axes.plot(
            *_columns(points),
            color=colour[agent],
            lw=1.6 if few else 0.6,
            marker="o",
            ms=3,
            label=agent if few else None,
        )
    _rounds_axis(axes, "round", [r.round for r in report.rounds])
    axes.set_ylabel("nats per token")
    if few:
        axes.legend()


def traffic(report: Report, axes: Axes) -> None:
    """Bytes that moved in each round: adapters down, updates up."""
    rounds = [r.round for r in report.rounds]
    up = [sum(a.bytes_up for a in r.agents.values()) / 1e6 for r in report.rounds]
    down = [sum(a.bytes_down for a in r.agents.values()) / 1e6 for r in report.rounds]
    axes.bar(rounds, down, color=PALETTE[0], width=0.6, label="models, down")
    axes.bar(rounds, up, bottom=down, color=PALETTE[1], width=0.6, label="updates, up")
    _rounds_axis(axes, "round", rounds)
    axes.set_ylabel("MB")
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def timeline(report: Report, axes: Axes) -> None:
    """Where each agent's time went: training solid, the rest of its share faint."""
    colour, names = colours(report.names), report.names[:24]
    for outcome in report.rounds:
        axes.axvline(outcome.began_s, color=FAINT, lw=0.8)
        for row, agent in enumerate(names):
            share = outcome.agents.get(agent)
            if share is None:
                continue
            whole = max(share.wall_s, share.train_s)
            failed = share.state not in {"DONE", "UPLOADING"}
            axes.barh(row, whole, left=outcome.began_s, color=colour[agent], alpha=0.3, height=0.5)
            axes.barh(row, share.train_s, left=outcome.began_s, color=colour[agent], height=0.5)
            if failed:
                axes.plot(outcome.began_s + whole, row, marker="x", color=PALETTE[4], ms=6, mew=2)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("seconds (solid: training; × did not finish)")


def _rounds_axis(axes: Axes, label: str, rounds: Sequence[int]) -> None:
    step = max(1, len(rounds) // 10)
    axes.set_xticks(rounds[::step])
    axes.set_xlabel(label)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
