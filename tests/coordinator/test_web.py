"""The API over a real port and a real coordinator: jobs in, views and adapters out, and no way in for strangers."""

import asyncio
import gc
import io
import json
import signal
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load

from coordinator import web
from coordinator.access import read_token
from coordinator.asked import MAX_BODY_BYTES
from coordinator.config import CoordinatorConfig, Web
from coordinator.core import events as ev
from coordinator.core.state import AgentState, Phase, RoundRecord, ShareRecord
from coordinator.daemon import Coordinator
from coordinator.plan_views import LOOK_BACK
from coordinator.presence import Presence
from coordinator.views import agent_views
from fedpipe.broker import free_port
from fedpipe.client import Coordinator as Client
from protocol.errors import BadConfig, Unavailable
from protocol.frames import encode_frame
from protocol.memory_bus import MemoryBroker
from protocol.messages import Allowance, Blob, ExecState, Offer, Report

Served = Any
"""The fixture's type; it lives in conftest.py."""

TOML = {"content-type": "application/toml"}
JOB = """
[job]
name = "j"
[model]
source = "toy"
[adapter]
update_dtype = "fp32"
model_dtype = "fp32"
[round]
n_rounds = 2
min_agents = 2
"""


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, trust_env=False, timeout=30) as client:
        yield client


def submit(http: httpx.Client, text: str = JOB) -> httpx.Response:
    return http.post("/v1/jobs", content=text.encode(), headers=TOML)


def started(served: Served, http: httpx.Client) -> None:
    """The job is in, agents a and b are surveyed, round 1 is open; agent c has no data."""
    assert submit(http).status_code == 201
    served.join("a", "b", "c")
    served.move("c", ExecState.FAILED, reason="no data set 'default' here")
    served.survey("a", "b")


def finished(served: Served, http: httpx.Client) -> None:
    started(served, http)
    served.run_round("a", "b", loss=3.0)
    served.run_round("a", "b", loss=2.0)
    served.finish("a", "b", loss=1.0)


# ---------------------------------------------------------------------------------------------------------------- jobs


def test_a_job_is_taken_once(http: httpx.Client) -> None:
    first, second = submit(http), submit(http)
    assert (first.status_code, first.json()) == (201, {"name": "j"})
    assert second.status_code == 409
    assert "choose another job.name" in second.json()["error"]
    listed = http.get("/v1/jobs").json()
    assert [(job["name"], job["phase"], job["text"]) for job in listed] == [("j", "waiting", "waiting, round 1 of 2")]


@pytest.mark.parametrize(
    ("content", "headers", "status", "word"),
    [
        (b"[job", TOML, 422, "not valid TOML"),
        (JOB.replace("n_rounds", "rounds").encode(), TOML, 422, "rounds"),
        (b"\xff\xfe", TOML, 400, "UTF-8"),
        (JOB.encode(), {"content-type": "text/plain"}, 415, "application/toml"),
        (JOB.encode() + b"#" * MAX_BODY_BYTES, TOML, 413, "at most"),
    ],
)
def test_a_bad_job_file_is_refused_with_its_fault(
    http: httpx.Client, content: bytes, headers: dict[str, str], status: int, word: str
) -> None:
    answer = http.post("/v1/jobs", content=content, headers=headers)
    assert answer.status_code == status
    assert word in answer.json()["error"]
    assert http.get("/v1/jobs").json() == []


def test_a_job_is_cancelled_once(served: Served, http: httpx.Client) -> None:
    started(served, http)
    answer = http.post("/v1/jobs/j/cancel")
    assert (answer.status_code, answer.json()["phase"]) == (200, "cancelled")
    assert served.job().phase is Phase.CANCELLED
    again = http.post("/v1/jobs/j/cancel")
    assert (again.status_code, "ended already" in again.json()["error"]) == (409, True)


@pytest.mark.parametrize("path", ["", "/versions", "/plan", "/adapter"])
def test_an_unknown_job_is_not_found_and_the_text_says_where_to_look(http: httpx.Client, path: str) -> None:
    answer = http.get(f"/v1/jobs/nix{path}")
    assert answer.status_code == 404
    assert "fedpipe jobs" in answer.json()["error"]


# --------------------------------------------------------------------------------------------------------------- views


def test_an_open_round_is_seen_share_by_share(served: Served, http: httpx.Client) -> None:
    started(served, http)
    served.move("a", ExecState.TRAINING)
    served.say("a", step=7, loss=4.5)
    served.offer("b", loss=2.25)
    served.until(lambda state: state.jobs["j"].round.shares["b"].state is ExecState.DONE)
    view = http.get("/v1/jobs/j").json()
    shares = view["current"]["shares"]
    progress = shares["a"].pop("progress")
    assert (shares["a"]["state"], shares["a"]["loss"], shares["a"]["samples"]) == ("TRAINING", 4.5, 56)
    assert (progress["step"], progress["n_steps"]) == (7, 50)
    assert shares["b"]["state"] == "DONE"
    assert shares["b"]["bytes_up"] == shares["b"]["size_up"] > 0
    member = view["members"]["a"]
    assert (member["survey"], member["excluded"], member["n_train"], member["n_eval"]) == ("DONE", "", 90, 10)
    assert view["members"]["c"]["excluded"] == "no data set 'default' here"


def test_an_upload_is_seen_growing(served: Served, http: httpx.Client) -> None:
    started(served, http)
    blob = Blob(sha256="d" * 64, size=3500, chunk=1024)
    served.publish("a", "offer", Offer(job="j", round=1, attempt=0, kind="lora", blob=blob, samples=8))
    served.report("a", n_cpus=1)

    def share() -> dict[str, Any]:
        found: dict[str, Any] = http.get("/v1/jobs/j").json()["current"]["shares"]["a"]
        return found

    assert (share()["state"], share()["bytes_up"], share()["size_up"]) == ("UPLOADING", 0, 3500)
    for index, length in ((3, 428), (0, 1024)):
        served.route(served.coordinator.topics.up_chunk("a", blob.xfer), encode_frame(index, bytes(length)))
    served.report("a", n_cpus=2)
    assert share()["bytes_up"] == 3500 - 2 * 1024


def test_a_finished_job_tells_its_history(served: Served, http: httpx.Client) -> None:
    finished(served, http)
    view = http.get("/v1/jobs/j").json()
    assert (view["phase"], view["round"], view["current"]) == ("completed", 2, None)
    assert [(r["round"], r["purpose"], r["outcome"]) for r in view["history"]] == [
        (1, "train", "aggregated"),
        (2, "train", "aggregated"),
        (3, "evaluate", "completed"),
    ]
    losses = {v: {a: e["loss"] for a, e in by.items()} for v, by in view["evaluations"].items()}
    assert losses == {"0": {"a": 3.0, "b": 3.0}, "1": {"a": 2.0, "b": 2.0}, "2": {"a": 1.0, "b": 1.0}}
    versions = http.get("/v1/jobs/j/versions").json()
    assert versions == view["versions"]
    assert [(v["version"], v["round"], v["loss"], v["n_evaluated"]) for v in versions] == [
        (1, 1, 2.0, 2),
        (2, 2, 1.0, 2),
    ]


def test_a_history_is_told_from_any_round_on(served: Served, http: httpx.Client) -> None:
    finished(served, http)
    whole = http.get("/v1/jobs/j").json()
    assert [r["round"] for r in whole["history"]] == [1, 2, 3]
    assert [whole["history"][1]["shares"][a]["state"] for a in "ab"] == ["DONE", "DONE"]
    for skip in (1, 2, 3, 99):
        rest = http.get(f"/v1/jobs/j?skip={skip}").json()
        assert rest["n_skipped"] == min(skip, 3)
        assert rest["history"] == whole["history"][skip:]
        # A round measures the version it starts from.
        assert rest["evaluations"] == {v: by for v, by in whole["evaluations"].items() if int(v) >= skip}
        told = {key: value for key, value in rest.items() if key not in {"n_skipped", "history", "evaluations", "now"}}
        assert told == {key: whole[key] for key in told}


def test_a_job_that_is_looked_at_again_is_read_on(served: Served, http: httpx.Client) -> None:
    started(served, http)
    with Client(served.url) as client:
        views = [client.job("j")]
        for loss in (3.0, 2.0):
            served.run_round("a", "b", loss=loss)
            views.append(client.job("j", views[-1]))
        served.finish("a", "b", loss=1.0)
        views += [client.job("j", views[-1]), client.job("j", views[0])]
        for view in views[-2:]:
            assert msgspec.structs.replace(view, now=0.0) == msgspec.structs.replace(client.job("j"), now=0.0)
        assert [len(view.history) for view in views] == [0, 1, 2, 3, 3]
        other = msgspec.structs.replace(views[-1], submitted_at=1.0)
        assert client.job("j", other).submitted_at == views[-1].submitted_at
        longer = msgspec.structs.replace(views[-1], history=[*views[-1].history] * 2)
        assert len(client.job("j", longer).history) == 3, "a history that is not this one's is dropped"


def test_a_job_is_told_as_of_one_moment(served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    started(served, http)
    served.run_round("a", "b", loss=3.0)
    served.run_round("a", "b", loss=2.0)
    store, n_read = served.coordinator.store, []

    class Reading:
        """The store as the API reads it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def past(self, job: str) -> Any:
            found = store.past(job)
            n_read.append(found.n_rounds)
            if len(n_read) == 1:  # the disk is read in a thread; meanwhile the job goes on, to its end
                served.finish("a", "b", loss=1.0)
            return found

    monkeypatch.setattr(served.coordinator, "store", Reading())
    seen = http.get("/v1/jobs/j").json()
    assert (n_read[0], seen["phase"], sorted(seen["evaluations"])) == (2, "completed", ["0", "1", "2"])


def test_a_job_that_never_stands_still_is_told_all_the_same(
    served: Served, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit(http).status_code == 201
    store, job = served.coordinator.store, served.job()

    class Restless:
        """The store of a coordinator whose job is elsewhere after every reading."""

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def past(self, name: str) -> Any:
            job.attempt += 1
            return store.past(name)

    monkeypatch.setattr(served.coordinator, "store", Restless())
    assert http.get("/v1/jobs/j").json()["attempt"] == web.READ_TRIES


def test_a_plan_is_shown_as_soon_as_there_is_one(served: Served, http: httpx.Client) -> None:
    assert submit(http).status_code == 201
    none_yet = http.get("/v1/jobs/j/plan")
    assert (none_yet.status_code, "fedpipe show j" in none_yet.json()["error"]) == (404, True)
    served.join("a", "b")
    served.survey("a", "b")
    view = http.get("/v1/jobs/j/plan").json()
    assert (view["job"], view["round"], view["matrices"]) == ("j", 1, ["model.k", "model.q"])
    assert sorted(view["agents"]) == ["a", "b"]
    assert set(view["agents"]["a"]["choice"]["ranks"]) <= {"model.k", "model.q"}
    served.run_round("a", "b")
    view = http.get("/v1/jobs/j/plan?agent=a").json()
    assert [(p["round"], p["state"], p["samples"]) for p in view["agents"]["a"]["past"]] == [(1, "DONE", 100)]
    assert view["agents"]["b"]["past"] == [], "nothing of it was timed"


def test_a_plan_is_looked_up_in_the_last_rounds_alone(served: Served, http: httpx.Client) -> None:
    submit(http)
    served.join("a", "b")
    served.survey("a", "b")
    store = served.coordinator.store
    for number in range(1, LOOK_BACK + 4):
        steps = {"a": 0.1 * number, "b": 0.5 if number == 2 else 0.0}
        shares = {agent: ShareRecord(state="DONE", step_s=step_s) for agent, step_s in steps.items()}
        said: dict[str, Any] = {"version": 0, "outcome": "x", "opened_at": 1.0, "wall_s": 1.0, "loss": None}
        store.record("j", RoundRecord(round=number, attempt=0, purpose="train", shares=shares, **said))
    past = {agent: found["past"] for agent, found in http.get("/v1/jobs/j/plan").json()["agents"].items()}
    assert [share["round"] for share in past["a"]] == [LOOK_BACK + 3]
    assert past["b"] == [], "it was timed too long ago"
    named = http.get("/v1/jobs/j/plan", params={"agent": "b"}).json()["agents"]["b"]["past"]
    assert [share["round"] for share in named] == list(range(1, LOOK_BACK + 4))


def test_a_job_that_ended_without_a_plan_says_why(http: httpx.Client) -> None:
    submit(http)
    http.post("/v1/jobs/j/cancel")
    answer = http.get("/v1/jobs/j/plan")
    assert (answer.status_code, "cancelled by the operator" in answer.json()["error"]) == (404, True)


def test_the_fleet_at_a_glance(served: Served, http: httpx.Client) -> None:
    started(served, http)
    served.post(ev.AgentLeft(agent="c", session="c" * 16, reason="the connection was lost"))
    fleet = http.get("/v1/fleet").json()
    assert fleet["broker"] == {"address": "127.0.0.1:1883", "connected": True, "fault": ""}
    assert [(a["id"], a["online"], a["task"]) for a in fleet["agents"]] == [
        ("a", True, "j"),
        ("b", True, "j"),
        ("c", False, ""),
    ]
    assert fleet["agents"] == http.get("/v1/agents").json()
    served.report("a", n_cpus=64)
    for view in (http.get("/v1/fleet?brief=1").json()["agents"], http.get("/v1/agents?brief=1").json()):
        assert [(a["id"], a["report"]) for a in view] == [("a", {"t": "report"}), ("b", None), ("c", None)]
    assert http.get("/v1/agents").json()[0]["report"]["n_cpus"] == 64
    assert fleet["jobs"] == http.get("/v1/jobs").json()
    assert (fleet["jobs"][0]["n_agents"], fleet["jobs"][0]["n_done"]) == (2, 0)


def test_a_view_of_many_agents_makes_nothing_for_the_garbage_collector() -> None:
    """A search through all that a coordinator with 10,000 agents holds costs more than to tell of them."""
    report = Report(allowance=Allowance(memory_bytes=1))
    agents = {str(n): AgentState(id=str(n), online=True, report=report) for n in range(1000)}
    for brief in (False, True):
        gc.collect()
        n_before = len(gc.get_objects())
        views = agent_views(agents, Presence(15.0), brief=brief)
        assert len(gc.get_objects()) - n_before < 100
        assert [view.report and view.report.allowance for view in views] == [report.allowance] * 1000


# ------------------------------------------------------------------------------------------------------------- adapter


def test_an_adapter_comes_as_a_tar_that_holds_the_sum_of_the_updates(served: Served, http: httpx.Client) -> None:
    finished(served, http)
    answer = http.get("/v1/jobs/j/adapter", params={"version": 1})
    assert (answer.status_code, answer.headers["fedpipe-version"]) == (200, "1")
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "fedpipe.json"]
    arrays = load(files["adapter_model.safetensors"])
    for name in ("model.k", "model.q"):
        key = f"base_model.model.{name}.lora"
        found = arrays[f"{key}_B.weight"] @ arrays[f"{key}_A.weight"]
        parts = [served.factors(agent)[name] for agent in "ab"]
        np.testing.assert_allclose(found, sum(p.b @ p.a for p in parts) / 2, rtol=1e-4, atol=1e-5)
    assert [entry["round"] for entry in json.loads(files["fedpipe.json"])["rounds"]] == [1]
    assert http.get("/v1/jobs/j/adapter", params={"version": 1}).content == answer.content
    assert http.get("/v1/jobs/j/adapter").headers["fedpipe-version"] == "2"
    assert not list(served.folder.glob("export-*"))


def test_a_version_that_is_not_there(served: Served, http: httpx.Client) -> None:
    started(served, http)
    none_yet = http.get("/v1/jobs/j/adapter")
    assert (none_yet.status_code, "no version yet" in none_yet.json()["error"]) == (404, True)
    served.run_round("a", "b")
    wrong = http.get("/v1/jobs/j/adapter", params={"version": 7})
    assert (wrong.status_code, wrong.json()["error"]) == (404, "no version 7: there are 1 to 1")
    assert http.get("/v1/jobs/j/adapter", params={"version": "1; rm"}).status_code == 400


def test_a_file_that_is_gone_is_said_without_a_trace(served: Served, http: httpx.Client) -> None:
    started(served, http)
    served.run_round("a", "b")
    served.coordinator.blobs.delete(served.job().master)
    answer = http.get("/v1/jobs/j/adapter")
    assert answer.status_code == 503
    assert "No such file" in answer.json()["error"]
    assert "Traceback" not in answer.text


def test_a_fault_of_ours_is_no_story_for_strangers(served: Served, http: httpx.Client) -> None:
    served.coordinator.presence = None  # sabotage
    answer = http.get("/v1/agents") if served.join("a") is None else None
    assert answer is not None
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "a fault of the coordinator's own: its log says more"},
    )


# -------------------------------------------------------------------------------------------------------------- access


def test_with_a_token_only_its_bearer_comes_in(serve: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    served = serve(token_file=str(tmp_path / "token"))

    def status(path: str, **headers: str) -> int:
        return httpx.get(served.url + path, headers=headers, trust_env=False).status_code

    assert status("/v1/health") == 200
    for given in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "s3cret"},
        {"authorization": "Bearer s3cre"},
    ):
        assert status("/v1/fleet", **given) == 401
    assert status("/v1/fleet", authorization="Bearer s3cret") == 200
    assert status("/v1/fleet", authorization="Bearer s3cret", host="fleet.example") == 200


def test_without_a_token_no_page_on_the_web_gets_in(http: httpx.Client) -> None:
    rebound = http.get("/v1/fleet", headers={"host": "evil.example:8470"})
    assert (rebound.status_code, "token_file" in rebound.json()["error"]) == (403, True)
    assert http.post("/v1/jobs/j/cancel", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    for host in ("localhost", "127.0.0.1:1", "[::1]:8470"):
        assert http.get("/v1/fleet", headers={"host": host, "sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"host": "0.0.0.0"}, "web.token_file"),  # noqa: S104
        ({"host": "fleet.example"}, "web.token_file"),
        ({"token_file": "/nowhere/token"}, "cannot be read"),
        ({"token_file": "/dev/null"}, "no token"),
    ],
)
def test_an_unsafe_or_useless_configuration_is_refused(settings: dict[str, str], word: str) -> None:
    with pytest.raises(BadConfig, match=word):
        read_token(Web(**settings))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- server


def test_an_address_in_use_is_said_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=rf"port {port}.*choose another web\.port"):
            web.listen(Web(port=port))


async def test_the_api_lives_beside_the_daemon_and_leaves_its_signals_alone(tmp_path: Path) -> None:
    coordinator = Coordinator(
        CoordinatorConfig(state_dir=str(tmp_path), web=Web(port=0)), MemoryBroker().bus("coordinator")
    )
    stop, place = asyncio.Event(), tmp_path / "api.json"
    before = signal.getsignal(signal.SIGTERM)
    running = asyncio.create_task(coordinator.run(stop, web.serve_api(coordinator)))
    while not place.exists():  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    url = json.loads(place.read_text())["url"]
    async with (
        httpx.AsyncClient(trust_env=False, timeout=30) as client,
        client.stream("GET", f"{url}/v1/events") as events,
    ):
        lines = events.aiter_lines()
        assert await anext(lines) == "event: listening"
        assert (await client.get(f"{url}/v1/health")).json()["status"] == "ok"
        assert signal.getsignal(signal.SIGTERM) is before
        stop.set()
        await running
        rest = [line async for line in lines]
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{url}/v1/health")
    assert rest[0].startswith("data: ")
    assert not place.exists()


async def test_the_api_answers_also_where_its_place_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "api.json").mkdir()
    config = CoordinatorConfig(state_dir=str(tmp_path), web=Web(port=free_port()))
    stop, coordinator = asyncio.Event(), Coordinator(config, MemoryBroker().bus("coordinator"))
    running = asyncio.create_task(coordinator.run(stop, web.serve_api(coordinator)))
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client, asyncio.timeout(30):
        while True:
            try:
                answer = await client.get(f"http://127.0.0.1:{config.web.port}/v1/health")
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
    assert answer.json()["status"] == "ok"
    stop.set()
    await running
