"""The `fedpipe` command: what an operator says to a coordinator, and a whole fleet on one machine to try it out.

Parsing only; what takes long to import is imported by the command that needs it.  Whatever comes from outside (no coordinator,
a bad job file) is one line on stderr and an exit code that scripts and systemd understand; see protocol/daemon.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from coordinator.figures import plain
from protocol.daemon import exit_code
from protocol.errors import BadConfig, OutsideFault

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from coordinator.views import JobView
    from fedpipe.client import Coordinator

FAILED = 1


class _Commands(TyperGroup):
    """Turns a fault from outside into one line and its exit code."""

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
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tunes a large language model across private edge servers whose data never leave them.",
)

Url = Annotated[str, typer.Option("--url", envvar="FEDPIPE_URL", metavar="URL", help="Where the coordinator's API is.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", envvar="FEDPIPE_TOKEN_FILE", metavar="FILE", help="File with the API's token."),
]
Json = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
plan = typer.Typer(no_args_is_help=True, help="What the planner decided.")
app.add_typer(plan, name="plan")

DEFAULT_URL = "http://127.0.0.1:8470"


def _coordinator(url: str, token_file: Path | None) -> Coordinator:
    from fedpipe.client import Coordinator

    return Coordinator(url, token_file)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _print_json(value: object) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def _print(value: object, table: RenderableType, *, as_json: bool) -> None:
    if as_json:
        _print_json(value)
    elif isinstance(table, str):
        print(plain(table))
    else:
        _console().print(table)


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
        fleet = coordinator.fleet()
    _print(fleet.jobs, jobs_table(fleet.jobs, fleet.now), as_json=as_json)


@app.command()
def show(job: JobName, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Show one job: where it stands, its rounds, its versions."""
    from rich.console import Group

    from fedpipe.live import render
    from fedpipe.tables import versions_table

    with _coordinator(url, token_file) as coordinator:
        view, fleet = coordinator.job(job), coordinator.fleet()
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
        view = coordinator.plan(job)
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
        print(f"the job goes on: fedpipe watch {job} follows it, fedpipe cancel {job} ends it", file=sys.stderr)
        raise typer.Exit(130) from None
    if view.phase is not Phase.COMPLETED:
        raise typer.Exit(FAILED)


@app.command()
def cancel(job: JobName, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """End a job; its finished versions stay."""
    with _coordinator(url, token_file) as coordinator:
        ended = coordinator.cancel(job)
    _print(ended, f"{ended.name}: {ended.text}", as_json=as_json)


@app.command()
def export(
    job: JobName,
    version: Annotated[int | None, typer.Option(min=0, help="Which version; without it the newest.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; without it ./JOB-vN.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge it into its full-precision base model.")] = False,
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="The base model's folder, for --merge.")] = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Download an adapter as a PEFT folder, or the base model with the adapter merged into it."""
    from fedpipe.exporting import export_job

    if merge != (base is not None):
        raise BadConfig("merging needs the base model: give --merge and --base DIR together, or neither")
    with _coordinator(url, token_file) as coordinator:
        done = export_job(coordinator, job, version, out, base, quiet=as_json)
    _print(done, f"version {done.version} of {job} is in {done.folder}", as_json=as_json)


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
