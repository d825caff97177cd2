"""The API's description: valid, complete, and true of what the API answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import validate
from starlette.routing import Route

from coordinator.openapi import document
from coordinator.trust.desk import Counter
from coordinator.trust.office import create
from coordinator.web import Api
from protocol import keys
from protocol.enrolment import Enrol
from protocol.messages import ExecState

Served = Any
"""The fixture's type; it lives in tests/conftest.py."""

TOML = {"content-type": "application/toml"}
JOB = b"[job]\nname = 'j'\n[model]\nsource = 'toy'\n[round]\nn_rounds = 2\nmin_agents = 2\n"


@pytest.fixture
def http(served: Served) -> Any:
    with httpx.Client(base_url=served.url, trust_env=False, timeout=30) as client:
        yield client


@pytest.fixture
def told(http: httpx.Client) -> dict[str, Any]:
    """The description as it is served."""
    found: dict[str, Any] = http.get("/v1/openapi.json").json()
    return found


def schema_of(told: dict[str, Any], path: str, status: str = "200", method: str = "get") -> dict[str, Any]:
    """What the description says of an answer, ready to check one."""
    answer = told["paths"][path][method]["responses"][status]
    if "$ref" in answer:
        answer = told["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    return {**answer["content"]["application/json"]["schema"], "components": told["components"]}


def check(instance: Any, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(instance)


def test_it_is_valid_openapi(told: dict[str, Any]) -> None:
    validate(told)
    assert told["openapi"].startswith("3.1")
    assert told["info"]["version"][0].isdigit()


def test_every_route_is_described_and_no_other(told: dict[str, Any]) -> None:
    routes = [*Api.routes(Api.__new__(Api)), *Counter.routes(Counter.__new__(Counter))]
    served = {(method.lower(), r.path) for r in routes for method in r.methods or () if method != "HEAD"}
    assert {(method, path) for path, item in told["paths"].items() for method in item} == served
    with pytest.raises(KeyError, match="/v1/new"):
        document([*routes, Route("/v1/new", lambda _: None)], "fedpipe 1")
    with pytest.raises(KeyError, match="/v1/fleet"):
        document([route for route in routes if route.path != "/v1/fleet"], "fedpipe 1")


def test_patterns_mean_the_same_to_those_who_do_not_speak_python(told: dict[str, Any]) -> None:
    assert r"\\Z" not in json.dumps(told)  # the end of the text to Python, the letter Z to ECMA-262


def test_what_the_api_answers_is_as_described(served: Served, http: httpx.Client, told: dict[str, Any]) -> None:
    taken = http.post("/v1/jobs", content=JOB, headers=TOML)
    check(taken.json(), schema_of(told, "/v1/jobs", "201", "post"))
    served.join("a", "b", "c")
    served.move("c", ExecState.FAILED, reason="no data set 'default' here")
    served.survey("a", "b")
    served.run_round("a", "b", loss=3.0)
    served.move("a", ExecState.TRAINING)
    served.say("a", step=7)
    for path in ("/v1/health", "/v1/fleet", "/v1/agents", "/v1/jobs"):
        check(http.get(path).json(), schema_of(told, path))
    for part in ("", "/plan", "/versions"):
        check(http.get(f"/v1/jobs/j{part}").json(), schema_of(told, f"/v1/jobs/{{name}}{part}"))
    cancelled = http.post("/v1/jobs/j/cancel")
    check(cancelled.json(), schema_of(told, "/v1/jobs/{name}/cancel", method="post"))
    with pytest.raises(jsonschema.ValidationError):
        check({"nothing": 1}, schema_of(told, "/v1/fleet"))


def test_what_is_said_of_enrolments_is_as_described(
    tmp_path: Path, served_kind: Callable[..., Served], told: dict[str, Any]
) -> None:
    create(tmp_path / "trust", "main", time.time())
    served = served_kind(tmp_path)
    with httpx.Client(base_url=served.url, trust_env=False, timeout=30) as http:
        asked = {"uses": 3, "ttl_s": 60.0}
        body = told["paths"]["/v1/tokens"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        check(asked, {**body, "components": told["components"]})
        made = http.post("/v1/tokens", json=asked)
        check(made.json(), schema_of(told, "/v1/tokens", "201", "post"))
        for agent in ("a", "b"):
            csr = keys.request(keys.new_key(), agent)
            asks = Enrol(token=made.json()["token"], csr=csr, agent=agent)
            served.coordinator.trust.office.enrol(asks, "192.0.2.3", time.time())
        check(http.get("/v1/enrolments").json(), schema_of(told, "/v1/enrolments"))
        for agent, what in (("a", "accept"), ("b", "reject"), ("a", "revoke"), ("a", "accept"), ("c", "revoke")):
            path = "/v1/enrolments/{agent}/" + what
            answer = http.post(path.replace("{agent}", agent), json={"reason": "so"})
            check(answer.json(), schema_of(told, path, str(answer.status_code), "post"))
        for path, wrong in (("/v1/tokens", b"x"), ("/v1/tokens", b'{"uses": 0}'), ("/v1/enrolments/a/accept", b"[]")):
            refused = http.post(path, content=wrong)
            assert refused.status_code in {400, 422}
            described = path.replace("/a/", "/{agent}/")
            check(refused.json(), schema_of(told, described, str(refused.status_code), "post"))
    served.close()


@pytest.mark.parametrize(
    ("method", "path", "content", "headers"),
    [
        ("get", "/v1/jobs/{name}", b"", {}),
        ("get", "/v1/jobs/{name}/plan", b"", {}),
        ("post", "/v1/jobs/{name}/cancel", b"", {}),
        ("post", "/v1/jobs", b"[job", TOML),
        ("post", "/v1/jobs", b"x", {"content-type": "text/plain"}),
        ("get", "/v1/fleet", b"", {"host": "evil.example"}),
        ("get", "/v1/enrolments", b"", {}),
        ("post", "/v1/tokens", b"", {}),
    ],
)
def test_errors_are_as_described(
    http: httpx.Client, told: dict[str, Any], method: str, path: str, content: bytes, headers: dict[str, str]
) -> None:
    answer = http.request(method, path.replace("{name}", "nix"), content=content, headers=headers)
    assert answer.status_code >= 400
    check(answer.json(), schema_of(told, path, str(answer.status_code), method))


def test_a_long_history_is_read_from_where_one_left_off(served: Served, http: httpx.Client) -> None:
    http.post("/v1/jobs", content=JOB, headers=TOML)
    served.join("a", "b")
    served.survey("a", "b")
    served.run_round("a", "b", loss=3.0)
    served.run_round("a", "b", loss=2.0)
    served.finish("a", "b", loss=1.0)
    whole = http.get("/v1/jobs/j").json()
    rest = http.get("/v1/jobs/j", params={"skip": 2}).json()
    assert (whole["n_skipped"], rest["n_skipped"]) == (0, 2)
    assert rest["history"] == whole["history"][2:]
    assert rest["evaluations"] == {"2": whole["evaluations"]["2"]}
    assert {key: rest[key] for key in ("versions", "cost", "phase")} == {
        key: whole[key] for key in ("versions", "cost", "phase")
    }
    assert http.get("/v1/jobs/j", params={"skip": 99}).json()["n_skipped"] == 3
    assert http.get("/v1/jobs/j", params={"skip": "-1"}).status_code == 400
