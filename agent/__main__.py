"""The `fedpipe-agent` command: parsing only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from protocol.daemon import EX_CONFIG, load_toml, run, set_up_logging
from protocol.errors import BadConfig


def main() -> int:
    """Run the agent, or check its configuration."""
    parser = argparse.ArgumentParser(prog="fedpipe-agent", description="Trains adapters on this server's private data.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "run the daemon"), ("check-config", "check a configuration file")):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--config", type=Path, default=Path("/etc/fedpipe/agent.toml"), help="the configuration file"
        )
    arguments = parser.parse_args()
    from agent.config import AgentConfig

    try:
        config = load_toml(arguments.config, AgentConfig)
        set_up_logging(config.log_level)
    except BadConfig as error:
        print(f"fedpipe-agent: {error}", file=sys.stderr)
        return EX_CONFIG
    if arguments.command == "check-config":
        print(f"{arguments.config}: agent {config.agent!r} of fleet {config.fleet!r}, broker {config.broker.url}: fine")
        return 0
    from agent.service import serve

    return run(lambda stop: serve(config, stop, arguments.config))


if __name__ == "__main__":
    sys.exit(main())
