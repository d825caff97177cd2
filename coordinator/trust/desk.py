"""The office's two windows over HTTP: one for servers that enrol, with a listener of its own, and one for operators, in the API.

    public, HTTPS (protocol/enrolment.py):  GET /v1/authority  GET /v1/keys  POST /v1/enrol  POST /v1/renew
    operators, in the API:                  POST /v1/tokens    GET /v1/enrolments    POST /v1/enrolments/{agent}/{what}

What a stranger can cost is bounded: 64 KiB of body, and what coordinator/trust/bounds.py allows an address.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from coordinator.access import is_loopback
from coordinator.asked import struct
from coordinator.audited import WHAT
from coordinator.core.events import AgentRevoked
from coordinator.https import Server
from coordinator.trust.bounds import Rate, listening
from coordinator.trust.office import Office, Refused
from coordinator.trust.registry import Enrolment, Standing
from protocol import enrolment
from protocol.errors import BadConfig, OutsideFault, Unavailable

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator

Handler = Callable[[Request], Awaitable[Response]]
logger = logging.getLogger(__name__)


class TokenAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a join token shall allow."""

    agent: Annotated[str, Meta(max_length=64)] = ""
    uses: int = 1
    ttl_s: float = 86_400.0
    auto_accept: bool = False


class TokenMade(msgspec.Struct, frozen=True, kw_only=True):
    """A new join token.  It is told this once."""

    token: str
    expires_at: float
    url: str


class EnrolmentView(msgspec.Struct, frozen=True, kw_only=True):
    """One enrolment; instants are seconds since the epoch, 0 for never.  `key` is the sha256 of the public key that asked."""

    agent: str
    state: Standing
    address: str
    key: str
    asked_at: float
    decided_at: float
    expires_at: float
    reason: str


class Reason(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why somebody is accepted, rejected or revoked."""

    reason: Annotated[str, Meta(max_length=500)] = ""


def view(found: Enrolment) -> EnrolmentView:
    """What people see of an enrolment."""
    return EnrolmentView(**{name: getattr(found, name) for name in EnrolmentView.__struct_fields__})


# -------------------------------------------------------------------------------------------------------- for servers


async def nobody_listens() -> None:
    """Nothing follows from a decision: the office alone is there."""


def desk(
    office: Office, rate: Rate | None = None, decided: Callable[[], Awaitable[None]] = nobody_listens
) -> Starlette:
    """The ASGI application for servers; `decided` is called when somebody may have another standing than before."""
    rate = rate or Rate()

    async def authority(_request: Request) -> Response:
        return PlainTextResponse(office.authority.pem, media_type="application/x-pem-file")

    async def signing_keys(_request: Request) -> Response:
        return _answer(office.keyring.chain)

    async def enrol(request: Request) -> Response:
        asked, address = await struct(request, enrolment.Enrol, enrolment.MAX_BODY_BYTES), _address(request)
        found = await asyncio.to_thread(office.enrol, asked, address, time.time())
        await decided()
        return _answer(found, 201 if found.state == "accepted" else 202)

    async def renew(request: Request) -> Response:
        asked = await struct(request, enrolment.Renew, enrolment.MAX_BODY_BYTES)
        return _answer(await asyncio.to_thread(office.renew, asked, time.time()), 201)

    def limited(handler: Handler) -> Handler:
        async def handled(request: Request) -> Response:
            if wait_s := rate.take(_address(request)):
                headers = {"retry-after": str(int(wait_s) + 1)}
                raise HTTPException(429, "too many requests from this address: wait a moment", headers)
            return await handler(request)

        return handled

    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, OutsideFault, Exception), refuse)
    return Starlette(
        routes=[
            Route(enrolment.AUTHORITY, limited(authority)),
            Route(enrolment.KEYS, limited(signing_keys)),
            Route(enrolment.ENROL, limited(enrol), methods=["POST"]),
            Route(enrolment.RENEW, limited(renew), methods=["POST"]),
        ],
        exception_handlers=handlers,
    )


def refuse(request: Request, error: Exception) -> Response:
    """An error as JSON, and a word in the log about who was sent away."""
    match error:
        case HTTPException(status_code=status, detail=detail, headers=headers):
            return _answer({"error": detail}, status, headers)
        case Refused(status=status):
            extra = {"action": "enrol_refused", "address": _address(request), "path": request.url.path}
            logger.warning("%s", error, extra=extra)
            return _answer({"error": str(error)}, status)
        case BadConfig():
            return _answer({"error": str(error)}, 422)
        case OutsideFault():
            logger.error("%s", error, extra={"action": "api_failed"})
            return _answer({"error": str(error)}, 503)
    return _answer({"error": "a fault of the coordinator's own: its log says more"}, 500)


def _answer(body: object, status: int = 200, headers: Any = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


async def serve_desk(coordinator: Coordinator) -> None:
    """The window for servers where the configuration wants it, if this coordinator has a trust.  Raises Unavailable."""
    trust, config = coordinator.trust, coordinator.config.trust
    if trust is None:
        return
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        door = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise Unavailable(
            f"servers cannot enrol: {config.host} port {config.port} cannot be had ({error.strerror or error}): "
            "stop what uses it, or choose another trust.port"
        ) from None
    server = Server(desk(trust.office, decided=trust.decided), trust.https_file, **listening())
    trust.servers.append(server)
    logger.info("servers enrol at %s", trust.public_url, extra={"action": "desk_up", "port": door.getsockname()[1]})
    await server.work(door)


# ------------------------------------------------------------------------------------------------------- for operators


def _in_private(handler: Handler) -> Handler:
    """Answered over TLS or on this machine: whoever reads along could let in whom he likes."""

    async def handled(request: Request) -> Response:
        if request.url.scheme != "https" and not is_loopback(_address(request)):
            text = "who is an agent is decided over TLS, or on this machine: leave web.tls at auto, or have the proxy say x-forwarded-proto"
            raise HTTPException(403, text)
        return await handler(request)

    return handled


class Counter:
    """The endpoints for operators, over one coordinator that has a trust."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def routes(self) -> list[Route]:
        """Every path with its method."""
        return [
            Route("/v1/tokens", _in_private(self.token), methods=["POST"]),
            Route("/v1/enrolments", _in_private(self.enrolments)),
            Route("/v1/enrolments/{agent}/accept", _in_private(self.accept), methods=["POST"]),
            Route("/v1/enrolments/{agent}/reject", _in_private(self.reject), methods=["POST"]),
            Route("/v1/enrolments/{agent}/revoke", _in_private(self.revoke), methods=["POST"]),
        ]

    @property
    def _office(self) -> Office:
        if self._coordinator.trust is None:
            raise HTTPException(
                409, "this coordinator has no authority: stop it, run `fedpipe-coordinator ca init`, start it"
            )
        return self._coordinator.trust.office

    async def token(self, request: Request) -> Response:
        """Make a join token."""
        office, asked, now = self._office, await struct(request, TokenAsked), time.time()
        made = await asyncio.to_thread(
            lambda: office.make_token(asked.agent, asked.uses, asked.ttl_s, auto_accept=asked.auto_accept, now=now)
        )
        request.scope[WHAT] = " ".join(filter(None, [made.id, asked.agent]))
        assert self._coordinator.trust is not None
        url = self._coordinator.trust.public_url
        return _answer(TokenMade(token=str(made), expires_at=now + asked.ttl_s, url=url), 201)

    async def enrolments(self, _request: Request) -> Response:
        """A list of EnrolmentView."""
        return _answer([view(found) for found in await asyncio.to_thread(self._office.enrolments)])

    async def accept(self, request: Request) -> Response:
        """Let a pending agent in."""
        return _answer(await self._decide(request, self._office.accept))

    async def reject(self, request: Request) -> Response:
        """Send a pending agent away."""
        return _answer(await self._decide(request, self._office.reject))

    async def revoke(self, request: Request) -> Response:
        """Take an agent's certificates back; its share of a round ends at once."""
        found = await self._decide(request, self._office.revoke)
        if found.agent in self._coordinator.fleet.state.agents:
            await self._coordinator.post(AgentRevoked(agent=found.agent, reason=found.reason))
        return _answer(found)

    async def _decide(self, request: Request, decide: Callable[[str, str, float], Enrolment]) -> EnrolmentView:
        asked = await struct(request, Reason)
        found = await asyncio.to_thread(decide, str(request.path_params["agent"]), asked.reason, time.time())
        assert self._coordinator.trust is not None
        await self._coordinator.trust.decided()
        return view(found)
