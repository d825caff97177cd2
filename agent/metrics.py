"""What an agent tells Prometheus, on an address of its own: what it does, what it owes, how its server is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from protocol import SOFTWARE
from protocol.metrics import Histogram, counter, gauge, histogram

if TYPE_CHECKING:
    from prometheus_client import Metric

    from agent.daemon import Agent

STEP_BOUNDS_S: Final = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
LEVELS: Final = ("run", "shrink", "pause", "stop")


class StepClock:
    """Seconds of single steps, from a training child's seconds since its phase began."""

    def __init__(self) -> None:
        self.step_s = Histogram(*STEP_BOUNDS_S)
        self._step, self._at_s = 0, 0.0

    def stepped(self, step: int, at_s: float) -> None:
        """Step number `step` was complete `at_s` into the phase; several reports of one step count as one."""
        if step < self._step or at_s < self._at_s:  # another phase
            self._step, self._at_s = 0, 0.0
        for _ in range(min(step - self._step, 1000)):
            self.step_s.observe((at_s - self._at_s) / (step - self._step))
        if step > self._step:
            self._step, self._at_s = step, at_s


def families(agent: Agent) -> Iterator[Metric]:
    """Every figure of one scrape.  Call it in the event loop."""
    name = {(SOFTWARE, agent.config.fleet, agent.config.agent): 1.0}
    yield gauge("fedpipe_agent_info", "Constant 1; who this is.", name, "software", "fleet", "agent")
    yield from _of_training(agent)
    yield from _of_bus(agent)
    yield from _of_host(agent)
    if agent.door.identity is not None:
        ends = {("agent",): agent.door.identity.expires_at}
        yield gauge("fedpipe_certificate_expiry_timestamp_seconds", "When certificates end.", ends, "certificate")


def _of_training(agent: Agent) -> Iterator[Metric]:
    progress = agent.training.progress
    yield gauge(
        "fedpipe_agent_phase", "1 for what is being done.", {(progress.job, progress.phase): 1.0}, "task", "phase"
    )
    if progress.job:
        yield gauge("fedpipe_training_round", "Round of the share at work.", float(progress.round))
        yield gauge("fedpipe_training_step", "Steps done of the share at work.", float(progress.step))
        yield gauge("fedpipe_training_steps", "Steps of the share at work.", float(progress.n_steps))
        if progress.loss is not None:
            yield gauge("fedpipe_training_loss", "Loss per token of the present step.", progress.loss)
    steps = {(): agent.training.steps.step_s}
    yield histogram("fedpipe_training_step_seconds", "Length of steps, measuring included.", steps)
    yield gauge("fedpipe_training_child_up", "1 while there is a training child.", float(agent.training.supervisor.pid is not None))  # fmt: skip
    yield gauge("fedpipe_outbox_updates", "Finished updates that nobody has taken.", float(len(agent.core.outbox)))
    owed = float(sum(offer.blob.size for offer in agent.core.owed))
    yield gauge("fedpipe_outbox_bytes", "Size of finished updates that nobody has taken.", owed)


def _of_bus(agent: Agent) -> Iterator[Metric]:
    yield gauge("fedpipe_bus_connected", "1 while there is a broker.", float(agent.connected))
    yield counter("fedpipe_bus_connects_total", "Connections that the broker welcomed.", float(agent.n_connects))
    refused = {(kind,): float(n) for kind, n in agent.refused.items()}
    yield counter("fedpipe_messages_rejected_total", "Messages that were not taken in.", refused, "kind")
    text = "Bytes of models, by the bus or by an object store."
    yield counter(
        "fedpipe_received_bytes_total", text, _by_route(agent.traffic.exchange.pulling.received_bytes), "route"
    )
    text = "Bytes of updates, by the bus or by an object store."
    yield counter("fedpipe_sent_bytes_total", text, _by_route(agent.traffic.exchange.sent_bytes), "route")
    lag = {(): agent.health.lag_s}
    yield histogram("fedpipe_event_loop_lag_seconds", "How late the loop comes to itself, once a second.", lag)
    yield gauge("fedpipe_healthy", "1 while the watchdog is fed.", float(not agent.health.fault))


def _by_route(n_bytes: dict[str, int]) -> dict[tuple[str, ...], float]:
    return {(route,): float(n) for route, n in n_bytes.items()}


def _of_host(agent: Agent) -> Iterator[Metric]:
    now = agent.resources.host.verdict.level
    levels = {(level,): float(level == now) for level in LEVELS}
    yield gauge("fedpipe_host_level", "1 for how far training gives way to the host.", levels, "level")
    for name, text, field in (
        ("fedpipe_gpu_memory_bytes", "Memory of a GPU.", "total_bytes"),
        ("fedpipe_gpu_memory_free_bytes", "Free memory of a GPU.", "free_bytes"),
        ("fedpipe_gpu_power_watts", "What a GPU draws.", "power_w"),
        ("fedpipe_gpu_temperature_celsius", "How hot a GPU is.", "temperature_c"),
    ):
        found = {(str(gpu.index), gpu.name): float(getattr(gpu, field)) for gpu in agent.resources.report.gpus}
        yield gauge(name, text, found, "gpu", "model")
    yield gauge(
        "fedpipe_ram_available_bytes", "Memory that is available.", float(agent.resources.report.ram_available_bytes)
    )
    with suppress(OSError):
        free_bytes = float(shutil.disk_usage(agent.folder).free)
        yield gauge("fedpipe_disk_free_bytes", "Free space for the state folder.", free_bytes)
