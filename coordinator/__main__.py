"""The `fedpipe-coordinator` command: parsing only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from protocol.daemon import EX_CONFIG, load_toml, run, set_up_logging
from protocol.errors import BadConfig


def main() -> int:
    """Run the coordinator, or check what it would be given."""
    parser = argparse.ArgumentParser(
        prog="fedpipe-coordinator", description="Plans and runs federated fine-tuning jobs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "run the daemon"), ("check-config", "check a configuration file")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, default=Path("/etc/fedpipe/coordinator.toml"))
    plan = commands.add_parser("plan", help="plan a job for devices that are only described, without a broker")
    plan.add_argument("--devices", type=Path, required=True, help="TOML file of the model and the devices")
    plan.add_argument("--job", type=Path, help="job file to plan for; default: one that leaves everything open")
    plan.add_argument("--agent", help="explain this device's plan")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--svg", type=Path, help="also draw it into this file")
    check_job = commands.add_parser("check-job", help="check a job file")
    check_job.add_argument("job", type=Path)
    arguments = parser.parse_args()
    try:
        return _dispatch(arguments)
    except BadConfig as error:
        print(f"fedpipe-coordinator: {error}", file=sys.stderr)
        return EX_CONFIG


def _dispatch(arguments: argparse.Namespace) -> int:
    from coordinator.config import CoordinatorConfig

    match arguments.command:
        case "check-job":
            from coordinator.submission import read_job

            spec = read_job(arguments.job)
            print(f"{arguments.job}: job {spec.job.name!r} is fine")
            return 0
        case "plan":
            return _plan(arguments)
        case "check-config":
            config = load_toml(arguments.config, CoordinatorConfig)
            print(f"{arguments.config}: fleet {config.fleet!r}, broker {config.broker.url}: fine")
            return 0
    from coordinator.service import serve

    config = load_toml(arguments.config, CoordinatorConfig)
    set_up_logging(config.log_level)
    return run(lambda stop: serve(config, stop))


def _plan(arguments: argparse.Namespace) -> int:
    import msgspec
    from rich.console import Console

    from coordinator import plan_svg, plan_text
    from coordinator.plan_views import plan_view
    from coordinator.planner.devices import plan_devices
    from coordinator.submission import read_job

    job = plan_devices(arguments.devices, read_job(arguments.job) if arguments.job else None)
    assert job.plan is not None
    view = plan_view(job, job.plan, [], 0.0)
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


if __name__ == "__main__":
    sys.exit(main())
