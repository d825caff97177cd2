"""The `fedpipe` command: what an operator says to a coordinator, and a whole fleet on one machine to try it out.

Parsing only; what takes long to import is imported by the command that needs it.  Whatever comes from outside (no coordinator,
a bad job file) is one line on stderr and an exit code that scripts and systemd understand; see protocol/daemon.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from coordinator.figures import plain
from fedpipe import auditing, steering_commands, trust_commands
from fedpipe.asking import DEFAULT_URL, JobName, Json, TokenFile, Url, Version
from fedpipe.asking import console as _console
from fedpipe.asking import coordinator_at as _coordinator
from fedpipe.asking import print_answer as _print
from fedpipe.asking import print_json as _print_json
from protocol.daemon import exit_code
from protocol.errors import BadConfig, OutsideFault

if TYPE_CHECKING:
    from coordinator.views import JobView
    from fedpipe.client import Coordinator

FAILED = 1


GROUPS: Final = {
    "Jobs": ("submit", "watch", "jobs", "show", "plan", "pause", "resume", "rollback", "cancel", "export", "merge"),
    "The fleet": ("agents", "token", "enrolments", "accept", "reject", "revoke", "audit"),
    "This machine": ("init", "enrol", "mosquitto-config", "doctor", "support-bundle", "version"),
    "Without a fleet": ("demo", "simulate", "broker"),
}
"""How the help is ordered; a command that stands nowhere here comes last."""


class _Commands(TyperGroup):
    """Orders the help, and turns a fault from outside into one line and its exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """See TyperGroup."""
        grouped = [name for names in GROUPS.values() for name in names if name in self.commands]
        return grouped + [name for name in super().list_commands(ctx) if name not in grouped]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """See TyperGroup."""
        found = super().get_command(ctx, cmd_name)
        if isinstance(found, (TyperCommand, TyperGroup)):
            found.rich_help_panel = next((group for group, names in GROUPS.items() if cmd_name in names), "More")
        return found

    def invoke(self, ctx: Any) -> Any:
        """See TyperGroup."""
        try:
            return super().invoke(ctx)
        except OutsideFault as error:
            print(f"fedpipe: {plain(str(error))}", file=sys.stderr)
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tunes a large language model across private edge servers whose data never leave them.",
)

plan = typer.Typer(no_args_is_help=True, help="What the planner decided.")
app.add_typer(plan, name="plan")
app.add_typer(steering_commands.app)
app.add_typer(trust_commands.app)
app.add_typer(auditing.app, name="audit")

# ----------------------------------------------------------------------------------------------------------------- jobs


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")],
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Hand in a job file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{file} cannot be read: {error}") from None
    with _coordinator(url, token_file) as coordinator:
        name = coordinator.submit(text)
        if as_json:
            _print_json({"name": name})
        elif not watch:
            print(f"{name} is submitted: fedpipe watch {name}")
        if watch:
            _follow(coordinator, name, as_json=as_json)


@app.command()
def jobs(url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """List all jobs."""
    from fedpipe.tables import jobs_table

    with _coordinator(url, token_file) as coordinator:
        fleet = coordinator.fleet(brief=True)
    _print(fleet.jobs, jobs_table(fleet.jobs, fleet.now), as_json=as_json)


@app.command()
def show(job: JobName, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Show one job: where it stands, its rounds, its versions."""
    from rich.console import Group

    from fedpipe.live import render
    from fedpipe.tables import versions_table

    with _coordinator(url, token_file) as coordinator:
        view, fleet = coordinator.job(job), coordinator.fleet(brief=True)
    picture = render(view, fleet, view.now, max_agents=1000, max_rounds=1000)
    _print(view, Group(picture, "", versions_table(view.versions)) if view.versions else picture, as_json=as_json)


@plan.command("show")
def show_plan(
    job: JobName,
    agent: Annotated[str | None, typer.Option(metavar="ID", help="One agent's plan, with its reasons.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the ranks as a picture.")] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Show who trains what, why, and how well the predictions hold."""
    from coordinator import plan_svg, plan_text

    with _coordinator(url, token_file) as coordinator:
        view = coordinator.plan(job, agent or "")
    one = plan_text.plan_of(view, agent) if agent else None
    if svg:
        _write(svg, plan_svg.document(view, agent))
    width = _console().width
    text = plan_text.agent_text(view, agent, width) if agent else plan_text.fleet_text(view, width)
    _print(one or view, text, as_json=as_json)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadConfig(
            f"{file} cannot be written: {error.strerror or error}; name a file in a folder of yours"
        ) from None


@app.command()
def agents(url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """List all agents and what their servers have to give."""
    from fedpipe.tables import agents_table

    with _coordinator(url, token_file) as coordinator:
        fleet = coordinator.fleet()
    _print(fleet.agents, agents_table(fleet.agents, fleet.now), as_json=as_json)


@app.command()
def watch(job: JobName, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Follow a job to its end; exit code 0 when it is completed, 1 when it failed or was cancelled."""
    with _coordinator(url, token_file) as coordinator:
        _follow(coordinator, job, as_json=as_json)


def _follow(coordinator: Coordinator, job: str, *, as_json: bool) -> None:
    from coordinator.core.state import Phase
    from fedpipe import watching

    try:
        if as_json:
            view: JobView = coordinator.job(job)
            for item in watching.follow(coordinator, job):
                _print_json(item)
            view = coordinator.job(job)
        else:
            view = watching.watch(coordinator, job, _console())
    except KeyboardInterrupt:
        print(f"the job stays as it is: fedpipe watch {job} follows it, fedpipe cancel {job} ends it", file=sys.stderr)
        raise typer.Exit(130) from None
    if view.phase is not Phase.COMPLETED:
        raise typer.Exit(FAILED)


@app.command()
def export(
    job: JobName,
    version: Version = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; without it ./JOB-vN.")] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Download an adapter as a PEFT folder."""
    from fedpipe.exporting import export_job

    with _coordinator(url, token_file) as coordinator:
        done = export_job(coordinator, job, version, out, None, quiet=as_json)
    _print(done, f"version {done.version} of {job} is in {done.folder}", as_json=as_json)


@app.command()
def merge(
    job: JobName,
    base: Annotated[Path, typer.Option(metavar="DIR", help="The full-precision base model's folder.")],
    version: Version = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; without it ./JOB-vN-merged.")] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Write the base model with an adapter merged into its weights."""
    from fedpipe.exporting import export_job

    with _coordinator(url, token_file) as coordinator:
        done = export_job(coordinator, job, version, out, base, quiet=as_json)
    _print(done, f"{base} with version {done.version} of {job} in it is in {done.folder}", as_json=as_json)


# ------------------------------------------------------------------------------------------------------- on one machine


@app.command()
def broker(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 1883,
) -> None:
    """Run the embedded MQTT broker: for trying things out, without authentication."""
    import asyncio

    try:
        from fedpipe.embedded import serve
    except ImportError:
        raise BadConfig("the embedded broker needs amqtt: pip install 'fedpipe[demo]'") from None
    asyncio.run(serve(host, port))


@app.command()
def demo(
    agents: Annotated[int, typer.Option(min=1, max=64, help="How many agents.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How many rounds.")] = 5,
    model: Annotated[
        str, typer.Option(metavar="DIR", help="A base model's folder; auto: a small one, made here.")
    ] = "auto",
    data: Annotated[
        str, typer.Option(metavar="DIR", help="A folder with one file per agent; auto: text found here.")
    ] = "auto",
    broker: Annotated[
        str, typer.Option(metavar="BROKER", help="embedded, mosquitto or mqtt://host:port.")
    ] = "embedded",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything is written.")] = Path("fedpipe-demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Same seed, same run.")] = 0,
    as_json: Json = False,
) -> None:
    """Run a broker, a coordinator and agents on this machine and fine-tune a model across them."""
    from fedpipe.demo import run_demo
    from fedpipe.demo_options import DemoOptions

    options = DemoOptions(
        agents=agents, rounds=rounds, model=model, data=data, broker=broker, out=out, seed=seed, json=as_json
    )
    raise typer.Exit(run_demo(options))


@app.command()
def simulate(
    agents: Annotated[int | None, typer.Option(min=1, max=100_000, help="How many; else the seed decides.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=1000, help="How many; else the seed decides.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which world; the same seed is the same history.")] = 1,
    seeds: Annotated[str, typer.Option(metavar="A-B", help="Many worlds on all cores, instead of one.")] = "",
    faults: Annotated[str, typer.Option(metavar="LEVEL", help="How much goes wrong: none, some or many.")] = "many",
    story: Annotated[Path, typer.Option(metavar="DIR", help="Where the story of a broken world is written.")] = Path(
        "fedpipe-simulate"
    ),
    as_json: Json = False,
) -> None:
    """Run whole fleets on virtual time, faults included, and check that nothing accepted is ever lost."""
    from rich.console import Console

    from fedpipe import simulating
    from fedpipe.simulation.scenario import Level

    if faults not in set(Level):
        raise BadConfig(f"--faults {faults}: say one of {', '.join(Level)}")
    options = simulating.SimulateOptions(
        seed=seed, seeds=seeds, agents=agents, rounds=rounds, faults=Level(faults), story=story
    )
    totals = simulating.simulate(options, Console(stderr=True))
    if as_json:
        _print_json(totals)
    else:
        print("\n".join(simulating.lines(totals, story)))
    if totals.broken:
        raise typer.Exit(FAILED)


# ------------------------------------------------------------------------------------------------------- this machine


@app.command()
def init(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="agent, coordinator or job.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; without it ./WHAT.toml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Write a configuration or a job file to begin with, filled in with what this machine says of itself."""
    from fedpipe import beginning

    done = beginning.begin(what, out, url, token_file, force=force)
    _print(done, beginning.told(done), as_json=as_json)


@app.command()
def doctor(
    role: Annotated[
        str, typer.Argument(metavar="ROLE", help="agent, coordinator or operator; without it what this machine is.")
    ] = "",
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The daemon's configuration.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Without torch, and only the beginning of the data.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Connect even if that throws out the daemon that runs, for a moment.")
    ] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Look for what is wrong on this machine, and say what to do next."""
    from fedpipe.doctor import command
    from fedpipe.doctor.roles import How

    found = command.reports(command.Asked(role, config, url, token_file, How(quick, take_over)))
    _print(found, command.text(found), as_json=as_json)
    raise typer.Exit(command.exit_code(found))


@app.command("support-bundle")
def support_bundle(
    role: Annotated[
        str, typer.Argument(metavar="ROLE", help="agent, coordinator or operator; without it what this machine is.")
    ] = "",
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The daemon's configuration.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; without it ./fedpipe-support-*.")] = None,
    log: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A log that journald does not have; may be repeated.")
    ] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Pack what somebody far away needs to help: no secrets, no training text, no adapters."""
    from fedpipe import bundling
    from fedpipe.doctor.command import Asked
    from fedpipe.doctor.roles import How

    done = bundling.bundle(Asked(role, config, url, token_file, How(quick=True)), out, log or [])
    _print(done, bundling.told(done), as_json=as_json)


@app.command()
def version(as_json: Json = False) -> None:
    """Say which version this is."""
    from importlib.metadata import version as of

    _print({"version": of("fedpipe")}, f"fedpipe {of('fedpipe')}", as_json=as_json)


def main() -> NoReturn:
    """The console script."""
    app()
    raise AssertionError("typer leaves by SystemExit")


if __name__ == "__main__":
    main()
