"""The HTTP API: views of the coordinator as JSON, jobs in, adapters out, a stream of events.

Loopback unless told otherwise, and a public address demands a token (coordinator/access.py).  An answer is JSON, an error
{"error": "what to do next"}, and the trace of a fault of ours stays in our log.

    GET  /                                                 the operator's page, see coordinator/page/
    GET  /v1/health                                        needs no token
    GET  /v1/openapi.json                                  all of this for programs, see coordinator/openapi.py
    GET  /v1/fleet  /v1/agents  /v1/jobs  /v1/jobs/{name}  /v1/jobs/{name}/versions
         /v1/jobs/{name}?skip=N                            without the first N ended rounds
         /v1/jobs/{name}/plan?agent=ID                     who does what and why; 404 while there is none
    POST /v1/jobs                                          a job file; 201, 409 for a name that is taken
    POST /v1/jobs/{name}/cancel
    POST /v1/jobs/{name}/pause  /v1/jobs/{name}/resume  /v1/jobs/{name}/rollback     see coordinator/commands.py
    GET  /v1/jobs/{name}/adapter?version=N                 a tar of the PEFT folder
    GET  /v1/events                                        server-sent events, see coordinator/feed.py
    GET  /metrics                                          for Prometheus, see coordinator/metrics.py
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from coordinator import asked, commands, metrics, views
from coordinator.access import HEALTH, TokenMiddleware, is_loopback, read_token
from coordinator.audit import LOCAL
from coordinator.audited import WHAT, AuditMiddleware
from coordinator.config import Web
from coordinator.core.state import ENDED, JobState, RoundRecord, with_detail
from coordinator.cost import cost_so_far
from coordinator.feed import Feed
from coordinator.https import Server
from coordinator.openapi import document
from coordinator.page import page_routes
from coordinator.past import Past, evaluations, losses_with, with_round
from coordinator.plan_views import LOOK_BACK, past_shares, plan_view, unplanned_text
from coordinator.store import Version
from coordinator.submission import Taken, parse_job, submit
from coordinator.tarball import adapter_tar
from coordinator.trust.desk import Counter
from coordinator.trust.office import Refused
from coordinator.versions import pick, version_views
from protocol import SOFTWARE
from protocol.errors import BadConfig, OutsideFault, Unavailable
from protocol.files import replacing
from protocol.metrics import CONTENT_TYPE, PATH, exposition

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator

T = TypeVar("T")

READ_BYTES: Final = 2**18
READ_TRIES: Final = 3

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------- answers


def answer(body: object, status: int = 200) -> Response:
    """A Struct (or a list or dict) as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _refuse(request: Request, error: Exception) -> Response:
    match error:
        case HTTPException(status_code=404, detail="Not Found"):
            return answer({"error": f"there is nothing at {request.url.path[:200]!r}"}, 404)
        case HTTPException(status_code=status, detail=detail):
            return answer({"error": detail}, status)
        case Taken() | commands.NotNow():
            return answer({"error": str(error)}, 409)
        case commands.NoSuchVersion():
            return answer({"error": str(error)}, 404)
        case Refused(status=status):
            return answer({"error": str(error)}, status)
        case BadConfig():
            return answer({"error": str(error)}, 422)
        case OutsideFault() | OSError():
            logger.error("%s", error, extra={"action": "api_failed"})
            return answer({"error": str(error)}, 503)
    return answer({"error": "a fault of the coordinator's own: its log says more"}, 500)


class Api:
    """The endpoints over one coordinator."""

    def __init__(self, coordinator: Coordinator, feed: Feed) -> None:
        self._coordinator, self._feed = coordinator, feed
        self._exporting = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Every path with its method."""
        return [
            Route(HEALTH, self.health),
            Route("/v1/openapi.json", self.openapi),
            Route("/v1/fleet", self.fleet),
            Route("/v1/agents", self.agents),
            Route("/v1/events", self.events),
            Route("/v1/jobs", self.jobs, methods=["GET"]),
            Route("/v1/jobs", self.submit, methods=["POST"]),
            Route("/v1/jobs/{name}", self.job),
            Route("/v1/jobs/{name}/cancel", self.cancel, methods=["POST"]),
            Route("/v1/jobs/{name}/pause", self.pause, methods=["POST"]),
            Route("/v1/jobs/{name}/resume", self.resume, methods=["POST"]),
            Route("/v1/jobs/{name}/rollback", self.rollback, methods=["POST"]),
            Route("/v1/jobs/{name}/versions", self.versions),
            Route("/v1/jobs/{name}/plan", self.plan),
            Route("/v1/jobs/{name}/adapter", self.adapter),
        ]

    async def health(self, _request: Request) -> Response:
        """The process answers; `disk` is one of disk.DiskState, and why it is not "ok" is in /v1/fleet; `audit` is a Head."""
        coordinator = self._coordinator
        told = {
            "status": "ok",
            "software": SOFTWARE,
            "disk": coordinator.disk.state,
            "audit": str(coordinator.audit.head),
        }
        return answer(told)

    async def openapi(self, _request: Request) -> Response:
        """This API, described for programs."""
        return answer(document([*self.routes(), *Counter(self._coordinator).routes()], SOFTWARE))

    async def fleet(self, request: Request) -> Response:
        """See views.FleetView."""
        return answer(views.fleet_view(self._coordinator, brief=bool(asked.number(request, "brief"))))

    async def agents(self, request: Request) -> Response:
        """A list of views.AgentView."""
        state, presence = self._coordinator.fleet.state, self._coordinator.presence
        brief = bool(asked.number(request, "brief"))
        return answer(views.agent_views(state.agents, presence, state.jobs.values(), brief=brief))

    async def jobs(self, _request: Request) -> Response:
        """A list of views.JobShort."""
        return answer([views.job_short(job) for job in self._coordinator.fleet.state.jobs.values()])

    async def events(self, _request: Request) -> Response:
        """News as server-sent events, for as long as somebody reads them."""
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._feed.stream(), media_type="text/event-stream", headers=headers)

    async def job(self, request: Request) -> Response:
        """See views.JobView; of a long history only what comes after the first `skip` rounds."""
        wanted = asked.number(request, "skip") or 0
        job, past, versions, measured = await self._told(request, evaluations, lambda _: wanted)
        view = views.job_view(
            job,
            past,
            with_round(measured, job.round),
            versions,
            cost=cost_so_far(past.spent, self._devices(), self._coordinator.config.prices),
            presence=self._coordinator.presence,
            remaining=self._coordinator.exchange.pulling.remaining,
            now=self._coordinator.clock(),
            skip=min(wanted, past.n_rounds),
        )
        rest = self._coordinator.store.rounds(view.name, view.n_skipped, past.n_rounds)
        return StreamingResponse(views.with_history(view, rest), media_type="application/json")

    async def versions(self, request: Request) -> Response:
        """A list of versions.VersionView, oldest first."""
        job, past, versions, _ = await self._told(request, lambda _: None)
        return answer(version_views(job, versions, losses_with(past, job.round)))

    async def plan(self, request: Request) -> Response:
        """See plan_views.PlanView; of one agent also all its shares."""
        agent = request.query_params.get("agent", "")
        job, past, _, shares = await self._told(
            request,
            lambda rounds: past_shares(rounds, agent),
            lambda n_rounds: 0 if agent else max(0, n_rounds - LOOK_BACK),
        )
        if job.plan is None:
            raise HTTPException(404, unplanned_text(job))
        return answer(plan_view(job, job.plan, past, shares, self._coordinator.clock()))

    async def submit(self, request: Request) -> Response:
        """Take a job file; durable when this answers."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/toml":
            raise HTTPException(415, f"a job is TOML: send it as application/toml, not as {kind or 'nothing'}")
        try:
            text = (await asked.body(request)).decode()
        except UnicodeDecodeError as error:
            raise HTTPException(400, f"the job file is not UTF-8: {error}") from None
        spec = parse_job(text, "job file", self._coordinator.config.allow_methods)
        request.scope[WHAT] = spec.job.name
        await submit(self._coordinator, spec)
        return answer({"name": spec.job.name}, 201)

    async def cancel(self, request: Request) -> Response:
        """End a job; its finished versions stay."""
        await commands.cancel(self._coordinator, self._job(request))
        return answer(views.job_short(self._job(request)))

    async def pause(self, request: Request) -> Response:
        """Begin no further round."""
        job, told = self._job(request), await asked.struct(request, commands.PauseAsked)
        _note(request, job, "now" if told.now else "", told.reason)
        await commands.pause(self._coordinator, job, told, actor(self._coordinator))
        return answer(views.job_short(self._job(request)))

    async def resume(self, request: Request) -> Response:
        """Let a paused job go on."""
        await commands.resume(self._coordinator, self._job(request), actor(self._coordinator))
        return answer(views.job_short(self._job(request)))

    async def rollback(self, request: Request) -> Response:
        """Make a new version of an earlier one."""
        job, told = self._job(request), await asked.struct(request, commands.RollbackAsked)
        _note(request, job, f"to version {told.version}", told.reason)
        await commands.roll_back(self._coordinator, job, told, actor(self._coordinator))
        return answer(views.job_short(self._job(request)))

    async def adapter(self, request: Request) -> Response:
        """One version (the newest, if none is named) as a tar of a PEFT folder."""
        job = self._job(request)
        name, store = job.spec.job.name, self._coordinator.store
        wanted = asked.number(request, "version")
        try:
            version = pick(store.versions(name), wanted)
        except BadConfig as error:
            raise HTTPException(404, str(error)) from None
        past = await asyncio.to_thread(store.past, name)
        async with self._exporting:  # each takes the whole adapter's memory
            tar = await asyncio.to_thread(
                adapter_tar, job, version, past, self._coordinator.blobs, self._coordinator.folder, SOFTWARE
            )
        headers = {
            "content-length": str(os.fstat(tar.fileno()).st_size),
            "content-disposition": f'attachment; filename="{name}-v{version.version}.tar"',
            "fedpipe-version": str(version.version),
        }
        return StreamingResponse(_blocks(tar), media_type="application/x-tar", headers=headers)

    def _devices(self) -> dict[str, str]:
        """What each agent says that it trains on."""
        reports = {agent.id: agent.report for agent in self._coordinator.fleet.state.agents.values()}
        return {id_: report.allowance.device for id_, report in reports.items() if report and report.allowance}

    async def _told(
        self, request: Request, look: Callable[[Iterable[RoundRecord]], T], first: Callable[[int], int] = lambda _: 0
    ) -> tuple[JobState, Past, list[Version], T]:
        """A job, its past, its versions and a look at its ended rounds, as of one moment; of n of them from number `first(n)` on.

        A job that moves on meanwhile is read again.  One that always does is told as it is, a round ahead of its history; the
        next reading has that too.
        """
        store = self._coordinator.store
        n_tries = 0
        while True:
            job = self._job(request)
            name, moment = job.spec.job.name, (job.phase, job.round_number, job.attempt)
            past = await asyncio.to_thread(store.past, name)
            seen = await asyncio.to_thread(look, store.rounds(name, first(past.n_rounds), past.n_rounds))
            versions = await asyncio.to_thread(store.versions, name)
            detail = await asyncio.to_thread(store.detail, name) if job.phase in ENDED else None
            job = self._job(request)
            n_tries += 1
            has_moved = moment != (job.phase, job.round_number, job.attempt)
            if not has_moved or (n_tries >= READ_TRIES and job.phase not in ENDED):
                return with_detail(job, detail), past, versions, seen

    def _job(self, request: Request) -> JobState:
        name = str(request.path_params["name"])
        job = self._coordinator.fleet.state.jobs.get(name)
        if job is None:
            raise HTTPException(404, f"there is no job {name[:80]!r}: /v1/jobs (or fedpipe jobs) lists them")
        return job


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while block := file.read(READ_BYTES):
            yield block


def _note(request: Request, job: JobState, what: str, why: str) -> None:
    """For the audit log: what exactly is asked for, and why."""
    request.scope[WHAT] = f"{job.spec.job.name} {what}".rstrip() + (f": {why}" if why else "")


# -------------------------------------------------------------------------------------------------------------- server


def scraped(coordinator: Coordinator) -> Route:
    """Where Prometheus asks, under the same rule as everybody else."""

    async def told(_request: Request) -> Response:
        return Response(exposition(metrics.families(coordinator)), media_type=CONTENT_TYPE)

    return Route(PATH, told)


def actor(coordinator: Coordinator) -> str:
    """Who asks with the present token: by the name of its file; without one whoever is on this machine."""
    return f"token:{Path(coordinator.config.web.token_file).name}" if coordinator.token else LOCAL


def api(coordinator: Coordinator, feed: Feed) -> Starlette:
    """The ASGI application; it takes the token that the coordinator has at the moment of a request."""
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, OutsideFault, OSError, Exception), _refuse)
    return Starlette(
        routes=[*page_routes(), *Counter(coordinator).routes(), *Api(coordinator, feed).routes(), scraped(coordinator)],
        middleware=[
            Middleware(TokenMiddleware, token=lambda: coordinator.token),
            Middleware(AuditMiddleware, audit=coordinator.audit, actor=lambda: actor(coordinator)),
        ],
        exception_handlers=handlers,
    )


def listen(config: Web) -> socket.socket:
    """The listening socket.  Raises Unavailable when the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise Unavailable(
            f"the API cannot listen on {config.host} port {config.port} ({error.strerror or error}): "
            "stop what uses it, or choose another web.port (0 takes a free one)"
        ) from None


def url_of(listening: socket.socket, scheme: str = "http") -> str:
    """Where the API is reached from this machine."""
    host, port = listening.getsockname()[:2]
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"{scheme}://[{loopback}]:{port}" if ":" in loopback else f"{scheme}://{loopback}:{port}"


async def serve(coordinator: Coordinator, listening: socket.socket, token: str = "", *, tls: bool = False) -> None:
    """Answer requests until cancelled; then end the streams and let running answers finish.  `tls` needs a trust."""
    feed, coordinator.token = Feed(coordinator), token
    certificate = coordinator.trust.https_file if tls and coordinator.trust else None
    server = Server(api(coordinator, feed), certificate)
    if coordinator.trust:
        coordinator.trust.servers.append(server)
    try:
        await server.work(listening, stopping=feed.close)
    finally:
        feed.close()


def speaks_tls(coordinator: Coordinator) -> bool:
    """Whether the API is HTTPS.  Raises BadConfig where it shall be and cannot."""
    config = coordinator.config.web
    if config.tls == "on" and coordinator.trust is None:
        raise BadConfig("web.tls is on and there is no authority: run `fedpipe-coordinator ca init` first")
    public = config.tls == "auto" and coordinator.trust is not None and not is_loopback(config.host)
    return config.tls == "on" or public


async def serve_api(coordinator: Coordinator) -> None:
    """The API where the configuration wants it; its place is written to `state_dir/api.json` for those who must find it.

    Raises BadConfig for a public address without a token, Unavailable when the address is in use.
    """
    config, place = coordinator.config.web, coordinator.folder / "api.json"
    token = read_token(config)
    tls = speaks_tls(coordinator)
    listening = listen(config)
    url = url_of(listening, "https" if tls else "http")
    try:
        with replacing(place) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(msgspec.json.encode({"url": url, "pid": os.getpid()}) + b"\n")
    except OSError as error:  # a full disk must not keep the coordinator from making room
        logger.error("%s cannot be written: %s: make room", place, error.strerror, extra={"action": "disk"})
    logger.info("API at %s", url, extra={"action": "api_up", "token": bool(token)})
    try:
        await serve(coordinator, listening, token, tls=tls)
    finally:
        with suppress(OSError):
            place.unlink(missing_ok=True)
