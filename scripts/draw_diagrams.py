"""Draws the diagrams of the pages as pictures for the site: docs/images/diagrams/DIGEST.svg, one per mermaid block.

    npm pack mermaid@11 && tar xzf mermaid-11*.tgz package/dist/mermaid.min.js
    .venv/bin/python scripts/draw_diagrams.py package/dist/mermaid.min.js

A forge draws such blocks itself; the site must do without a network and without three megabytes of script.  Needs chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent))
from site_hooks import DIAGRAM, ROOT, drawing

FOLDER: Final = ROOT / "docs" / "images" / "diagrams"
DRAW: Final = """async source => {
    mermaid.initialize({startOnLoad: false, theme: "neutral", htmlLabels: false, flowchart: {htmlLabels: false},
        fontFamily: "sans-serif", deterministicIds: true});
    return (await mermaid.render("diagram", source)).svg;
}"""


def sources() -> dict[str, str]:
    """The text of every diagram in docs/, by the name of its picture."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return {drawing(text): text for page in pages for text in DIAGRAM.findall(page.read_text(encoding="utf-8"))}


def main(library: str) -> None:
    """Draw what is missing, delete what nobody shows."""
    wanted = sources()
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.svg"):
        if old.name not in wanted:
            old.unlink()
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=library)
        for name, text in wanted.items():
            if not (FOLDER / name).exists():
                svg = page.evaluate(DRAW, text)
                (FOLDER / name).write_text(f'<?xml version="1.0"?>\n{svg}\n', encoding="utf-8")
                print(f"{name}: drawn")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
