"""Both daemons as Prometheus sees them: really scraped, read by its own parser, and right about what happened."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from agent.config import AgentConfig
from agent.daemon import Agent
from agent.metrics import StepClock
from coordinator import metrics
from coordinator.core import actions as act
from coordinator.core.state import AgentState, FleetState, RoundRecord, ShareRecord
from protocol.daemon import to_struct
from protocol.errors import BadConfig
from protocol.memory_bus import MemoryBroker
from protocol.messages import Energy
from protocol.metrics import PATH, Histogram, exposition

JOB = """
job = {name = "j", license = "mit"}
model = {source = "toy"}
adapter = {targets = ["all"], rank = 8, bits = "nf4", update_dtype = "fp32"}
train = {n_steps = 2, batch = 64}
round = {n_rounds = 2, min_agents = 2, train_s = 1000}
"""


def figures(text: str) -> dict[str, float]:
    """Every sample, by its name with its labels in braces."""
    families: list[Metric] = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a family is told once"
    assert all(family.documentation for family in families)
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
        found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def scrape(served: Any) -> dict[str, float]:
    return figures(httpx.get(served.url + PATH).raise_for_status().text)


def test_a_coordinator_tells_what_happened(served: Any) -> None:
    before = scrape(served)
    assert before["fedpipe_agents{state=idle}"] == 0
    assert before["fedpipe_jobs{phase=collecting}"] == 0
    httpx.post(served.url + "/v1/jobs", content=JOB, headers={"content-type": "application/toml"}).raise_for_status()
    served.join("anna", "berta", "clara")
    served.until(lambda state: sum(agent.task == "j" for agent in state.agents.values()) >= 2)
    served.survey(*(agent.id for agent in served.coordinator.fleet.state.agents.values() if agent.task))
    shares = list(served.job().round.shares)
    served.route(served.coordinator.topics.up("anna", "exec"), b"\xc1 rubbish")
    opened = scrape(served)
    assert opened["fedpipe_jobs{phase=collecting}"] == 1
    assert opened["fedpipe_agents{state=working}"] == len(shares)
    assert opened["fedpipe_job_shares{name=j,state=open}"] == len(shares)
    assert (
        opened["fedpipe_job_round_close_timestamp_seconds{name=j}"]
        > opened["fedpipe_job_phase_since_timestamp_seconds{name=j}"]
    )
    served.run_round(*shares, loss=2.5)
    after = scrape(served)
    assert after["fedpipe_rounds_total{outcome=aggregated,purpose=train}"] == 1
    assert after["fedpipe_shares_total{purpose=train,state=done}"] == len(shares)
    assert after["fedpipe_updates_total{outcome=accepted}"] == len(shares)
    assert after["fedpipe_updates_total{outcome=late}"] == 0
    assert after["fedpipe_energy_joules_total{source=measured}"] == 0
    assert after["fedpipe_work_seconds_total{energy=unknown}"] >= 3.0 * len(shares)
    assert after["fedpipe_job_loss{kind=train,name=j}"] == pytest.approx(2.5)
    assert after["fedpipe_job_loss{kind=held_out,name=j}"] == pytest.approx(2.5)
    assert after["fedpipe_job_rounds_finished{name=j}"] == 1
    assert after["fedpipe_round_seconds_count{purpose=train}"] == 1
    assert after["fedpipe_aggregation_seconds_count"] == 1
    assert 0 < after["fedpipe_aggregation_seconds_sum"] < after["fedpipe_round_seconds_sum{purpose=train}"]
    assert after["fedpipe_journal_commit_seconds_count"] > 3
    assert after["fedpipe_journal_commit_seconds_bucket{le=+Inf}"] == after["fedpipe_journal_commit_seconds_count"]
    assert sum(value for name, value in after.items() if name.startswith("fedpipe_messages_rejected_total")) == 1
    assert after["fedpipe_disk_state{state=ok}"] == 1
    assert after["fedpipe_disk_free_bytes"] > 0
    assert after["fedpipe_bus_connected"] == 1
    assert after["fedpipe_bus_connects_total"] == 1
    assert after["fedpipe_healthy"] == 1
    assert after["process_resident_memory_bytes"] > 0


def test_energy_is_counted_once_and_by_how_it_is_known() -> None:
    meter = metrics.Meter()
    kept = ShareRecord(state="DONE", train_s=10.0, ended_at=11.0, energy=Energy(joules=50.0, source="measured"))
    later = ShareRecord(state="DONE", train_s=5.0, ended_at=30.0, energy=Energy(joules=20.0, source="declared"))
    said: dict[str, Any] = {"round": 1, "purpose": "train", "version": 0, "outcome": "x", "wall_s": 9.0, "loss": None}
    for attempt, shares in enumerate(
        ({"a": kept}, {"a": kept, "b": later, "c": ShareRecord(state="DONE", train_s=1.0)})
    ):
        record = RoundRecord(attempt=attempt, opened_at=20.0 * attempt, shares=shares, **said)
        meter.took([], [act.Record(job="j", record=record)], FleetState())
    assert meter.energy_j == {("measured",): 50.0, ("declared",): 20.0}
    assert meter.work_s == {("measured",): 10.0, ("declared",): 5.0, ("unknown",): 1.0}


def test_a_version_takes_from_the_last_end_of_a_share_on() -> None:
    meter = metrics.Meter()
    said: dict[str, Any] = {
        "round": 1,
        "attempt": 0,
        "purpose": "train",
        "version": 0,
        "loss": None,
        "opened_at": 100.0,
    }
    shares = {"a": ShareRecord(state="DONE", ended_at=150.0), "b": ShareRecord(state="TIMED_OUT", ended_at=160.0)}
    carried = {"a": ShareRecord(state="DONE", ended_at=90.0)}
    for outcome, ends in (("aggregated", shares), ("quorum: 0 of 1", shares), ("aggregated", carried)):
        record = RoundRecord(outcome=outcome, wall_s=64.0, shares=ends, **said)
        meter.took([], [act.Record(job="j", record=record)], FleetState())
    assert meter.fold_s.sum == 4.0 + 64.0, "what was carried over had ended before the round began"


def test_metrics_need_the_token_that_the_rest_needs(serve: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    served = serve(token_file=str(file))
    assert httpx.get(served.url + PATH).status_code == 401
    assert httpx.get(served.url + PATH, headers={"authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("aggregated", "aggregated"),
        ("quorum: 1 of 3 updates", "quorum"),
        ("cancelled by the operator", "cancelled"),
        ("because we said so", "other"),
        ("", "other"),
    ],
)
def test_how_a_round_ended_is_one_of_few_words(text: str, word: str) -> None:
    assert metrics._outcome(text) == word


def test_a_large_fleet_makes_no_more_series() -> None:
    def n_series(n_agents: int) -> int:
        state = FleetState(agents={f"a{i}": AgentState(id=f"a{i}", online=i % 2 == 0) for i in range(n_agents)})
        return len(figures(exposition(metrics._of_agents(state)).decode()))

    assert n_series(10_000) == n_series(1)


async def test_an_agent_tells_what_it_does(tmp_path: Path) -> None:
    broker, stop = MemoryBroker(), asyncio.Event()
    config = AgentConfig(agent="a1", state_dir=str(tmp_path), device="cpu", metrics="127.0.0.1:0")
    agent = Agent(config, broker.bus("a1"))
    running = asyncio.create_task(agent.run(stop))
    while not (agent.scraped.port and agent.connected):  # noqa: ASYNC110 - a few turns of the loop
        await asyncio.sleep(0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{agent.scraped.port}") as http:
        found = figures((await http.get(PATH)).raise_for_status().text)
        assert (await http.get("/")).status_code == 404
        assert (await http.post(PATH)).status_code == 405
    stop.set()
    await running
    assert found["fedpipe_agent_phase{phase=idle,task=}"] == 1
    assert found["fedpipe_bus_connects_total"] == 1
    assert found["fedpipe_outbox_updates"] == 0
    assert found["fedpipe_host_level{level=run}"] + found["fedpipe_host_level{level=shrink}"] == 1
    assert found["fedpipe_disk_free_bytes"] > 0
    assert found["process_open_fds"] > 0


async def test_an_address_in_use_costs_the_metrics_and_not_the_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    stop = asyncio.Event()
    config = AgentConfig(agent="a1", state_dir=str(tmp_path), device="cpu", metrics=f"127.0.0.1:{port}")
    agent = Agent(config, MemoryBroker().bus("a1"))
    running = asyncio.create_task(agent.run(stop))
    while not (agent.connected and "metrics cannot listen" in caplog.text):
        assert not running.done()
        await asyncio.sleep(0)
    stop.set()
    await running
    server.close()


@pytest.mark.parametrize("place", ["9464", ":9464", "127.0.0.1:port", "127.0.0.1:70000"])
def test_an_impossible_address_is_refused_with_the_file(place: str) -> None:
    with pytest.raises(BadConfig, match=r"agent\.toml: metrics = .* is no address"):
        to_struct({"agent": "a1", "metrics": place}, AgentConfig, "agent.toml")


def test_a_histogram_counts_up_to_its_bounds() -> None:
    found = Histogram(1.0, 2.0)
    for value in (0.5, 1.0, 1.5, 2.0, 99.0):
        found.observe(value)
    assert found.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert found.sum == 104.0


def test_steps_are_told_apart_from_micro_batches_and_phases() -> None:
    clock = StepClock()
    for step, at_s in ((0, 0.2), (1, 1.0), (1, 1.5), (2, 3.0), (4, 5.0), (1, 0.5)):
        clock.stepped(step, at_s)
    assert sum(clock.step_s.counts) == 5
    assert clock.step_s.sum == pytest.approx(5.5)


def test_an_idle_agent_loads_nothing_for_metrics() -> None:
    code = "import sys; import agent.daemon; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
