"""Every request that changes something, or takes a model away, is written down before it is done and before it is answered.

By method and path, so that an endpoint that is added tomorrow is written down as well.  It stands behind the check of the
token: strangers cannot fill the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.audit import Audit
from protocol.errors import Unavailable

CHANGES_NOTHING: Final = frozenset({"GET", "HEAD", "OPTIONS"})
TAKES_AWAY: Final = frozenset({"adapter"})
"""Last parts of paths that are written down although they are only read."""
WHAT: Final = "fedpipe.what"
"""Key of the scope under which an endpoint says more exactly what it is about."""


class AuditMiddleware:
    """`actor` says who asks with the present token."""

    def __init__(self, app: ASGIApp, audit: Audit, actor: Callable[[], str]) -> None:
        self._app, self._audit, self._actor = app, audit, actor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        path = str(scope.get("path", ""))
        is_read = scope.get("method") in CHANGES_NOTHING and path.rpartition("/")[2] not in TAKES_AWAY
        if scope["type"] != "http" or is_read:
            await self._app(scope, receive, send)
            return
        actor, (action, what) = self._actor(), named(str(scope["method"]), path)
        address = str(scope["client"][0]) if scope.get("client") else ""
        try:
            of = await asyncio.to_thread(self._audit.append, actor, action, what, address=address)
        except Unavailable as error:
            text = f"nothing was done, because it could not be written to the audit log: {error}"
            await JSONResponse({"error": text}, 503)(scope, receive, send)
            return
        told = False

        async def ended(outcome: str) -> None:
            nonlocal told
            told = True
            of_what = str(scope.get(WHAT, what))
            await asyncio.to_thread(self._audit.ended, of, actor, action, of_what, outcome)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                await ended(str(message["status"]))
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            if not told:
                await ended(f"failed: {error}")
            raise


def named(method: str, path: str) -> tuple[str, str]:
    """What a request asks for, and of what: /v1/jobs/x/cancel is (cancel, x)."""
    match path.strip("/").split("/")[1:]:
        case ["jobs"]:
            return "submit", ""
        case ["tokens"]:
            return "token", ""
        case ["jobs", name, "adapter"]:
            return "export", name
        case ["jobs" | "enrolments", name, verb]:
            return verb, name
    return method.lower(), path
