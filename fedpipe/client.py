"""The coordinator's HTTP API from Python: typed answers, and errors that say what to do next.

with Coordinator("http://127.0.0.1:8470") as coordinator:
    name = coordinator.submit(Path("job.toml").read_text())
    for item in coordinator.events(): ...
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from coordinator.commands import PauseAsked, RollbackAsked
from coordinator.feed import STILL_HERE_S, AnyNews
from coordinator.past import joined
from coordinator.plan_views import PlanView
from coordinator.trust.desk import EnrolmentView, Reason, TokenAsked, TokenMade
from coordinator.versions import VersionView
from coordinator.views import AgentView, FleetView, JobShort, JobView
from protocol.errors import BadConfig, OutsideFault, Unavailable

DEFAULT_URL: Final = "http://127.0.0.1:8470"
TIMEOUT_S: Final = 30.0

T = TypeVar("T")


class _Error(msgspec.Struct):
    error: str


class _Named(msgspec.Struct):
    name: str


class _Health(msgspec.Struct):
    software: str


class Coordinator:
    """One coordinator at `url`; `token_file` holds the bearer token if it wants one, `ca_file` the authority of its certificate.

    Every method raises Unavailable when the coordinator cannot be reached or cannot answer now, and BadConfig, with the
    coordinator's own text, when it does not accept what was asked.
    """

    def __init__(self, url: str = DEFAULT_URL, token_file: Path | None = None, ca_file: Path | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {_token(token_file)}"} if token_file else {}
        try:
            host = httpx.URL(url).host
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=TIMEOUT_S,
                verify=_authorities(ca_file),
                trust_env=host not in {"127.0.0.1", "localhost", "::1"},  # a proxy cannot reach our loopback
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise BadConfig(f"{url!r} is not a url ({error}): write it as {DEFAULT_URL}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # --------------------------------------------------------------------------------------------------------- views

    def fleet(self, *, brief: bool = False) -> FleetView:
        """Everything at a glance; `brief`: without what each server has."""
        return self._get("/v1/fleet?brief=1" if brief else "/v1/fleet", FleetView)

    def software(self) -> str:
        """Which version runs there."""
        return self._get("/v1/health", _Health).software

    def agents(self) -> list[AgentView]:
        """All agents that were ever seen."""
        return self._get("/v1/agents", list[AgentView])

    def jobs(self) -> list[JobShort]:
        """All jobs, oldest first."""
        return self._get("/v1/jobs", list[JobShort])

    def job(self, name: str, known: JobView | None = None) -> JobView:
        """One job with its history, of which only what an earlier view lacks is fetched."""
        n_known = len(known.history) if known else 0
        view = self._get(f"/v1/jobs/{_part(name)}?skip={n_known}", JobView)
        if known is None or not n_known:
            return view
        if (view.n_skipped, view.submitted_at) != (n_known, known.submitted_at):  # it is another one by that name
            return self.job(name)
        return msgspec.structs.replace(
            view,
            history=[*known.history, *view.history],
            evaluations=joined(known.evaluations, view.evaluations),
            n_skipped=0,
        )

    def versions(self, name: str) -> list[VersionView]:
        """All versions of a job's adapter, oldest first."""
        return self._get(f"/v1/jobs/{_part(name)}/versions", list[VersionView])

    def plan(self, name: str, agent: str = "") -> PlanView:
        """What each agent of a job shall do, and why; with all past shares of one.  Raises BadConfig while there is no plan."""
        asked = f"?agent={_part(agent)}" if agent else ""
        return self._get(f"/v1/jobs/{_part(name)}/plan{asked}", PlanView)

    def events(self) -> Iterator[AnyNews]:
        """News as they come, until the coordinator stops; news of a kind that this version does not know are left out."""
        timeout = httpx.Timeout(TIMEOUT_S, read=2 * STILL_HERE_S)
        with self._answer("GET", "/v1/events", timeout=timeout) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    try:
                        yield msgspec.json.decode(line[6:], type=AnyNews)
                    except msgspec.ValidationError:
                        continue

    # ------------------------------------------------------------------------------------------------------- actions

    def submit(self, text: str) -> str:
        """Hand in a job file's text; the job's name.  The job is durable when this returns."""
        headers = {"content-type": "application/toml"}
        with self._answer("POST", "/v1/jobs", content=text.encode(), headers=headers) as response:
            return _decoded(response, _Named).name

    def cancel(self, name: str) -> JobShort:
        """End a job; its finished versions stay."""
        return self._order(name, "cancel")

    def pause(self, name: str, reason: str = "", *, now: bool = False) -> JobShort:
        """Begin no further round of a job; with `now`, stop the one under way."""
        return self._order(name, "pause", PauseAsked(reason=reason, now=now))

    def resume(self, name: str) -> JobShort:
        """Let a paused job go on."""
        return self._order(name, "resume")

    def roll_back(self, name: str, version: int, reason: str = "") -> JobShort:
        """Make a new version of an earlier one's content."""
        return self._order(name, "rollback", RollbackAsked(version=version, reason=reason))

    def _order(self, name: str, what: str, asked: msgspec.Struct | None = None) -> JobShort:
        body = msgspec.json.encode(asked) if asked else b""
        with self._answer("POST", f"/v1/jobs/{_part(name)}/{what}", content=body) as response:
            return _decoded(response, JobShort)

    def adapter(self, name: str, version: int | None, into: Path) -> int:
        """Download one version (None: the newest) as a tar of its PEFT folder to the file `into`; which version it is."""
        query = {} if version is None else {"version": str(version)}
        path = f"/v1/jobs/{_part(name)}/adapter"
        with self._answer("GET", path, params=query) as response, into.open("wb") as file:
            for block in response.iter_bytes():
                file.write(block)
            return int(response.headers.get("fedpipe-version", "0"))

    # ----------------------------------------------------------------------------------------------------- enrolment

    def make_token(self, agent: str, uses: int, ttl_s: float, *, auto_accept: bool) -> TokenMade:
        """A new join token; `agent` may be empty."""
        asked = TokenAsked(agent=agent, uses=uses, ttl_s=ttl_s, auto_accept=auto_accept)
        with self._answer("POST", "/v1/tokens", content=msgspec.json.encode(asked)) as response:
            return _decoded(response, TokenMade)

    def enrolments(self) -> list[EnrolmentView]:
        """Who asked to be an agent, by name."""
        return self._get("/v1/enrolments", list[EnrolmentView])

    def decide(self, agent: str, what: str, reason: str = "") -> EnrolmentView:
        """Accept, reject or revoke an agent."""
        body = msgspec.json.encode(Reason(reason=reason))
        with self._answer("POST", f"/v1/enrolments/{_part(agent)}/{what}", content=body) as response:
            return _decoded(response, EnrolmentView)

    # ------------------------------------------------------------------------------------------------------ plumbing

    def _get(self, path: str, kind: type[T]) -> T:
        with self._answer("GET", path) as response:
            return _decoded(response, kind)

    @contextmanager
    def _answer(self, method: str, path: str, **request: object) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, **request) as response:  # type: ignore[arg-type]
                if response.status_code >= 300:
                    raise _fault(response)
                yield response
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise BadConfig(f"{self.url!r} is not a url ({error}): write it as {DEFAULT_URL}") from None
        except httpx.ConnectError as error:
            raise Unavailable(
                f"no coordinator at {self.url} ({error}): start one (fedpipe-coordinator run), "
                "or say where it is with --url or FEDPIPE_URL"
            ) from None
        except httpx.HTTPError as error:
            raise Unavailable(
                f"the coordinator at {self.url} does not answer ({type(error).__name__}): look at its log, then try again"
            ) from None


def _authorities(ca_file: Path | None) -> ssl.SSLContext:
    """Whom to believe who the coordinator is: the fleet's authority if FEDPIPE_CA_FILE names it, else the system's."""
    file = os.environ.get("FEDPIPE_CA_FILE") or ca_file
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        raise BadConfig(f"FEDPIPE_CA_FILE {file} cannot be used: {error}") from None


def _part(name: str) -> str:
    return quote(name, safe="")


def _token(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"token file {file} cannot be read: {error}") from None


def _fault(response: httpx.Response) -> OutsideFault:
    """The coordinator's own text, as the family it belongs to."""
    try:
        text = msgspec.json.decode(response.read(), type=_Error).error
    except msgspec.MsgspecError:
        return Unavailable(f"{response.url} answers {response.status_code}, but not as a coordinator: check --url")
    return Unavailable(text) if response.status_code >= 500 else BadConfig(text)


def _decoded(response: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(response.read(), type=kind)
    except msgspec.MsgspecError as error:
        raise Unavailable(
            f"{response.url} does not answer as this version expects ({error}): install the coordinator's version"
        ) from None
