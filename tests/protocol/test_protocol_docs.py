"""docs/protocol.md against the code: every message, field, tag, type, bound, default, topic, state and limit, both ways."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Annotated, get_args

import msgspec
import pytest
from msgspec import Meta

from coordinator.intake import EXPECTED
from protocol.messages import Body, Envelope, ExecState, Message
from protocol.topics import DOWN_LEAVES, UP_LEAVES, Topics
from protocol.updates import LoraHeader

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
DRAW = runpy.run_path(str(ROOT / "scripts" / "draw_docs.py"))
AGAIN = "run .venv/bin/python scripts/draw_docs.py, then write the cells that hold a question mark"


def rows(title: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading, by their first cell."""
    start = PAGE.index(f"\n{title}\n")
    table = PAGE[start:].split("\n| --- ", 1)[1].split("\n\n", 1)[0]
    cells = [line.strip("|").split(" | ") for line in table.splitlines()[1:]]
    return {row[0].strip(" `"): [cell.strip() for cell in row] for row in cells}


def tag(message: type[Message]) -> str:
    return str(message.__struct_config__.tag)


def test_the_page_is_as_it_is_drawn_from_the_code() -> None:
    assert DRAW["drawn"](PAGE) == PAGE, AGAIN


def test_everything_on_the_page_is_explained() -> None:
    assert [line for line in PAGE.splitlines() if " ? |" in line] == [], AGAIN


@pytest.mark.parametrize("message", get_args(Body), ids=tag)
def test_every_message_is_there_with_its_tag_and_exactly_its_fields(message: type[Message]) -> None:
    found = rows(f"### `{tag(message)}`: {message.__name__}")
    assert list(found) == list(message.__struct_fields__)


@pytest.mark.parametrize("struct", [Envelope, LoraHeader])
def test_so_are_the_envelope_and_the_files(struct: type[msgspec.Struct]) -> None:
    assert list(rows(f"### {struct.__name__}")) == list(struct.__struct_fields__)


def test_no_message_is_documented_that_is_none() -> None:
    documented = re.findall(r"^### `(\w+)`: (\w+)$", PAGE, re.MULTILINE)
    assert documented == [(tag(message), message.__name__) for message in get_args(Body)]


def test_every_topic_is_there_and_carries_a_message_or_chunks() -> None:
    found = rows("## Topics")
    fleet, own = Topics("main"), {"agent": "{agent}"}
    built = {fleet.coordinator_state(), fleet.job("{job}"), fleet.blob("{xfer}")}
    built |= {fleet.up("{agent}", leaf) for leaf in UP_LEAVES}  # type: ignore[arg-type]
    built |= {fleet.down("{agent}", leaf) for leaf in DOWN_LEAVES}  # type: ignore[arg-type]
    built |= {fleet.up_chunk(**own, xfer="{xfer}"), fleet.down_chunk(**own, xfer="{xfer}"), fleet.up_probe(**own)}
    assert set(found) == {topic.replace("/main/", "/{fleet}/") for topic in built}
    carried = {word for row in found.values() for word in re.findall(r"`(\w+)`", row[3])}
    assert carried == {tag(message) for message in get_args(Body)}


def test_what_an_agents_topic_carries_is_what_the_coordinator_takes_there() -> None:
    found = rows("## Topics")
    for leaf, messages in EXPECTED.items():
        assert found[f"fed/v1/{{fleet}}/a/{{agent}}/up/{leaf}"][3] == ", ".join(f"`{tag(m)}`" for m in messages)


def test_every_state_is_there() -> None:
    assert list(rows("## Execution states")) == [str(state) for state in ExecState]


class Grown(Message, frozen=True, kw_only=True, tag="grown"):
    """A message that the page does not know."""

    size: Annotated[int, Meta(ge=1, le=2**20)]
    names: Annotated[list[str], Meta(max_length=3)] = []


def test_a_new_message_and_a_changed_field_are_noticed() -> None:
    """The comparison itself: what it would draw for a message of our own, and what it makes of a page that was changed."""
    table = DRAW["_struct"](Grown, "### `grown`: Grown")
    assert table.rows == [("`size`", "int from 1 to 2^20", "required"), ("`names`", "list of at most 3: text", "`[]`")]
    line = next(line for line in PAGE.splitlines() if line.startswith("| `stop_after_s`"))
    for wrong in ("", line.replace("10^9", "10^8"), line.replace("stop_after_s", "stop_at_s"), f"{line}\n{line}"):
        assert DRAW["drawn"](PAGE.replace(line, wrong)) != PAGE.replace(line, wrong)


def test_what_people_wrote_is_carried_over() -> None:
    changed = PAGE.replace("New with each process.", "Other words.")
    assert DRAW["drawn"](changed) == changed
    assert "Other words." in changed
