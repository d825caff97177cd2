"""What `make docs` does to a page that a forge does by itself: diagrams are pictures, and links to files beside docs/ are names."""

from __future__ import annotations

import posixpath
import re
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
SHIM: Final = "https://unpkg.com/iframe-worker/shim"
"""What the offline plugin fetches so that search works without a server; docs/assets holds it."""
DIAGRAM: Final = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_REPEATED: Final = re.compile(r"(?<=\]\()(#[\w-]+)-(\d+)(?=\))")
_LINK: Final = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def drawing(source: str) -> str:
    """Name of the picture of a diagram: the same text is the same picture."""
    return f"{sha256(source.encode()).hexdigest()[:16]}.svg"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    folder = posixpath.dirname(page.file.src_uri)
    up = posixpath.relpath("images/diagrams", folder or ".")
    markdown = DIAGRAM.sub(lambda found: f"[![Diagram]({up}/{drawing(found[1])})]({up}/{drawing(found[1])})", markdown)

    # The second heading of a name: a forge calls it name-1, mkdocs name_1.
    names = {re.sub(r"\W+", "-", heading.lower()) for heading in re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)}
    markdown = _REPEATED.sub(lambda f: f[0] if f"{f[1]}-{f[2]}"[1:] in names else f"{f[1]}_{f[2]}", markdown)

    def inside(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        place = posixpath.normpath(posixpath.join("docs", folder, target))
        if not place.startswith("docs/"):
            return text if text.startswith("`") else f"`{place}`"
        return f"[{text}]({target.rstrip('/')}/README.md{anchor})" if (ROOT / place).is_dir() else found[0]

    return _LINK.sub(inside, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page as HTML."""
    up = posixpath.relpath("assets/iframe-worker.js", posixpath.dirname(page.file.dest_uri) or ".")
    return output.replace(SHIM, up)


def on_post_template(output_content: str, **_: Any) -> str:
    """Called by mkdocs for what is no page: the one that is shown when there is none."""
    return output_content.replace(SHIM, "assets/iframe-worker.js")
