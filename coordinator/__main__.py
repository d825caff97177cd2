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
        case "check-config":
            config = load_toml(arguments.config, CoordinatorConfig)
            print(f"{arguments.config}: fleet {config.fleet!r}, broker {config.broker.url}: fine")
            return 0
    from coordinator.service import serve

    config = load_toml(arguments.config, CoordinatorConfig)
    set_up_logging(config.log_level)
    return run(lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main())
