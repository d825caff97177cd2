"""What an operator does with a job, over the real API and the command line: it is done, durable, audited, or refused with a way out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from typer.testing import CliRunner

from coordinator.audit import read
from coordinator.config import Keep
from coordinator.core.state import Phase
from coordinator.daemon import Coordinator
from coordinator.lineage import exported_digest
from coordinator.pruning import need_of, prune
from coordinator.replay import replay
from coordinator.store import Store
from fedpipe.__main__ import app
from protocol.messages import ExecState

Served = Any
"""The fixture's type; it lives in tests/conftest.py."""

JOB = b"[job]\nname = 'j'\n[model]\nsource = 'toy'\n[round]\nn_rounds = 3\nmin_agents = 2\n"


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, trust_env=False, timeout=30) as client:
        client.post("/v1/jobs", content=JOB, headers={"content-type": "application/toml"})
        served.join("a", "b")
        served.survey("a", "b")
        yield client


def fedpipe(served: Served, *words: str) -> tuple[int, str]:
    """A command's exit code and what it said."""
    done = CliRunner().invoke(app, [*words, "--url", served.url], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]


def test_a_job_is_paused_and_resumed(served: Served, http: httpx.Client) -> None:
    assert refusal(http.post("/v1/jobs/j/resume")) == (409, "job 'j' is not paused: it is collecting")
    pending = http.post("/v1/jobs/j/pause", json={"reason": "heat"}).json()
    assert (pending["phase"], pending["text"]) == (
        "collecting",
        "collecting, round 1 of 3; then paused, by local: heat",
    )
    again = http.post("/v1/jobs/j/pause", json={"now": True, "reason": "other"}).json()
    assert (again["phase"], again["pause"]["reason"]) == ("paused", "heat")
    view = http.get("/v1/jobs/j").json()
    assert (view["text"], view["history"][0]["outcome"]) == (
        "paused before round 1 of 3 (attempt 2), by local: heat",
        "paused: by local: heat",
    )
    assert http.get("/v1/jobs").json()[0]["pause"]["by"] == "local"
    assert 'fedpipe_jobs{phase="paused"} 1.0' in http.get("/metrics").text
    assert http.post("/v1/jobs/j/resume").json()["pause"] is None
    served.until_phase(Phase.COLLECTING)
    http.post("/v1/jobs/j/cancel")
    for verb in ("pause", "resume"):
        assert refusal(http.post(f"/v1/jobs/j/{verb}"))[0] == 409


def test_a_job_goes_back_to_a_version_and_on_from_it(served: Served, http: httpx.Client) -> None:
    served.run_round("a", "b", loss=3.0)
    first = served.job().master
    served.run_round("a", "b", loss=9.0)
    back = http.post("/v1/jobs/j/rollback", json={"version": 1, "reason": "worse"})
    assert (back.status_code, back.json()["version"]) == (200, 3)
    served.until_phase(Phase.COLLECTING)
    assert served.job().master == first
    served.run_round("a", "b", loss=2.0)
    versions = http.get("/v1/jobs/j/versions").json()
    assert [(v["version"], v["round"], v["of"]) for v in versions] == [(1, 1, 0), (2, 2, 0), (3, 1, 1), (4, 3, 0)]
    assert versions[2]["sha256"] == versions[0]["sha256"]
    served.finish("a", "b", loss=1.0)
    card = http.get("/v1/jobs/j/adapter")
    assert card.headers["fedpipe-version"] == "4"
    assert b"version 3 is version 1 once more, by local: worse" in card.content
    assert b'"round": 2' not in card.content, "what was left behind is no part of where it comes from"
    store = Store(served.folder / "journal.sqlite", read_only=True)
    again = replay(store, served.folder / "blobs")
    store.close()
    assert again.equal, [check for check in again.checks if check.verdict == "different"]


def test_an_ended_job_hands_out_what_it_went_back_to(served: Served, http: httpx.Client) -> None:
    for _ in range(3):
        served.run_round("a", "b")
    served.finish("a", "b")
    http.post("/v1/jobs/j/rollback", json={"version": 2})
    assert http.get("/v1/jobs/j/adapter").headers["fedpipe-version"] == "4"
    assert (served.job().phase, served.job().round_number) == (Phase.COMPLETED, 3)
    asyncio.run_coroutine_threadsafe(exported(served.coordinator), served.loop).result(30)
    assert exported_digest(served.folder / "exports" / "j") == served.coordinator.store.versions("j")[1].master


async def exported(coordinator: Coordinator) -> None:
    await asyncio.gather(*coordinator._slow.values())


def test_what_cannot_be_gone_back_to_is_said_with_what_can(served: Served, http: httpx.Client) -> None:
    def back(version: object) -> tuple[int, str]:
        return refusal(http.post("/v1/jobs/j/rollback", json={"version": version}))

    assert back(1) == (404, "the job has no version yet: its first round is not aggregated")
    for loss in (3.0, 2.0, 1.0):
        served.run_round("a", "b", loss=loss)
    assert back(7) == (404, "no version 7: there are 1 to 3")
    assert back(0)[0] == 404
    assert "submit the job anew" in back(0)[1]
    assert back("x")[0] == 400
    coordinator = served.coordinator
    prune(coordinator.store, coordinator.blobs, Keep(versions=1), need_of(coordinator.fleet.state))
    assert back(1) == (404, "the files of version 1 were pruned (see [keep]): those of 2, 3 are kept")
    assert http.post("/v1/jobs/nix/rollback", json={"version": 1}).status_code == 404


def test_who_what_and_why_are_audited(served: Served, http: httpx.Client) -> None:
    served.run_round("a", "b")
    http.post("/v1/jobs/j/pause", json={"now": True, "reason": "heat"})
    http.post("/v1/jobs/j/rollback", json={"version": 1, "reason": "worse"})
    http.post("/v1/jobs/j/rollback", json={"version": 9})
    http.post("/v1/jobs/j/resume")
    told = [(e.actor, e.action, e.what, e.outcome) for e in read(served.folder / "audit.log") if e.of]
    assert told[1:] == [
        ("local", "pause", "j now: heat", "200"),
        ("local", "rollback", "j to version 1: worse", "200"),
        ("local", "rollback", "j to version 9", "404"),
        ("local", "resume", "j", "200"),
    ]


def test_the_answers_are_as_described(served: Served, http: httpx.Client) -> None:
    told = http.get("/v1/openapi.json").json()
    served.run_round("a", "b")
    for verb, body in (("pause", {"now": True}), ("resume", None), ("rollback", {"version": 1})):
        operation = told["paths"][f"/v1/jobs/{{name}}/{verb}"]["post"]
        answer = http.post(f"/v1/jobs/j/{verb}", json=body)
        schema = operation["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**schema, "components": told["components"]}).validate(answer.json())
        if body:
            asked = operation["requestBody"]["content"]["application/json"]["schema"]
            jsonschema.Draft202012Validator({**asked, "components": told["components"]}).validate(body)


@pytest.mark.usefixtures("http")
def test_the_command_line_says_the_same(served: Served) -> None:
    served.run_round("a", "b")
    code, text = fedpipe(served, "pause", "j", "--now", "--reason", "heat")
    assert (code, text) == (0, "j: paused before round 2 of 3 (attempt 2), by local: heat\n")
    code, text = fedpipe(served, "rollback", "j", "1", "--json")
    assert (code, json.loads(text)["version"]) == (0, 2)
    assert fedpipe(served, "rollback", "j", "5") == (78, "fedpipe: no version 5: there are 1 to 2\n")
    assert fedpipe(served, "resume", "j")[0] == 0
    served.until_phase(Phase.COLLECTING)
    assert fedpipe(served, "resume", "j") == (78, "fedpipe: job 'j' is not paused: it is collecting\n")
    served.move("a", ExecState.TRAINING)
    assert fedpipe(served, "rollback", "j", "1", "--reason", "worse")[1].startswith(
        "j: version 3 is version 1 once more; "
    )


def test_a_paused_job_is_paused_after_a_restart(served: Served, http: httpx.Client, served_kind: type[Any]) -> None:
    served.run_round("a", "b")
    http.post("/v1/jobs/j/pause", json={"now": True, "reason": "heat"})
    http.post("/v1/jobs/j/rollback", json={"version": 1})
    before = served.job()
    served.close()
    again = served_kind(served.folder)
    try:
        assert again.job() == before
        assert httpx.post(f"{again.url}/v1/jobs/j/resume").json()["version"] == 2
    finally:
        again.close()
