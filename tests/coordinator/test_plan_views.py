"""A plan as people see it: where a rank belongs, what it says of the past, and that every picture of it is legible."""

import io
from collections.abc import Callable
from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.heatmap import Cell, cells, grid, level, rank_text
from coordinator.plan_svg import agent_svg, document
from coordinator.plan_text import agent_text, fleet_text, what_if_text
from coordinator.plan_views import PlanView, fleet_under_training, under_training
from protocol.errors import BadConfig

Planned = Callable[..., PlanView]
SVG = "{http://www.w3.org/2000/svg}"


def printed(what: RenderableType, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False, no_color=True)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def columns(text: str, first: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


# ---------------------------------------------------------------------------------------------------------------- grid


@pytest.mark.parametrize(
    ("names", "layers", "kinds"),
    [
        (
            [f"model.layers.{n}.{kind}" for n in (10, 9) for kind in ("mlp.down_proj", "self_attn.q_proj")],
            [9, 10],
            ["q", "down"],
        ),
        (
            [f"transformer.h.0.{kind}" for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
            [0],
            ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        ),
        (["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj"], [0], ["up"]),
        (["k", "lm_head", "model.layers.3.q"], [3, None], ["q", "k", "lm_head"]),
        (["1.2"], [1], ["1.2"]),
        ([], [], []),
    ],
)
def test_a_matrix_is_found_by_its_layer_and_kind(names: list[str], layers: list[int | None], kinds: list[str]) -> None:
    found = grid(names)
    assert (found.layers, found.kinds) == (layers, kinds)


@given(st.lists(st.text(alphabet="ab1.", min_size=1, max_size=9), unique=True))
def test_no_matrix_is_lost_whatever_its_name(names: list[str]) -> None:
    found = grid(names)
    assert sorted(name for held in found.names.values() for name in held) == sorted(names)
    assert all(layer in found.layers and kind in found.kinds for layer, kind in found.names)


def test_a_cell_is_the_mean_over_agents_and_counts_who_trains_it() -> None:
    found = grid(["h.0.q", "h.0.k", "h.1.e.0.q", "h.1.e.1.q"])
    held = cells(found, [{"h.0.q": 8, "h.1.e.0.q": 4}, {"h.0.q": 4}])
    assert held == {(0, "q"): Cell(6.0, 2), (0, "k"): Cell(0.0, 0), (1, "e.q"): Cell(1.0, 1)}


def test_colour_grows_with_rank_by_powers_of_two() -> None:
    strengths = [level(rank, 63) for rank in (0, 1, 3, 7, 15, 31, 63)]
    assert strengths == pytest.approx([n / 6 for n in range(7)])
    assert [rank_text(rank) for rank in (0, 8, 2.25, 63.5, 512.4)] == ["·", "8", "2.2", "63.5", "512"]


# ------------------------------------------------------------------------------------------------------ under-training


def test_under_training_is_what_is_missing_of_the_planned_samples() -> None:
    assert under_training([(60, 80), (20, 20), (7, 0)]) == pytest.approx(0.2)
    assert under_training([(0, 50)]) == 1.0
    assert under_training([(60, 50)]) == 0.0
    assert under_training([(9, 0)]) is None


def test_a_failed_attempt_is_not_counted_beside_the_next() -> None:
    def record(number: int, attempt: int, *samples: int) -> RoundRecord:
        shares = {f"a{i}": ShareRecord(state="DONE", samples=n, planned_samples=100) for i, n in enumerate(samples)}
        return RoundRecord(
            round=number,
            attempt=attempt,
            purpose="train",
            version=0,
            outcome="",
            opened_at=0,
            wall_s=1,
            loss=None,
            shares=shares,
        )

    assert fleet_under_training([record(1, 0, 100, 0), record(1, 1, 100, 90), record(2, 0, 70, 80)]) == pytest.approx(
        0.15
    )


# ---------------------------------------------------------------------------------------------------------------- view


def test_a_view_tells_what_is_expected_and_what_was_measured(planned: Planned) -> None:
    view = planned()
    assert (view.round, view.reason, view.pinned) == (2, "anna came back", False)
    assert (view.transfer_s, view.round_s, view.job_s) == (5.0, 25.0, 1000.0)
    assert view.under_training == pytest.approx(0.25)
    anna, berta = view.agents["anna"], view.agents["berta"]
    assert (anna.device, anna.calibrated_s, anna.pins) == ("RTX 3090", 50.0, [])
    assert (berta.calibrated_s, berta.uncalibrated) == (None, "no time left")
    assert anna.measured is not None
    assert anna.measured.step_s == 0.6
    assert msgspec.json.decode(msgspec.json.encode(view), type=PlanView) == view


# ------------------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_fleet_is_legible_without_colour(planned: Planned, width: int) -> None:
    text = printed(fleet_text(planned(), width), width)
    assert max(map(len, text.splitlines())) <= width
    for words in ("plan made for round 2: anna came back", "predicted round 0:25", "under-training so far 25 %"):
        assert words in " ".join(text.split())
    assert "clara is left out: no room: 1.2 GB missing" in text
    assert columns(text, "0") == ["0", "34/2", "4/1", "4/1"]  # q, v, up: mean of 64 and 4, of 8 and nothing
    if width >= 100:
        assert "nf4 8×2 40 6/6 160 82 % 1.2 MB memory" in " ".join(text.split())
        assert "0.5 s 0.6 s (+20 %) 0:20 4.0 GB of 5.0 GB 3.9 GB (−2 %) 1.20 1.00" in " ".join(text.split())


def test_one_agents_plan_gives_its_reasons(planned: Planned) -> None:
    text = " ".join(printed(agent_text(planned(), "anna")).split())
    for words in (
        "nf4 base, batch 8×2, 40 steps; 6 of 6 matrices, rank sum 160, 82 % of the importance",
        "why nf4 fits",
        "limit memory: more would not fit",
        "0.5 s per step, 0:20 of training, 4.0 GB of 5.0 GB at the peak, 1.2 MB up",
        "on RTX 3090, in 0:50 (5 % of the job)",
        "time × 1.20, memory × 1.00",
        "a share with a predicted 4.5 GB ran out of it",
        "1 GiB more: 12 % more progress per round",
        "1 done nf4 80 600 of 640 0.6 s (+20 %) 0.5 s 3.9 GB (−2 %) 4.0 GB",
    ):
        assert words in text
    berta = printed(agent_text(planned(), "berta"))
    assert "no: no time left" in berta
    assert columns(berta, "1") == ["1", "4", "·", "·"]


def test_gains_and_losses_in_words() -> None:
    found = [what_if_text(factor) for factor in (1.0, 1.004, 1.8, 0.75)]
    none = "no more progress per round"
    assert found == [none, none, "80 % more progress per round", "25 % less progress per round"]


def test_a_deep_model_stands_in_blocks_side_by_side(planned: Planned) -> None:
    wide, narrow = (printed(agent_text(planned(48), "anna", width), width) for width in (100, 30))
    assert columns(wide, "0") == ["0", "64", "8", "8", "16", "64", "8", "8", "32", "64", "8", "8"]
    assert columns(narrow, "23") == ["23", "64", "8", "8", "47", "64", "8", "8"]


def test_an_agent_without_a_plan_is_refused_with_the_reason(planned: Planned) -> None:
    with pytest.raises(BadConfig, match=r"no part in the plan of 'recipes': it is for anna, berta"):
        agent_text(planned(), "dora")
    with pytest.raises(BadConfig, match=r"left out .* 1\.2 GB missing"):
        document(planned(), "clara")


def test_a_plan_without_predictions_or_matrices_is_shown_as_well(planned: Planned) -> None:
    view = planned()
    agents = {
        name: msgspec.structs.replace(
            plan, past=[], choice=msgspec.structs.replace(plan.choice, predicted=None, ranks={}, importance=0.0)
        )
        for name, plan in view.agents.items()
    }
    bare = msgspec.structs.replace(view, agents=agents, matrices=[], round_s=0.0, pinned=True)
    assert "the job file decides everything" in printed(fleet_text(bare))
    assert "0 of 0 matrices" in printed(agent_text(bare, "anna"))
    ET.fromstring(document(bare))  # noqa: S314 - our own


def test_no_text_of_others_steers_the_terminal_or_breaks_the_picture(planned: Planned) -> None:
    evil = "\x1b[2J\r\n<b>&\u202e"
    view = planned(reason=evil, left_out={"x": evil}, notes=[evil])
    plan = msgspec.structs.replace(view.agents["berta"], uncalibrated=evil)
    view = msgspec.structs.replace(view, agents={"berta": plan})
    text = printed(fleet_text(view)) + printed(agent_text(view, "berta"))
    assert all(c.isprintable() or c == "\n" for c in text)
    ET.fromstring(document(view))  # noqa: S314 - our own


# ------------------------------------------------------------------------------------------------------------- picture


def test_a_picture_has_a_cell_per_matrix_and_one_scale_for_all(planned: Planned) -> None:
    root = ET.fromstring(document(planned()))  # noqa: S314 - our own
    boxes = list(root.iter(f"{SVG}rect"))
    assert len(boxes) == 3 * 6  # the fleet and two agents
    strong = [float(box.get("fill-opacity", 0)) for box in boxes]
    fleet, anna, berta = strong[:6], strong[6:12], strong[12:]
    assert max(anna) == 1.0
    assert 0.0 < max(berta) < max(fleet) < 1.0
    assert berta.count(0.0) == 4
    alone = ET.fromstring(document(planned(), "berta"))  # noqa: S314 - our own
    assert [float(box.get("fill-opacity", 0)) for box in alone.iter(f"{SVG}rect")] == berta
    assert agent_svg(planned(), "berta").count("<rect") == 6
