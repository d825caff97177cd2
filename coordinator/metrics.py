"""What the coordinator tells Prometheus: counted from its facts and wishes as they pass, and read from its state when asked.

A scrape is one pass over the agents and over the shares of open rounds (some milliseconds at 10,000 agents); no label holds an
agent's id, so the number of series depends on jobs under way alone.  A job's name is in the label `name`: `job` is what Prometheus
itself calls a group of targets.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import ENDED, AgentState, Cause, FleetState, JobState, Phase, RoundRecord
from coordinator.cost import work_s, worked
from coordinator.disk import DiskState
from protocol import SOFTWARE, keys
from protocol.errors import OutsideFault
from protocol.messages import TERMINAL
from protocol.metrics import Histogram, counter, gauge, histogram

if TYPE_CHECKING:
    from prometheus_client import Metric

    from coordinator.daemon import Coordinator

ROUND_BOUNDS_S: Final = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14_400.0)
FOLD_BOUNDS_S: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
MAX_JOBS: Final = 100
"""Whose last losses are told: of a job that has ended they stay as they were, until so many came after it."""
OUTCOMES: Final = frozenset({"aggregated", "paused", "rolled_back", *map(str, ENDED), *map(str, Cause)})
AGENT_STATES: Final = ("idle", "working", "paused", "offline")


class Meter:
    """Counts since the process began, taken from what the consumer handled."""

    def __init__(self) -> None:
        self.n_connects = 0
        self.n_events = 0
        self.rounds: Counter[tuple[str, ...]] = Counter()
        self.shares: Counter[tuple[str, ...]] = Counter()
        self.updates: Counter[tuple[str, ...]] = Counter({(o,): 0 for o in ("accepted", "late", "declined")})
        self.ended: Counter[tuple[str, ...]] = Counter({(str(phase),): 0 for phase in sorted(ENDED)})
        self.energy_j: dict[tuple[str, ...], float] = {("measured",): 0.0, ("declared",): 0.0}
        self.work_s: dict[tuple[str, ...], float] = {(known,): 0.0 for known in ("measured", "declared", "unknown")}
        self.round_s: dict[tuple[str, ...], Histogram] = {}
        self.fold_s = Histogram(*FOLD_BOUNDS_S)
        self.losses: dict[str, dict[str, float]] = {}

    def took(self, events: Sequence[ev.Happened], wishes: Sequence[act.Wish], state: FleetState) -> None:
        """A batch was handled.  Cost: linear in the batch and in the shares of rounds that ended with it."""
        self.n_events += len(events)
        acknowledged = {wish.xfer for wish in wishes if isinstance(wish, act.Acknowledge)}
        for event in events:
            if isinstance(event, ev.UpdateStored) and event.offer.blob.xfer in acknowledged:
                self.updates["late" if _is_late(event, state) else "accepted",] += 1
        for wish in wishes:
            match wish:
                case act.Decline():
                    self.updates["declined",] += 1
                case act.Record(job=job, record=record):
                    self._closed(job, record)
                case act.Finish(phase=phase):
                    self.ended[phase,] += 1

    def _closed(self, job: str, record: RoundRecord) -> None:
        self.rounds[record.purpose, _outcome(record.outcome)] += 1
        self.round_s.setdefault((record.purpose,), Histogram(*ROUND_BOUNDS_S)).observe(record.wall_s)
        if record.outcome == "aggregated":
            closed_at = max(record.opened_at, *(share.ended_at for share in record.shares.values()))
            self.fold_s.observe(record.opened_at + record.wall_s - closed_at)
        for share in record.shares.values():
            self.shares[record.purpose, share.state.lower()] += 1
        for share in worked(record):
            self.work_s[share.energy.source if share.energy else "unknown",] += work_s(share)
            if share.energy:
                self.energy_j[share.energy.source,] += share.energy.joules
        if job not in self.losses and len(self.losses) >= MAX_JOBS:
            del self.losses[next(iter(self.losses))]
        losses = self.losses.setdefault(job, {})
        if record.loss is not None:
            losses["train"] = record.loss
        found = [share.evaluated for share in record.shares.values() if share.evaluated]
        if found and (n_samples := sum(one.n_samples for one in found)):
            losses["held_out"] = sum(one.loss * one.n_samples for one in found) / n_samples


def _outcome(text: str) -> str:
    """The first word of how a round ended; the rest is for people, and labels are not."""
    word = text.partition(":")[0].partition(" ")[0]
    return word if word in OUTCOMES else "other"


def _is_late(event: ev.UpdateStored, state: FleetState) -> bool:
    job, offer = state.jobs.get(event.offer.job), event.offer
    return job is not None and any(one.sha256 == offer.blob.sha256 for one in job.late)


def families(coordinator: Coordinator) -> Iterator[Metric]:
    """Every figure of one scrape.  Call it in the event loop; it blocks for some milliseconds."""
    state = coordinator.fleet.state
    yield gauge("fedpipe_info", "Constant 1; the software and the fleet.", {(SOFTWARE, coordinator.config.fleet): 1}, "software", "fleet")  # fmt: skip
    yield from _of_agents(state)
    yield from _of_jobs(state, coordinator.meter)
    yield from _of_messages(coordinator)
    yield from _of_disk(coordinator)
    yield from _of_trust(coordinator)
    lines = float(coordinator.audit.head.n)
    yield gauge("fedpipe_audit_lines", "Lines of the audit log; they never become fewer.", lines)


def _of_agents(state: FleetState) -> Iterator[Metric]:
    counts = Counter(map(_standing, state.agents.values()))
    found = {(name,): float(counts[name]) for name in AGENT_STATES}
    yield gauge("fedpipe_agents", "Known agents by what they do.", found, "state")


def _standing(agent: AgentState) -> str:
    if not agent.online:
        return "offline"
    if agent.report and agent.report.allowance and agent.report.allowance.paused:
        return "paused"
    return "working" if agent.task else "idle"


def _of_jobs(state: FleetState, meter: Meter) -> Iterator[Metric]:
    phases = Counter(job.phase for job in state.jobs.values())
    yield gauge("fedpipe_jobs", "Jobs by phase.", {(str(p),): float(phases[p]) for p in Phase}, "phase")
    yield counter("fedpipe_jobs_ended_total", "Jobs that came to an end.", meter.ended, "phase")
    going = {name: job for name, job in state.jobs.items() if job.phase not in ENDED}
    finished = {(name,): float(job.round_number) for name, job in going.items()}
    yield gauge("fedpipe_job_rounds_finished", "Finished rounds of a job under way.", finished, "name")
    since = {(name,): job.since for name, job in going.items()}
    text = "When a job under way came into its phase."
    yield gauge("fedpipe_job_phase_since_timestamp_seconds", text, since, "name")
    closes = {(name,): job.round.close_at for name, job in going.items() if job.round}
    yield gauge("fedpipe_job_round_close_timestamp_seconds", "When the open round has to close.", closes, "name")
    yield gauge("fedpipe_job_shares", "Shares of the open round.", _shares(going), "name", "state")
    text = "Loss per token of the last round, mean over agents, weighted by samples."
    losses = {(job, kind): loss for job, found in meter.losses.items() for kind, loss in found.items()}
    yield gauge("fedpipe_job_loss", text, losses, "name", "kind")
    yield counter("fedpipe_rounds_total", "Rounds that ended.", meter.rounds, "purpose", "outcome")
    yield histogram("fedpipe_round_seconds", "Length of rounds that ended.", meter.round_s, "purpose")
    text = "From a round's last update, or its deadline, to the version made of it."
    yield histogram("fedpipe_aggregation_seconds", text, {(): meter.fold_s})
    yield counter(
        "fedpipe_shares_total", "Shares of ended rounds, by how they ended.", meter.shares, "purpose", "state"
    )
    text = "Energy of devices that trained, of ended rounds, by how it is known."
    yield counter("fedpipe_energy_joules_total", text, meter.energy_j, "source")
    text = "Time that agents were at work on shares of ended rounds, by how their energy is known."
    yield counter("fedpipe_work_seconds_total", text, meter.work_s, "energy")
    yield counter("fedpipe_updates_total", "Updates by what became of them.", meter.updates, "outcome")


def _shares(jobs: dict[str, JobState]) -> dict[tuple[str, ...], float]:
    found: Counter[tuple[str, ...]] = Counter()
    for name, job in jobs.items():
        for share in job.round.shares.values() if job.round else ():
            found[name, "open" if share.state not in TERMINAL else str(share.state).lower()] += 1
    return {labels: float(n) for labels, n in found.items()}


def _of_messages(coordinator: Coordinator) -> Iterator[Metric]:
    meter, exchange = coordinator.meter, coordinator.exchange
    yield gauge("fedpipe_bus_connected", "1 while there is a broker.", float(coordinator.connected))
    yield counter("fedpipe_bus_connects_total", "Connections that the broker welcomed.", meter.n_connects)
    refused = {(kind,): float(n) for kind, n in coordinator.intake.gate.counts.items()}
    yield counter("fedpipe_messages_rejected_total", "Messages that were not taken in.", refused, "kind")
    wrongs = {(kind,): float(n) for kind, n in coordinator.fleet.state.counts.items()}
    text = "What agents said twice, too late or wrongly, over all lives of this coordinator."
    yield counter("fedpipe_agent_faults_total", text, wrongs, "kind")
    text = "Bytes of updates, by the bus or by an object store."
    yield counter("fedpipe_received_bytes_total", text, _by_route(exchange.pulling.received_bytes), "route")
    text = "Bytes of models, by the bus or by an object store."
    yield counter("fedpipe_sent_bytes_total", text, _by_route(exchange.sent_bytes), "route")
    yield gauge(
        "fedpipe_store_usable",
        "0 while an object store is left alone, and bulk goes by the bus.",
        float(not exchange.way.fault),
    )
    yield counter("fedpipe_events_total", "Facts that were journalled and handled.", meter.n_events)
    yield gauge("fedpipe_inbox_events", "Facts that wait to be journalled.", float(len(coordinator.inbox)))
    commits = {(): coordinator.inbox.commit_s}
    yield histogram("fedpipe_journal_commit_seconds", "Commits of the journal, until they are durable.", commits)
    lag = {(): coordinator.health.lag_s}
    yield histogram("fedpipe_event_loop_lag_seconds", "How late the loop comes to itself, once a second.", lag)
    yield gauge("fedpipe_healthy", "1 while the watchdog is fed.", float(not coordinator.health.fault))


def _by_route(n_bytes: dict[str, int]) -> dict[tuple[str, ...], float]:
    return {(route,): float(n) for route, n in n_bytes.items()}


def _of_disk(coordinator: Coordinator) -> Iterator[Metric]:
    now = {(str(state),): float(coordinator.disk.state is state) for state in DiskState}
    yield gauge("fedpipe_disk_state", "1 for the state that the disk is in.", now, "state")
    with suppress(OSError):
        free_bytes = float(shutil.disk_usage(coordinator.folder).free)
        yield gauge("fedpipe_disk_free_bytes", "Free space for the state folder.", free_bytes)


def _of_trust(coordinator: Coordinator) -> Iterator[Metric]:
    trust, ends = coordinator.trust, {}
    if trust is None:
        return
    authority = trust.office.authority
    ends["authority",] = authority.ends_at
    if authority.predecessor:
        ends["predecessor",] = authority.predecessor.not_valid_after_utc.timestamp()
    for name in ("coordinator", "https"):
        with suppress(OutsideFault):
            place = trust.folder / f"{name}.pem"
            ends[name,] = keys.load_certificate(keys.read(place), str(place)).not_valid_after_utc.timestamp()
    yield gauge("fedpipe_certificate_expiry_timestamp_seconds", "When certificates end.", ends, "certificate")
    yield gauge("fedpipe_agents_barred", "Agents that asked to enrol and are not accepted.", float(len(trust.barred)))
