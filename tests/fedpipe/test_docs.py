"""The pages against the repository: what they say of files, log words and exit codes is so, and their links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from coordinator.web import Api
from protocol import daemon

ROOT = Path(__file__).parents[2]
DRAW = runpy.run_path(str(ROOT / "scripts" / "draw_docs.py"))
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md", ROOT / "README.md"])
AGAIN = "run .venv/bin/python scripts/draw_docs.py, then write the cells that hold a question mark"


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/operations.md"])
def test_a_page_is_as_it_is_drawn_from_the_code_and_fully_written(page: str) -> None:
    assert DRAW["drawn"](text(page)) == text(page), AGAIN
    assert [line for line in text(page).splitlines() if " ? |" in line] == [], AGAIN


def test_every_action_word_in_the_code_is_explained_and_no_other() -> None:
    files = [file for package in DRAW["PACKAGES"] for file in (ROOT / package).rglob("*.py")]
    in_code = {word for file in files for word in re.findall(r'"action": "(\w+)"', file.read_text(encoding="utf-8"))}
    explained = set(
        re.findall(r"^\| `(\w+)` \| (?:debug|info|warning|error)", text("docs/operations.md"), re.MULTILINE)
    )
    assert explained == in_code
    assert len(in_code) > 20


def test_every_exit_code_is_explained() -> None:
    codes = {str(value) for name, value in vars(daemon).items() if name.startswith("EX_")}
    assert codes <= set(re.findall(r"^\| (\d+) \|", text("docs/operations.md"), re.MULTILINE))


def test_every_request_of_the_api_is_explained_and_no_other() -> None:
    routes = Api.routes(Api.__new__(Api))
    served = {f"{method} {route.path}" for route in routes for method in route.methods or () if method != "HEAD"}
    assert set(re.findall(r"^\| `((?:GET|POST) [^`]+)` \|", text("docs/operations.md"), re.MULTILINE)) == served


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    """Names of headings as forges make them: lower case, no punctuation, dashes; a repeated one gets a number."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        name = plain = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        number = 0
        while name in found:
            number += 1
            name = f"{plain}-{number}"
        found.add(name)
    return found


def test_files_that_the_pages_name_exist() -> None:
    for page in ROOT.joinpath("docs").rglob("*.md"):
        for name in re.findall(
            r"`((?:protocol|agent|coordinator|fedpipe|tests|scripts|docs)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
