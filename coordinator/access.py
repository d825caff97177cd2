"""Who may use the HTTP API.

With a token in the configuration: whoever bears it.  Without: whoever asks on this machine.  A browser on this machine asks on
behalf of any page on the web, so then the Host must be a loopback name (a page whose name was rebound to 127.0.0.1 sends its
own) and the browser must not say that another site asks.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.config import Web
from coordinator.page import is_page
from protocol.errors import BadConfig

HEALTH: Final = "/v1/health"


class TokenMiddleware:
    """Lets in who has the bearer token; without one, who asks on this machine and is no other site's page.

    The files of the operator's page are for everyone: they hold nothing, and what they then ask for is judged by itself.
    """

    def __init__(self, app: ASGIApp, token: Callable[[], str]) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        headers = Headers(scope=scope)
        if (path := str(scope.get("path"))) == HEALTH or is_page(path):
            refusal = None
        elif token := self._token():
            refusal = _wrong_token(headers.get("authorization", ""), token)
        else:
            refusal = _stranger(headers)
        await (refusal or self._app)(scope, receive, send)


def _wrong_token(given: str, token: str) -> Response | None:
    if hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return None
    text = "a bearer token is needed here: give --token-file or FEDPIPE_TOKEN_FILE"
    return JSONResponse({"error": text}, 401, {"www-authenticate": "Bearer"})


def _stranger(headers: Headers) -> Response | None:
    host = headers.get("host", "")
    name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
    if not is_loopback(name.strip("[]")):
        text = f"asked as {host[:80]!r}: without web.token_file only loopback names are answered"
        return JSONResponse({"error": text}, 403)
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        return JSONResponse({"error": "a page of another site asks: set web.token_file to allow what you mean"}, 403)
    return None


def is_loopback(host: str) -> bool:
    """Whether this name or address can only mean the machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(config: Web) -> str:
    """The token that requests must bear, empty for none.  Raises BadConfig for an unsafe or unusable configuration."""
    if not config.token_file:
        if not is_loopback(config.host):
            raise BadConfig(f"web.host {config.host!r} is reachable from outside: set web.token_file, or use 127.0.0.1")
        return ""
    try:
        token = Path(config.token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"web.token_file {config.token_file} cannot be read: {error}") from None
    if not token or not token.isascii() or not token.isprintable():
        raise BadConfig(f"web.token_file {config.token_file} holds no token: put one long random word into it")
    return token
