"""The example files load as they are, name every key there is, and say the truth about its default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import AgentConfig
from agent.data import DataConfig
from coordinator.access import read_token
from coordinator.config import CoordinatorConfig
from coordinator.core.spec import JobSpec, Override
from coordinator.cost import Price
from coordinator.submission import read_job
from protocol.bus import parse_url
from protocol.daemon import load_toml

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
KINDS = {"coordinator": CoordinatorConfig, "agent": AgentConfig, "job": JobSpec}
MAPS: dict[tuple[str, ...], Any] = {("data",): DataConfig, ("agents",): Override, ("prices", "agents"): Price}
"""Tables that a user names, and what each holds."""


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a Struct and of the Structs in it; a map of values is one key."""
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from leaves(getattr(value, name), (*path, name))
    elif path in MAPS and isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    else:
        yield path, value


def written(path: Path) -> dict[tuple[str, ...], bool]:
    """The keys in an example, by table, and whether their line says "yours"."""
    found, table = {}, ()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = tuple(line[1 : line.index("]")].split("."))
        elif "=" in line and not line.startswith("#"):
            found[*table, line.partition("=")[0].strip()] = "# yours" in line
    return found


def keys(kind: type[msgspec.Struct], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that a file of this kind may hold; a table that a user names has the name "*"."""
    for field in msgspec.structs.fields(kind):
        if (*path, field.name) in MAPS:
            yield from keys(MAPS[*path, field.name], (*path, field.name, "*"))
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from keys(field.type, (*path, field.name))
        else:
            yield (*path, field.name)


def starred(path: tuple[str, ...]) -> tuple[str, ...]:
    n = next((len(table) for table in MAPS if path[: len(table)] == table), None)
    return path if n is None or len(path) < n + 2 else (*path[:n], "*", *path[n + 1 :])


def is_named(path: tuple[str, ...]) -> bool:
    return "*" in starred(path)


@pytest.mark.parametrize("name", KINDS)
def test_an_example_loads(name: str) -> None:
    load_toml(EXAMPLES / f"{name}.toml", KINDS[name])


def test_the_examples_pass_the_checks_beyond_their_types() -> None:
    coordinator = load_toml(EXAMPLES / "coordinator.toml", CoordinatorConfig)
    agent = load_toml(EXAMPLES / "agent.toml", AgentConfig)
    job = read_job(EXAMPLES / "job.toml")
    assert read_token(coordinator.web) == ""
    assert parse_url(coordinator.broker.url).tls
    assert (agent.fleet, agent.broker.url) == (coordinator.fleet, coordinator.broker.url)
    assert job.job.data in agent.data
    assert job.model.source in agent.base.models


@pytest.mark.parametrize("name", KINDS)
def test_an_example_names_every_key(name: str) -> None:
    assert {starred(path) for path in written(EXAMPLES / f"{name}.toml")} == set(keys(KINDS[name]))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_marked_as_yours_is_the_default(name: str) -> None:
    path = EXAMPLES / f"{name}.toml"
    required = {"agent": {"agent": "x"}, "job": {"job": {"name": "x"}, "model": {"source": "x"}}}.get(name, {})
    values = dict(leaves(load_toml(path, KINDS[name])))
    defaults = dict(leaves(msgspec.convert(required, KINDS[name])))
    ours = {key for key, is_yours in written(path).items() if not is_yours and not is_named(key)}
    assert {key for key in values if key in defaults and values[key] != defaults[key]}.isdisjoint(ours)
    yours = {key for key, is_yours in written(path).items() if is_yours and not is_named(key)}
    assert [key for key in yours if values[key] == defaults[key]] == [], "marked as yours and yet the default"
