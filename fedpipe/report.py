"""The demo's report: report.json for programs, report.html for people, loss.png for a README, a summary for the terminal.

The page is one file without scripts or requests: it can be mailed, kept with the adapter, and opened years later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from rich.color import Color
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from coordinator.cost import spent_text
from coordinator.figures import duration_text, error_text, loss_text, share_text, size_text, step_text
from coordinator.plan_svg import STYLE, agent_svg
from coordinator.plan_text import agent_facts, plan_line
from coordinator.plan_views import under_training
from fedpipe import plots
from fedpipe.outcome import AgentRound, Eval, Note, Participant, Report, RoundOutcome, Sample

__all__ = [
    "AgentRound",
    "Eval",
    "Files",
    "Note",
    "Participant",
    "Report",
    "RoundOutcome",
    "Sample",
    "terminal",
    "write_report",
]

MAX_HEAT_MAPS: Final = 24
"""Beyond that nobody compares them by eye."""
TEMPLATES: Final = Path(__file__).parent / "templates"
COLOURS: Final = ("bright_blue", "bright_yellow", "bright_green", "bright_magenta", "bright_red", "bright_cyan")
"""The terminal's own, so that its theme decides; the mean has the colour of its text."""
LOAD: Final = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {adapter!r})"""


class Files(NamedTuple):
    """Where the report lies."""

    json: Path
    html: Path
    png: Path


def write_report(report: Report, folder: Path) -> Files:
    """Write report.json, report.html and loss.png into `folder`; about a second."""
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(folder / "report.json", folder / "report.html", folder / "loss.png")
    files.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    files.html.write_text(page(report), encoding="utf-8")
    files.png.write_bytes(plots.png(report))
    return files


def page(report: Report) -> str:
    """Return the whole page as HTML.  Everything that came from outside is escaped by the template."""
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"loss": loss_text, "size": size_text, "clock": duration_text, "change": change_text}
    environment.filters |= {"step": step_text, "percent": share_text, "error": error_text}
    environment.filters["line"] = plan_line
    environment.filters["spent"] = spent_text
    environment.filters["undone"] = lambda share: under_training([(share.samples, share.planned_samples)])
    environment.filters["facts"] = agent_facts
    environment.filters["reasons"] = lambda agents: [a.reason for a in agents.values() if a.reason]
    pictures = {title: Markup(picture) for title, picture in plots.drawings(report).items()}  # noqa: S704 - our own SVG
    shown = list(report.plan.agents)[:MAX_HEAT_MAPS] if report.plan and report.plan.matrices else []
    ranks = {agent: Markup(agent_svg(report.plan, agent)) for agent in shown if report.plan}  # noqa: S704 - our own SVG
    load = LOAD.format(base=report.model, adapter=report.adapter)
    return environment.get_template("report.html").render(
        report=report,
        pictures=pictures,
        ranks=ranks,
        heat_style=Markup(STYLE),  # noqa: S704 - our own CSS
        verdict=verdict(report),
        colours=plots.colours(report.names),
        load=load,
    )


def verdict(report: Report) -> str:
    """Say in one sentence whether the federation was worth it."""
    found = report.eval
    beaten = sum(final < base for base, final in found.per_agent.values())
    text = f"The federated adapter beats the base on {beaten} of {len(found.per_agent)} agents' held-out text"
    if not found.alone:
        return f"{text}."
    behind = sum(found.final < loss for loss in found.alone.values())
    return f"{text} and beats {behind} of {len(found.alone)} agents trained alone on the mean over all texts."


def change_text(before: float, after: float) -> str:
    """Relative change of a loss: -12.3 %."""
    return f"{100 * (after - before) / before:+.1f} %".replace("-", "\N{MINUS SIGN}") if before else ""


# ---------------------------------------------------------------------------------------------------------- terminal


def terminal(report: Report, console: Console) -> None:
    """Print the summary: losses, the curve, three completions before and after, where the adapter lies."""
    console.print()
    console.print(_losses(report))
    if len(report.mean_curve) > 1:
        console.print()
        console.print(_curve(report, min(console.width, 90)), soft_wrap=True)
    for sample in report.samples[:3]:
        console.print()
        for part in _completion(sample):
            console.print(part)
    console.print()
    console.print(verdict(report), style="bold", highlight=False)
    rounds = f"{len(report.rounds)} rounds, {duration_text(report.wall_s)}"
    console.print(f"{rounds}, {size_text(report.bytes_moved) or 'nothing'} moved", style="dim", highlight=False)
    console.print(f"agents: {spent_text(report.cost)}", style="dim", highlight=False)
    if report.adapter:
        console.print(Text.assemble("adapter: ", (report.adapter, "bold cyan")), soft_wrap=True)


def _losses(report: Report) -> Table:
    """One line per agent, and the means that decide."""
    found = report.eval
    columns = ["held-out loss on", "base", *(f"{agent} alone" for agent in _alone(report)), "federation", "change"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for agent, (base, final) in found.per_agent.items():
        alone = [loss_text(found.alone_on.get(other, {}).get(agent)) for other in _alone(report)]
        table.add_row(agent, loss_text(base), *alone, loss_text(final), change_text(base, final))
    alone = [loss_text(found.alone[other]) for other in _alone(report)]
    last = [loss_text(found.base), *alone, loss_text(found.final), change_text(found.base, found.final)]
    table.add_row("mean", *last, style="bold")
    return table


def _alone(report: Report) -> Sequence[str]:
    """The agents trained alone that fit on a line."""
    names = list(report.eval.alone)
    return names if len(names) <= 4 else [report.eval.best_alone]


def _curve(report: Report, width: int) -> Text:
    """Draw the held-out losses over rounds with plotext; the mean is drawn last, over the others."""
    import plotext

    figure: Any = plotext.figure
    figure.clear()
    figure.theme("colorless").plot_size(width, 13)
    shown = list(report.curves.items())[: len(COLOURS)]
    legend = Text("held-out loss after each round   ", style="dim")
    for (name, points), colour in zip([*shown, ("mean", report.mean_curve)], [*COLOURS[: len(shown)], ""], strict=True):
        pixel = plotext.pixel(Color.parse(colour).number if colour else None)
        rounds, losses = [x for x, _ in points], [y for _, y in points]
        figure.draw(figure.signal(rounds, losses, marker=plotext.marker("braille", pixel=pixel)).lines())
        legend.append("\N{BLACK CIRCLE} ", style=f"not dim {colour}").append(f"{name}  ", style="not dim")
    rounds = [x for x, _ in report.mean_curve]
    figure.ruler("x").ticks(rounds[:: max(1, len(rounds) // 10)])
    text: str = figure.build().string()
    figure.clear()
    return Text("\n").join([legend, Text.from_ansi(text.rstrip("\n"))])


def _completion(sample: Sample) -> Iterator[Text | Padding]:
    yield Text(sample.prompt, style="cyan")
    for label, text, style in (
        ("text", sample.reference, "dim"),
        ("before", sample.before, "red"),
        ("after", sample.after, "green"),
    ):
        yield Padding(Text.assemble((f"{label:>6}  ", "dim"), (text or "(nothing)", style)), (0, 0, 0, 2))
