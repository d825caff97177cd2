"""The HTTP API's description for programs, made from its routes and from the Structs that it answers with.

OpenAPI 3.1.1, whose schemas are JSON Schema 2020-12; msgspec writes those from the Structs, with all bounds.  Each route needs
an entry in OPERATIONS: one that is missing, or one too many, is an error when the description is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, get_args

import msgspec
from starlette.routing import Route

from coordinator.commands import PauseAsked, RollbackAsked
from coordinator.feed import AnyNews
from coordinator.plan_views import PlanView
from coordinator.trust.desk import EnrolmentView, Reason, TokenAsked, TokenMade
from coordinator.versions import VersionView
from coordinator.views import AgentView, FleetView, JobShort, JobView

Json = dict[str, Any]

REF: Final = "#/components/schemas/{name}"


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: str
    software: str
    disk: str = "ok"
    audit: str = ""
    """Number and digest of the last line of the audit log, as n:digest."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """The name of the job that was taken."""

    name: str


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What was wrong, and what to do next."""

    error: str


class Stream(NamedTuple):
    """An answer that is no JSON."""

    media: str
    text: str


class Operation(NamedTuple):
    """One request: its answer, its parameters as (name, place, schema, text), and its own errors."""

    id: str
    text: str
    answer: Any
    status: int = 200
    parameters: tuple[tuple[str, Json, str], ...] = ()
    errors: Mapping[int, str] = {}
    takes: str = ""
    """The kind of text in its body."""
    asks: Any = None
    """The Struct in its body, as JSON."""
    is_open: bool = False


PLACES: Final = {"name": "Which job.", "agent": "Which agent."}
NO_JOB: Final = "There is no such job."
NO_AUTHORITY: Final = "This coordinator has no authority."
NO_BODY: Final = "The body is not what is described here."
SKIP: Final = ("skip", {"type": "integer", "minimum": 0, "default": 0}, "Leave out so many of the first ended rounds.")
WHOSE: Final = ("agent", {"type": "string"}, "An agent of which all past shares are told, not the last that was timed.")
BRIEF: Final = (
    "brief",
    {"type": "integer", "enum": [0, 1], "default": 0},
    "1 leaves out of agents' reports what their servers have.",
)
VERSION: Final = ("version", {"type": "integer", "minimum": 0}, "Which version; without it the newest.")

OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("GET", "/v1/health"): Operation("health", "Whether the process answers.", Health, is_open=True),
    ("GET", "/v1/openapi.json"): Operation("openapi", "This description.", Json),
    ("GET", "/v1/fleet"): Operation(
        "fleet",
        "Broker, agents, jobs and counts at a glance.",
        FleetView,
        parameters=(BRIEF,),
        errors={400: "`brief` is not a number."},
    ),
    ("GET", "/v1/agents"): Operation(
        "agents",
        "All agents that were ever seen, by name.",
        list[AgentView],
        parameters=(BRIEF,),
        errors={400: "`brief` is not a number."},
    ),
    ("GET", "/v1/events"): Operation(
        "events",
        "What changes, as it changes, until the reader goes or the coordinator stops.",
        Stream(
            "text/event-stream",
            "Server-sent events (WHATWG HTML, 9.2): `event` is the `event` of a News schema, `data` that schema as JSON on one "
            "line. A comment comes when nothing else did for 15 s. After `listening` or `missed`, read the views.",
        ),
    ),
    ("GET", "/v1/jobs"): Operation("jobs", "All jobs, oldest first, one line each.", list[JobShort]),
    ("POST", "/v1/jobs"): Operation(
        "submit",
        "Hand in a job file; the job is durable when this answers.",
        Taken,
        status=201,
        takes="application/toml",
        errors={
            400: "The body is not UTF-8.",
            409: "A job has this name.",
            413: "The file is too large.",
            415: "The body is not declared as application/toml.",
            422: "The file is no job that can run; the text names the key.",
        },
    ),
    ("GET", "/v1/jobs/{name}"): Operation(
        "job",
        "A job with its members, open round, history, versions and cost.",
        JobView,
        parameters=(SKIP,),
        errors={400: "`skip` is not a number.", 404: NO_JOB},
    ),
    ("POST", "/v1/jobs/{name}/cancel"): Operation(
        "cancel",
        "End a job; its finished versions stay.",
        JobShort,
        errors={404: NO_JOB, 409: "The job has ended already."},
    ),
    ("POST", "/v1/jobs/{name}/pause"): Operation(
        "pause",
        "Begin no further round of a job; with `now`, stop the one under way. Pausing again changes neither who nor why.",
        JobShort,
        asks=PauseAsked,
        errors={400: NO_BODY, 404: NO_JOB, 409: "The job has ended already."},
    ),
    ("POST", "/v1/jobs/{name}/resume"): Operation(
        "resume",
        "Let a paused job go on where it was.",
        JobShort,
        errors={404: NO_JOB, 409: "The job is not paused."},
    ),
    ("POST", "/v1/jobs/{name}/rollback"): Operation(
        "rollback",
        "Make a new version of an earlier one's content: the job goes on from it, an ended one hands it out.",
        JobShort,
        asks=RollbackAsked,
        errors={
            400: NO_BODY,
            404: "There is no such job, or no such version any more; the text says which there are.",
            409: "A version is just being made; try again in a moment.",
        },
    ),
    ("GET", "/v1/jobs/{name}/versions"): Operation(
        "versions",
        "A job's versions with their held-out loss, oldest first.",
        list[VersionView],
        errors={404: NO_JOB},
    ),
    ("GET", "/v1/jobs/{name}/plan"): Operation(
        "plan",
        "Who trains what and why, beside what was measured.",
        PlanView,
        parameters=(WHOSE,),
        errors={404: "There is no such job, or it has no plan yet; the text says which."},
    ),
    ("GET", "/v1/jobs/{name}/adapter"): Operation(
        "adapter",
        "One version of the adapter as a tar of its PEFT folder.",
        Stream("application/x-tar", "The header fedpipe-version says which version it is."),
        parameters=(VERSION,),
        errors={400: "`version` is not a number.", 404: "There is no such job, or no such version."},
    ),
    ("POST", "/v1/tokens"): Operation(
        "token",
        "Make a join token; it is told this once.",
        TokenMade,
        status=201,
        asks=TokenAsked,
        errors={400: NO_BODY, 409: NO_AUTHORITY, 422: "There cannot be such a token; the text says why."},
    ),
    ("GET", "/v1/enrolments"): Operation(
        "enrolments",
        "Who asked to be an agent, and what became of it, by name.",
        list[EnrolmentView],
        errors={409: NO_AUTHORITY},
    ),
    **{
        ("POST", f"/v1/enrolments/{{agent}}/{what}"): Operation(
            what,
            text,
            EnrolmentView,
            asks=Reason,
            errors={
                400: NO_BODY,
                404: "Nobody of this name has asked.",
                409: f"{NO_AUTHORITY} Or it is where this cannot be done.",
            },
        )
        for what, text in {
            "accept": "Let a server in that has asked.",
            "reject": "Send a server away that has asked.",
            "revoke": "Take an agent's certificates back: it is out at once.",
        }.items()
    },
}

ALWAYS: Final = {
    401: "A bearer token is needed, and this request has none or a wrong one.",
    403: "Without a token in the coordinator's configuration only this machine is answered, and no page of another site; who is an "
    "agent is asked and decided over TLS, or on this machine.",
    500: "A fault of the coordinator's own; its log says more.",
    503: "The coordinator cannot do this now (its disk refuses, a file is gone); try again.",
}


def document(routes: Iterable[Route], software: str) -> Json:
    """The whole description.  Raises KeyError when OPERATIONS and the routes do not fit."""
    served = {(m, route.path) for route in routes for m in route.methods or () if m != "HEAD"}
    if odd := served ^ OPERATIONS.keys():
        raise KeyError(f"in the routes or in OPERATIONS, but not in both: {sorted(odd)}")
    kinds = [op.answer for op in OPERATIONS.values() if not isinstance(op.answer, Stream) and op.answer is not Json]
    kinds += [op.asks for op in OPERATIONS.values() if op.asks]
    schemas, components = msgspec.json.schema_components([*kinds, Fault, *get_args(AnyNews)], ref_template=REF)
    answers = dict(zip(map(str, kinds), schemas, strict=False))
    paths: dict[str, Json] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(path, operation, answers)
    name, _, version = software.partition(" ")
    return {
        "openapi": "3.1.1",
        "info": {
            "title": f"{name or 'fedpipe'} coordinator",
            "version": version or software,
            "summary": "Views of a fleet and its jobs, jobs in, adapters out.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {}],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {str(status): _fault(text) for status, text in ALWAYS.items()},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, operation: Operation, answers: Mapping[str, Json]) -> Json:
    always = (500,) if operation.is_open else tuple(ALWAYS)
    told: Json = {
        "operationId": operation.id,
        "summary": operation.text,
        "responses": {
            str(operation.status): _answer(operation, answers),
            **{str(status): _fault(text) for status, text in operation.errors.items()},
            **{str(status): {"$ref": f"#/components/responses/{status}"} for status in always},
        },
    }
    given = [_parameter(name, "path", {"type": "string"}, PLACES[name]) for name in re.findall(r"{(\w+)}", path)]
    given += [_parameter(name, "query", schema, text) for name, schema, text in operation.parameters]
    if given:
        told["parameters"] = given
    if operation.takes:
        told["requestBody"] = {"required": True, "content": {operation.takes: {"schema": {"type": "string"}}}}
    if operation.asks:
        content = {"application/json": {"schema": answers[str(operation.asks)]}}
        told["requestBody"] = {"required": True, "content": content}
    if operation.is_open:
        told["security"] = []
    return told


def _answer(operation: Operation, answers: Mapping[str, Json]) -> Json:
    if isinstance(operation.answer, Stream):
        media, text = operation.answer
        content: Json = {} if media == "application/x-tar" else {"schema": {"type": "string"}}
        return {"description": text, "content": {media: content}}
    schema = answers.get(str(operation.answer), {"type": "object"})
    return {"description": operation.text, "content": {"application/json": {"schema": schema}}}


def _fault(text: str) -> Json:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": REF.format(name="Fault")}}}}


def _parameter(name: str, place: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": place, "required": place == "path", "description": text, "schema": schema}
