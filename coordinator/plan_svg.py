"""A plan as a picture: heat maps of ranks as SVG, for a page that has `STYLE` in it or as a file by itself.

One hue, fainter or stronger over the ground (a value per level, so the order survives grey and colour blindness); a number
in every cell says it exactly.  Colours come from CSS variables with one value for light and one for dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from coordinator.figures import plain
from coordinator.heatmap import Cell, Grid, Place, cells, grid, level, rank_text
from coordinator.plan_text import plan_line, plan_of
from coordinator.plan_views import PlanView

STYLE: Final = """\
.heat { --heat: #1d4ed8; --heat-ink: #fff; --heat-none: #8a8f98; font: 9px var(--font, system-ui, sans-serif); }
.heat text { fill: currentColor; font-variant-numeric: tabular-nums; }
.heat .cell { fill: var(--heat); }
.heat .none { fill: var(--heat-none); fill-opacity: .1; }
.heat .hi { fill: var(--heat-ink); }
.heat .soft { fill-opacity: .7; }
@media (prefers-color-scheme: dark) { .heat { --heat: #60a5fa; --heat-ink: #0b1220; } }
"""
ALONE: Final = """\
svg { color: #1b1f24; background: #fbfbfa; }
@media (prefers-color-scheme: dark) { svg { color: #e6e8eb; background: #14171a; } }
"""
ROW: Final = 15
CELL: Final = 28
LETTER: Final = 5.4
"""Width of a letter of 9 px, about."""
FAINTEST: Final = 0.12
INK_FROM: Final = 0.72
"""From this strength on a number is set in the ground's colour."""
PER_ROW: Final = 3
GAP: Final = 24


def agent_svg(view: PlanView, agent: str) -> str:
    """One agent's ranks as an <svg> for a page.  The scale is the plan's, so that agents can be compared."""
    choice = plan_of(view, agent).choice
    found = grid(view.matrices)
    held = cells(found, [choice.ranks])
    width, height, body = _heat(found, held, {place: rank_text(cell.rank) for place, cell in held.items()}, _top(view))
    label = escape(f"ranks of {agent}: {len(choice.ranks)} of {len(view.matrices)} matrices", {'"': "&quot;"})
    return f'<svg class="heat" role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">{body}</svg>'


def document(view: PlanView, agent: str | None = None) -> str:
    """A whole SVG file: the fleet and every agent, or one agent alone.  Raises BadConfig for an agent without a plan."""
    parts: list[tuple[str, str, tuple[float, float, str]]] = []
    found = grid(view.matrices)
    for name in [agent] if agent else view.agents:
        plan = plan_of(view, name)
        held = cells(found, [plan.choice.ranks])
        labels = {place: rank_text(cell.rank) for place, cell in held.items()}
        parts.append((name, plan_line(view, plan), _heat(found, held, labels, _top(view))))
    if agent is None and len(parts) > 1:
        parts.insert(0, ("the fleet", "mean rank / how many agents train it", _fleet(view)))
    return _placed(view, parts)


def _placed(view: PlanView, parts: Sequence[tuple[str, str, tuple[float, float, str]]]) -> str:
    column = max([320.0, *(width for _, _, (width, _, _) in parts)]) + GAP
    row = max([0.0, *(height for _, _, (_, height, _) in parts)]) + 44 + GAP
    out = []
    for i, (name, line, (_, _, body)) in enumerate(parts):
        x, y = GAP + column * (i % PER_ROW), 52 + row * (i // PER_ROW)
        first, _, second = line.partition("; ")
        words = f'<tspan x="0" dy="12">{escape(first)}</tspan><tspan x="0" dy="12">{escape(second)}</tspan>'
        title = f'<text font-size="11" font-weight="600">{escape(name)}</text><text class="soft">{words}</text>'
        out.append(f'<g transform="translate({x:g} {y:g})">{title}<g transform="translate(0 32)">{body}</g></g>')
    width = GAP + column * min(PER_ROW, max(1, len(parts)))
    height = 52 + row * -(-len(parts) // PER_ROW)
    head = f"{view.job}: plan made for round {view.round}" + (f": {view.reason}" if view.reason else "")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="heat" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}"><style>{ALONE}{STYLE}</style>'
        f'<text x="{GAP}" y="26" font-size="13" font-weight="600">{escape(plain(head))}</text>{"".join(out)}</svg>\n'
    )


def _top(view: PlanView) -> float:
    return float(max((rank for plan in view.agents.values() for rank in plan.choice.ranks.values()), default=0))


def _fleet(view: PlanView) -> tuple[float, float, str]:
    found = grid(view.matrices)
    held = cells(found, [plan.choice.ranks for plan in view.agents.values()])
    labels = {place: f"{rank_text(cell.rank)}/{cell.n}" if cell.n else "·" for place, cell in held.items()}
    return _heat(found, held, labels, _top(view))


def _heat(found: Grid, held: Mapping[Place, Cell], labels: Mapping[Place, str], top: float) -> tuple[float, float, str]:
    """Width, height and elements of one grid with its layers' numbers at the left and its kinds above."""
    longest = max([1, *(len(text) for text in [*found.kinds, *labels.values()])])
    cell, left = max(CELL, longest * LETTER + 6), 20
    out = []
    for x, kind in enumerate(found.kinds):
        place = f'x="{left + (x + 0.5) * cell:g}" y="10" text-anchor="middle"'
        out.append(f'<text class="soft" {place}>{escape(kind)}</text>')
    for y, layer in enumerate(found.layers):
        name = "–" if layer is None else str(layer)
        out.append(f'<text class="soft" x="{left - 5}" y="{15 + y * ROW + 10}" text-anchor="end">{name}</text>')
        for x, kind in enumerate(found.kinds):
            if (layer, kind) in held:
                strength = level(held[layer, kind].rank, top)
                out.append(_cell(left + x * cell, 15 + y * ROW, cell, strength, labels[layer, kind]))
    return left + cell * len(found.kinds), 15.0 + ROW * len(found.layers), "".join(out)


def _cell(x: float, y: float, width: float, strength: float, label: str) -> str:
    box = f'x="{x:g}" y="{y:g}" width="{width - 1:g}" height="{ROW - 1}" rx="2"'
    text = f'x="{x + (width - 1) / 2:g}" y="{y + 10.5:g}" text-anchor="middle"'
    if strength <= 0:
        return f'<rect class="none" {box}/><text class="soft" {text}>{label}</text>'
    opacity = FAINTEST + (1 - FAINTEST) * strength
    ink = ' class="hi"' if opacity >= INK_FROM else ""
    return f'<rect class="cell" {box} fill-opacity="{opacity:.2f}"/><text{ink} {text}>{label}</text>'
