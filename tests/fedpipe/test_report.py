"""The report: its figures, its files, its page, its summary in a terminal."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree as ET

import msgspec
import pytest
from rich.console import Console

from coordinator.plan_views import PlanView
from fedpipe import plots
from fedpipe.report import (
    AgentRound,
    Eval,
    Note,
    Participant,
    Report,
    RoundOutcome,
    Sample,
    page,
    terminal,
    verdict,
    write_report,
)

BASE = {"torch": 5.0, "sympy": 4.0}
FINAL = {"torch": 4.0, "sympy": 3.0}
ALONE = {"torch": {"torch": 4.2, "sympy": 3.9}, "sympy": {"torch": 5.1, "sympy": 3.1}}
EVIL = "<script>alert('x')</script>"


def share(**changed: object) -> AgentRound:
    usual = AgentRound(
        state="DONE", samples=64, loss=4.5, bytes_up=1_000_000, bytes_down=500_000, train_s=9.0, wall_s=14.0
    )
    return msgspec.structs.replace(usual, **changed)


@pytest.fixture
def report(planned: Callable[..., PlanView]) -> Report:
    half = {agent: (BASE[agent] + FINAL[agent]) / 2 for agent in BASE}
    lost = share(state="TIMED_OUT", reason=f"went away {EVIL}", samples=0, loss=None, bytes_up=0, train_s=0.0)
    return Report(
        model="/cache/base-0",
        broker="mqtt://127.0.0.1:1883",
        wall_s=245.0,
        eval=Eval.of(BASE, FINAL, ALONE),
        agents={
            "torch": Participant(n_train=90, n_held_out=10, bits="nf4", n_matrices=6, rank=8.25),
            "sympy": Participant(),
        },
        rounds=[
            RoundOutcome(
                round=1, wall_s=15.0, began_s=60.0, loss=4.5, agents={"torch": share(), "sympy": lost}, held_out=half
            ),
            RoundOutcome(
                round=2, wall_s=15.0, began_s=80.0, agents={"torch": share(), "sympy": share()}, held_out=FINAL
            ),
        ],
        samples=[Sample(prompt=f'def f(x):\n    """{EVIL}', reference="Do it.", before="", after="Do it all.")],
        events=[Note(at_s=70.0, text=f"sympy was killed {EVIL}")],
        adapter="out/adapter",
        plan=planned(reason=EVIL),
    )


def minimal() -> Report:
    return Report(model="m", eval=Eval.of({"a": 2.0}, {"a": 2.5}, {}))


def test_means_weigh_every_agent_alike(report: Report) -> None:
    assert (report.eval.base, report.eval.final) == (4.5, 3.5)
    assert report.eval.alone == {agent: fmean(losses.values()) for agent, losses in ALONE.items()}
    assert report.eval.best_alone == "torch"


def test_curves_begin_with_the_base(report: Report) -> None:
    assert report.curves["sympy"] == [(0, 4.0), (1, 3.5), (2, 3.0)]
    assert report.mean_curve == [(0, 4.5), (1, 4.0), (2, 3.5)]


def test_a_round_that_one_agent_did_not_measure_has_no_mean(report: Report) -> None:
    rounds = [msgspec.structs.replace(report.rounds[0], held_out={"torch": 4.5}), report.rounds[1]]
    assert msgspec.structs.replace(report, rounds=rounds).mean_curve == [(0, 4.5), (2, 3.5)]


def test_the_verdict_counts(report: Report) -> None:
    assert "2 of 2 agents' held-out text" in verdict(report)
    assert "beats 2 of 2 agents trained alone" in verdict(report)
    assert "0 of 1 agents' held-out text" in verdict(minimal())


def test_json_reads_back_as_the_same_report(report: Report, tmp_path: Path) -> None:
    files = write_report(report, tmp_path / "new")
    assert msgspec.json.decode(files.json.read_bytes(), type=Report) == report
    plain = json.loads(files.json.read_text())
    assert plain["eval"]["base"] == 4.5
    assert plain["eval"]["per_agent"]["torch"] == [5.0, 4.0]
    assert plain["rounds"][0]["agents"]["sympy"]["state"] == "TIMED_OUT"
    assert files.png.read_bytes().startswith(b"\x89PNG")


class Outline(HTMLParser):
    """What a browser would load, and whether every element is closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("make", ["full", "minimal"])
def test_the_page_is_whole_and_needs_nothing_else(report: Report, make: str) -> None:
    text = page(report if make == "full" else minimal())
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert "script" not in outline.tags
    assert all(link.startswith("#") for link in outline.links)
    assert not re.search(r"@import|url\((?!#)", text)


def test_what_came_from_outside_is_text(report: Report) -> None:
    text = page(report)
    assert EVIL not in text
    assert text.count("&lt;script&gt;") == 4


def test_the_plan_is_drawn_and_explained_beside_what_was_measured(report: Report) -> None:
    text = page(report)
    assert text.count('<svg class="heat"') == 2
    assert text.count('class="cell"') == 6 + 2
    for words in ("What was planned", "nf4 fits", "clara is left out: no room", "5 % of the job", "+20 %", "−2 %"):
        assert words in text
    assert "What was planned" not in page(minimal())


def test_under_training_is_told_per_round_and_share(report: Report) -> None:
    shares = {"torch": share(samples=60, planned_samples=80), "sympy": share(samples=0, planned_samples=20)}
    outcome = msgspec.structs.replace(report.rounds[0], agents=shares)
    assert outcome.under_training == pytest.approx(0.4)
    text = page(msgspec.structs.replace(report, rounds=[outcome, report.rounds[1]], plan=None))
    cells = re.findall(r"<td>(\d+ %)</td>", text)
    assert cells[:3] == ["40 %", "25 %", "100 %"]
    assert "undone" not in page(report)


def test_pictures_are_svg_in_the_pages_colours(report: Report) -> None:
    pictures = plots.drawings(report)
    assert len(pictures) == 6
    for picture in pictures.values():
        root = ET.fromstring(picture)  # noqa: S314 - our own
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "currentColor" in picture
        assert plots.INK not in picture
        assert plots.FAINT not in picture


def test_pictures_are_the_same_every_time(report: Report) -> None:
    assert plots.drawings(report) == plots.drawings(report)


def test_only_pictures_with_figures_are_drawn() -> None:
    assert list(plots.drawings(minimal())) == ["Gain over the base on each agent's own text"]


def test_a_crowd_is_drawn_in_one_colour(report: Report) -> None:
    names = [f"agent-{i}" for i in range(30)]
    crowd = Eval.of(dict.fromkeys(names, 3.0), dict.fromkeys(names, 2.0), {n: dict.fromkeys(names, 2.5) for n in names})
    rounds = [RoundOutcome(round=1, wall_s=1, agents={n: share() for n in names}, held_out=dict.fromkeys(names, 2.0))]
    assert set(plots.colours(names).values()) == {plots.GREY}
    assert "agent-29" in page(msgspec.structs.replace(report, eval=crowd, rounds=rounds, agents={}))


def printed(report: Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    terminal(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_terminal_tells_losses_curve_completion_and_place(report: Report) -> None:
    text = printed(report)
    assert re.search(r"mean\s+4\.500\s+4\.050\s+4\.100\s+3\.500\s+−22\.2 %", text)
    assert "held-out loss after each round" in text
    assert any("\u2800" <= c <= "\u28ff" for c in text)
    assert "Do it all." in text
    assert "(nothing)" in text
    assert "adapter: out/adapter" in text
    assert "\x1b" not in text


def test_the_terminal_bears_little_data_and_little_room(report: Report) -> None:
    assert "0 of 1" in printed(minimal())
    assert "−22.2 %" in printed(report, width=60)
