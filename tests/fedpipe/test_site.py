"""The pages for users against the programs: reference pages are fresh, commands and figures exist, the site builds and needs nobody."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fedpipe.__main__ import app

ROOT = Path(__file__).parents[2]
REFERENCE = runpy.run_path(str(ROOT / "scripts" / "draw_reference.py"))
HOOKS = runpy.run_path(str(ROOT / "scripts" / "site_hooks.py"))
USER_PAGES = [ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]


@pytest.mark.parametrize("name", REFERENCE["PAGES"])
def test_a_reference_page_is_as_it_is_drawn(name: str) -> None:
    text = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert REFERENCE["PAGES"][name]() == text, "run .venv/bin/python scripts/draw_reference.py"


@pytest.mark.parametrize("name", ["agent-config.md", "coordinator-config.md", "job-file.md"])
def test_every_key_has_a_meaning(name: str) -> None:
    rows = [line for line in REFERENCE["PAGES"][name]().splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    assert [row for row in rows if not row.split(" | ")[3].strip(" |")] == [], (
        "say it in the Struct or in docs/examples"
    )


def said(page: Path) -> Iterator[list[str]]:
    """Every command of ours in the blocks and the code of a page, as words."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^ {2,}(.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    for block in re.findall(r"^```[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        lines += block.splitlines()
    for line in lines:
        found = re.search(r"^ *(?:\w+=\S+ )?((?:fedpipe|fedpipe-agent|fedpipe-coordinator) .*)", line)
        if found and "[agent]" not in line:
            yield shlex.split(found[1].split(" #")[0], comments=True)


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    told = typer.main.get_command(app)
    for program, *given in said(page):
        command: Any = told
        words = given
        options = {"--help"}
        if program == "fedpipe":
            while hasattr(command, "commands"):
                assert words, f"{page.name}: {program} alone"
                command, words = command.commands[words[0]], words[1:]
            options |= {option for param in command.params for option in param.opts}
        else:
            command = REFERENCE["_parser"](REFERENCE["PROGRAMS"][program])
            (choices,) = (action.choices for action in command._actions if isinstance(action.choices, dict))
            options |= choices[words[0]]._option_string_actions.keys()
        assert {word for word in words if word.startswith("--")} <= options, f"{page.name}: {program} {words}"


def test_the_pages_do_name_commands() -> None:
    assert sum(1 for page in USER_PAGES for _ in said(page)) > 40


def test_figures_that_the_pages_name_exist() -> None:
    source = "".join((ROOT / name / "metrics.py").read_text(encoding="utf-8") for name in ("agent", "coordinator"))
    page = (ROOT / "docs" / "howto" / "watch.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bfedpipe_\w+", page))
    assert len(named) > 10
    assert {name for name in named if f'"{name}"' not in source} == set()
    labels = {name: set(given.split(",")) for name, given in re.findall(r"\b(fedpipe_\w+)\{(.*?)\}", page)}
    assert len(labels) > 5
    told = {}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(ast.Name("gauge" | "counter" | "histogram"), [ast.Constant(name), _, _, *given]):
                told[name] = {label.value for label in given if isinstance(label, ast.Constant)}
            case _:
                pass
    assert labels == {name: told[name] for name in labels}


def test_every_diagram_is_drawn_and_no_other_is_kept() -> None:
    pages = (ROOT / "docs").rglob("*.md")
    wanted = {HOOKS["drawing"](text) for page in pages for text in HOOKS["DIAGRAM"].findall(page.read_text("utf-8"))}
    assert {path.name for path in (ROOT / "docs" / "images" / "diagrams").iterdir()} == wanted, (
        "see scripts/draw_diagrams.py"
    )


def test_the_site_builds_and_asks_nobody_else(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs fedpipe[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)\"?[^>]* href=\"?([^\s\">]+)", text)
        assert [target for target in loaded if "//" in target] == [], page.name
        assert "class=mermaid" not in text.replace('"', ""), "a diagram that is not a picture loads a script"
