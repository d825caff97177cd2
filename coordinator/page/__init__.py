"""The operator's page: plain files, served as they lie here, that read the HTTP API and nothing else.

index.html loads style.css and main.js; every script is an ES module, there is no build step and nothing comes from elsewhere.
The page holds no secret, so it needs no token; what it shows is behind the API's.  Its policy lets nothing run and nothing be
asked but its own files and the API (W3C Content Security Policy Level 3), and turns off the ways in which text could become
markup (Trusted Types).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HOME: Final = "/"
FILES: Final = "/page/"
KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Asset(NamedTuple):
    """One file of the page."""

    body: bytes
    kind: str
    etag: str


def load_assets() -> dict[str, Asset]:
    """All files of the page by name."""
    found = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if kind := KINDS.get(path.suffix):
            body = path.read_bytes()
            found[path.name] = Asset(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


def is_page(path: str) -> bool:
    """Whether this path is one of the page's own, which hold nothing that needs a token."""
    return path == HOME or path.startswith(FILES)


def page_routes() -> list[Route]:
    """Where the page is served."""
    assets = load_assets()

    async def get(request: Request) -> Response:
        name = str(request.path_params.get("name", "index.html"))
        asset = assets.get(name)
        if asset is None:
            raise HTTPException(404)
        headers = HEADERS | {"etag": asset.etag}
        if request.headers.get("if-none-match") == asset.etag:
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.kind, headers=headers)

    return [Route(HOME, get), Route(f"{FILES}{{name}}", get)]
