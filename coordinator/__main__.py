"""The `fedpipe-coordinator` command: parsing only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from protocol.daemon import exit_code, load_toml, run, set_up_logging
from protocol.errors import BadConfig, OutsideFault


def main() -> int:
    """Run the coordinator, or check what it would be given."""
    parser = argparse.ArgumentParser(
        prog="fedpipe-coordinator", description="Plans and runs federated fine-tuning jobs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "run the daemon"), ("check-config", "check a configuration file")):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--config", type=Path, default=Path("/etc/fedpipe/coordinator.toml"), help="the configuration file"
        )
    plan = commands.add_parser("plan", help="plan a job for devices that are only described, without a broker")
    plan.add_argument("--devices", type=Path, required=True, help="TOML file of the model and the devices")
    plan.add_argument("--job", type=Path, help="job file to plan for; default: one that leaves everything open")
    plan.add_argument("--agent", help="explain this device's plan")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--svg", type=Path, help="also draw it into this file")
    again = commands.add_parser("replay", help="run what the journal holds again and compare it with what was recorded")
    again.add_argument("state_dir", type=Path, nargs="?", help="a state folder, also a copy; default: that of --config")
    again.add_argument(
        "--config", type=Path, default=Path("/etc/fedpipe/coordinator.toml"), help="the configuration file"
    )
    again.add_argument("--job", default="", help="whose round; may be left out where there is one job")
    again.add_argument("--round", type=int, help="tell the story of this round; default: compare all that is kept")
    again.add_argument("--json", action="store_true", help="print story and comparisons as JSON")
    check_job = commands.add_parser("check-job", help="check a job file")
    check_job.add_argument("job", type=Path, help="the job file")
    ca = commands.add_parser("ca", help="the fleet's certificate authority")
    ca.add_argument("what", choices=["init", "show", "rotate", "retire", "rotate-signing-key"], help="what to do")
    ca.add_argument("--config", type=Path, default=Path("/etc/fedpipe/coordinator.toml"), help="the configuration file")
    arguments = parser.parse_args()
    try:
        return _dispatch(arguments)
    except OutsideFault as error:
        print(f"fedpipe-coordinator: {error}", file=sys.stderr)
        return exit_code(error)


def _dispatch(arguments: argparse.Namespace) -> int:
    from coordinator.config import CoordinatorConfig

    match arguments.command:
        case "check-job":
            from coordinator.submission import read_job

            spec = read_job(arguments.job)
            print(f"{arguments.job}: job {spec.job.name!r} is fine")
            return 0
        case "ca":
            from coordinator.trust.command import authority

            print(authority(arguments.what, load_toml(arguments.config, CoordinatorConfig)))
            return 0
        case "plan":
            return _plan(arguments)
        case "replay":
            return _replay(arguments)
        case "check-config":
            config = load_toml(arguments.config, CoordinatorConfig)
            if config.bulk.url:
                from coordinator.bucket import Bucket

                Bucket(config.bulk)
            print(f"{arguments.config}: fleet {config.fleet!r}, broker {config.broker.url}: fine")
            return 0
    from coordinator.service import serve

    config = load_toml(arguments.config, CoordinatorConfig)
    set_up_logging(config.log_level)
    return run(lambda stop: serve(config, stop, arguments.config))


def _plan(arguments: argparse.Namespace) -> int:
    import msgspec
    from rich.console import Console

    from coordinator import plan_svg, plan_text
    from coordinator.past import Past
    from coordinator.plan_views import plan_view
    from coordinator.planner.devices import plan_devices
    from coordinator.submission import read_job

    job = plan_devices(arguments.devices, read_job(arguments.job) if arguments.job else None)
    assert job.plan is not None
    view = plan_view(job, job.plan, Past(), {}, 0.0)
    if arguments.agent and arguments.agent not in view.agents:
        why = view.left_out.get(arguments.agent) or f"there is {', '.join(sorted(view.agents))}"
        raise BadConfig(f"{arguments.agent} has no plan: {why}")
    if arguments.svg:
        try:
            arguments.svg.write_text(plan_svg.document(view, arguments.agent))
        except OSError as error:
            raise BadConfig(f"{arguments.svg} cannot be written: {error.strerror}") from None
    if arguments.json:
        print(msgspec.json.encode(view).decode())
        return 0
    console = Console()
    text = plan_text.agent_text(view, arguments.agent, console.width) if arguments.agent else None
    console.print(text or plan_text.fleet_text(view, console.width))
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    import msgspec
    from rich.console import Console

    from coordinator.config import CoordinatorConfig
    from coordinator.replay import replay
    from coordinator.replay_text import story
    from coordinator.store import Store

    folder, allowed = arguments.state_dir, []
    if folder is None:
        config = load_toml(arguments.config, CoordinatorConfig)
        folder, allowed = Path(config.state_dir), config.allow_methods
    if not (folder / "journal.sqlite").is_file():
        raise BadConfig(f"there is no {folder / 'journal.sqlite'}: name a coordinator's state folder, or its --config")
    if arguments.job and arguments.round is None:
        raise BadConfig("--job goes with --round N: which round of it?")
    store = Store(folder / "journal.sqlite", read_only=True)
    try:
        found = replay(store, folder / "blobs", job=arguments.job, number=arguments.round, allowed=allowed)
    finally:
        store.close()
    if arguments.json:
        print(msgspec.json.encode(msgspec.to_builtins(found) | {"equal": found.equal}).decode())
    else:
        Console().print(story(found, of_round=arguments.round is not None))
    return 0 if found.equal else 1


if __name__ == "__main__":
    sys.exit(main())
