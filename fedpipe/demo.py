"""`fedpipe demo`: the whole product on one machine, on real input, in a few minutes.

A broker, a coordinator and the agents run as processes of their own, exactly as they would on servers; this program writes
their configuration, submits a job over the API, shows what the API says, and at the end compares what came out with the base
and with what each agent would have reached alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.progress import Progress

from agent.data import DataConfig
from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec
from coordinator.core.state import ENDED, Phase
from coordinator.plan_views import PlanView
from coordinator.views import FleetView, JobView
from fedpipe import stage
from fedpipe.alone import Alone, shares_of, train_alone
from fedpipe.broker import embedded_command, free_port, mosquitto_command
from fedpipe.client import Coordinator
from fedpipe.cluster import Cluster, port_open
from fedpipe.completions import complete
from fedpipe.demo_options import DemoOptions
from fedpipe.live import render
from fedpipe.outcome import Report
from fedpipe.report import terminal, write_report
from fedpipe.summary import summarise
from fedpipe.unpacking import unpack
from protocol.bus import parse_url
from protocol.errors import Unavailable

EX_INTERRUPTED: Final = 130
START_S: Final = 60.0
LOOK_S: Final = 0.4
LOST_S: Final = 120.0
"""The coordinator may be away this long (killed and started again) before the demo gives up."""


class End(NamedTuple):
    """How the job ended: what the API last said (no plan unless it is completed), and what happened to the processes."""

    job: JobView
    fleet: FleetView
    plan: PlanView | None
    notes: list[tuple[float, str]]


def run_demo(options: DemoOptions) -> int:
    """Run the demo and write its report; the exit code.  Raises BadConfig or Unavailable with what to do."""
    console = Console(stderr=options.json)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        return _run(options, console)
    except KeyboardInterrupt:
        console.print(f"stopped; what there is lies below {options.out}")
        return EX_INTERRUPTED


def _run(options: DemoOptions, console: Console) -> int:
    began = time.monotonic()
    log = options.out / "libraries.log"
    with stage.progress_bar(console) as bar, stage.hushed(log):
        data = stage.private_text(options, bar)
        base = stage.base_model(options, bar)
    text, spec = stage.job_file(options, base, data)
    (options.out / "job.toml").write_text(text, encoding="utf-8")
    end = asyncio.run(_federate(options, console, spec, text, base, data))
    if end.plan is None:
        raise Unavailable(f"the job ended as {end.job.text}; the logs are below {options.out / 'run'}")
    adapter = _take_adapter(options)
    with stage.progress_bar(console) as bar, stage.hushed(log):
        shares = shares_of(end.plan, end.job.history, spec.round.n_rounds)
        alone = asyncio.run(_compare(options, spec, shares, base, data, bar))
        task = bar.add_task("completing three held-out prompts", total=1)
        samples = complete(base, adapter, data, spec.job.seed, spec.evaluate.held_out_ratio)
        bar.update(task, completed=1)
    wall_s = time.monotonic() - began
    report = summarise(options, end.job, end.plan, alone, samples, end.notes, adapter, wall_s)
    files = write_report(report, options.out)
    picture = _picture(options, end, report)
    if options.json:
        sys.stdout.write(files.json.read_text(encoding="utf-8") + "\n")
    else:
        terminal(report, console)
        console.print(f"report: {files.html}    loss curves: {files.png}    this picture: {picture}")
    return 0


def _picture(options: DemoOptions, end: End, report: Report) -> Path:
    """What the terminal showed, as a picture for those who were not there."""
    path = options.out / "demo.svg"
    recorded = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    recorded.print(render(end.job, end.fleet, end.fleet.now))
    terminal(report, recorded)
    recorded.save_svg(str(path), title="fedpipe demo")
    return path


# --------------------------------------------------------------------------------------------------------- the fleet


async def _federate(
    options: DemoOptions, console: Console, spec: JobSpec, text: str, base: Path, data: Mapping[str, DataConfig]
) -> End:
    """Start the fleet, run the job to its end, stop the fleet."""
    cluster = Cluster(options.out / "run")
    if cluster.folder.exists():
        shutil.rmtree(cluster.folder)
    try:
        url = await _broker(options, cluster)
        port = free_port()
        await cluster.add_daemon("coordinator", "coordinator", _coordinator_config(cluster, url, port))
        for (agent, found), limits in zip(data.items(), itertools.cycle(stage.VARIETY), strict=False):
            config = _agent_config(cluster, url, agent, found, base) | {"limits": limits}
            await cluster.add_daemon("agent", agent, config)
        await port_open("127.0.0.1", port, START_S, "the coordinator")
        with Coordinator(f"http://127.0.0.1:{port}") as client:
            await asyncio.to_thread(client.submit, text)
            job, fleet = await _watch(client, cluster, console, spec, quiet=options.json)
            plan = None
            if job.phase is Phase.COMPLETED:
                await asyncio.to_thread(client.adapter, stage.JOB, None, options.out / "adapter.tar")
                plan = await asyncio.to_thread(client.plan, stage.JOB)
        return End(job, fleet, plan, list(cluster.notes))
    finally:
        await cluster.stop()


async def _broker(options: DemoOptions, cluster: Cluster) -> str:
    """Start the broker that was asked for, or find the given one; its url."""
    if options.broker not in {"embedded", "mosquitto"}:
        address = parse_url(options.broker)
        await port_open(address.host, address.port, 10.0, f"the broker {address}")
        return options.broker
    port = free_port()
    folder = cluster.folder / "broker"
    folder.mkdir(parents=True, exist_ok=True)
    embedded = options.broker == "embedded"
    await cluster.add("broker", embedded_command(port) if embedded else mosquitto_command(port, folder))
    await port_open("127.0.0.1", port, START_S, "the broker")
    return f"mqtt://127.0.0.1:{port}"


def _coordinator_config(cluster: Cluster, url: str, port: int) -> dict[str, object]:
    return {
        "fleet": "demo",
        "state_dir": str((cluster.folder / "coordinator" / "state").resolve()),
        "broker": {"url": url, "reconnect_max_s": 5.0},
        "web": {"port": port},
        "heartbeat_s": 5.0,
    }


def _agent_config(cluster: Cluster, url: str, agent: str, data: DataConfig, base: Path) -> dict[str, object]:
    return {
        "agent": agent,
        "fleet": "demo",
        "state_dir": str((cluster.folder / agent / "state").resolve()),
        "broker": {"url": url, "reconnect_max_s": 5.0},
        "heartbeat_s": 5.0,
        "progress_s": 0.5,
        "data": {"default": {"path": data.path}},
        "base": {"model_dirs": [str(base.parent)]},
        "child": {"threads": 1},
    }


# ---------------------------------------------------------------------------------------------------------- the view


async def _watch(
    client: Coordinator, cluster: Cluster, console: Console, spec: JobSpec, *, quiet: bool
) -> tuple[JobView, FleetView]:
    """Show the job until it ends.  A coordinator that is away for a moment is waited for.  Raises Unavailable."""
    live = Live(console=console, refresh_per_second=4, transient=False)
    known: JobView | None = None
    n_told, seen_at = 0, time.monotonic()
    show = console.is_terminal and not quiet
    with live if show else contextlib.nullcontext():
        while True:
            if cluster.fault:
                raise cluster.fault
            try:
                job, fleet = await asyncio.to_thread(_look, client, spec.job.name, known)
            except Unavailable:
                if time.monotonic() - seen_at > LOST_S:
                    raise
                await asyncio.sleep(LOOK_S)
                continue
            seen_at, known = time.monotonic(), job
            if show:
                live.update(render(job, fleet, fleet.now))
            else:
                n_told = _tell(console, job, n_told)
            if job.phase in ENDED:
                return job, fleet
            await asyncio.sleep(LOOK_S)


def _look(client: Coordinator, name: str, known: JobView | None) -> tuple[JobView, FleetView]:
    return client.job(name, known), client.fleet(brief=True)


def _tell(console: Console, job: JobView, n_told: int) -> int:
    """One line per round that ended since the last time, for logs and pipes."""
    for record in job.history[n_told:]:
        done = sum(share.state == "DONE" for share in record.shares.values())
        loss = f", training loss {record.loss:.3f}" if record.loss is not None else ""
        console.print(
            f"round {record.round} ({record.purpose}): {record.outcome}, {done} of {len(record.shares)} agents, "
            f"{record.wall_s:.1f} s{loss}"
        )
    return len(job.history)


# --------------------------------------------------------------------------------------------------------- afterwards


def _take_adapter(options: DemoOptions) -> Path:
    """Unpack the downloaded adapter as a PEFT directory."""
    folder = options.out / "adapter"
    if folder.exists():
        shutil.rmtree(folder)
    unpack(options.out / "adapter.tar", folder)
    (options.out / "adapter.tar").unlink()
    return folder


async def _compare(
    options: DemoOptions,
    spec: JobSpec,
    shares: Mapping[str, Choice],
    base: Path,
    data: Mapping[str, DataConfig],
    bar: Progress,
) -> list[Alone]:
    """What each agent reaches alone, for the same steps."""
    tasks = {agent: bar.add_task(f"for comparison: {agent} alone", total=None) for agent in shares}

    def heard(agent: str, step: int, of: int) -> None:
        bar.update(tasks[agent], completed=step, total=of)

    return await train_alone(spec, shares, base, data, options.out / "run" / "alone", heard)
