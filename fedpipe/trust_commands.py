"""The commands about who is who: token, enrol, enrolments, accept, reject, revoke, mosquitto-config."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedpipe.asking import DEFAULT_URL, Json, TokenFile, Url, coordinator_at, print_answer
from protocol.errors import BadConfig

if TYPE_CHECKING:
    from rich.table import Table

    from coordinator.trust.desk import EnrolmentView

app = typer.Typer()

AgentId = Annotated[str, typer.Argument(metavar="ID", help="The agent's id.")]
Reason = Annotated[str, typer.Option(help="Why; `fedpipe enrolments` shows it, and who is rejected reads it.")]
DECISIONS: Final = {
    "accept": "Let a server in that has asked.",
    "reject": "Send a server away that has asked.",
    "revoke": "Take an agent's certificates back: it is out at once, and its share of a round ends.",
}
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def seconds(text: str) -> float:
    """`90s`, `30m`, `24h` or `7d` as seconds.  Raises BadConfig."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", text.strip())
    if not found:
        raise BadConfig(f"{text!r} is no duration: write it as 30m, 24h or 7d")
    return float(found[1]) * _UNITS[found[2]]


@app.command()
def token(
    agent: Annotated[str, typer.Option(metavar="ID", help="For this agent only; it may replace an enrolment.")] = "",
    uses: Annotated[int, typer.Option(min=1, help="For how many servers.")] = 1,
    ttl: Annotated[str, typer.Option(metavar="DURATION", help="How long it can be used, as in 30m, 24h, 7d.")] = "24h",
    auto_accept: Annotated[
        bool, typer.Option("--auto-accept", help="Who has it need not be accepted by hand.")
    ] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Make a join token: a server that has it may ask to become an agent."""
    with coordinator_at(url, token_file) as coordinator:
        made = coordinator.make_token(agent, uses, seconds(ttl), auto_accept=auto_accept)
    name = f" --agent {agent}" if agent else " --agent ID"
    if not as_json:
        _tell(f"On the server: fedpipe enrol {made.url} --token TOKEN{name}")
    print_answer(made, made.token, as_json=as_json)


@app.command()
def enrol(
    url: Annotated[str, typer.Argument(metavar="URL", help="The coordinator, as in https://coordinator:8443.")],
    token: Annotated[
        str, typer.Option(envvar="FEDPIPE_JOIN_TOKEN", metavar="TOKEN", help="Made by `fedpipe token`.")
    ] = "",
    agent: Annotated[str, typer.Option(metavar="ID", help="What this server shall be called.")] = "",
    config: Annotated[Path, typer.Option(metavar="FILE", help="The agent's configuration.")] = Path(
        "/etc/fedpipe/agent.toml"
    ),
    state_dir: Annotated[Path, typer.Option(metavar="DIR", help="The agent's folder.")] = Path(
        "/var/lib/fedpipe-agent"
    ),
    wait: Annotated[str, typer.Option(metavar="DURATION", help="How long to wait to be accepted.")] = "15m",
    again: Annotated[bool, typer.Option("--again", help="Replace the identity that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Make this server an agent: key, certificate, configuration."""
    from fedpipe.enrolling import Place, enrol
    from protocol.enrolment import parse_token

    if not token:
        raise BadConfig("a join token is needed: --token, or FEDPIPE_JOIN_TOKEN; `fedpipe token` makes one")
    place = Place(config.absolute(), state_dir.absolute())
    done = enrol(url.rstrip("/"), parse_token(token), agent, place, _tell, seconds(wait), anew=again)
    days = (done.expires_at - time.time()) / 86_400
    text = (
        f"{done.agent} is an agent of fleet {done.fleet}; its certificate lasts {days:.0f} days and is renewed by itself.\n"
        f"Next: name data and base models in {done.config}, then: systemctl enable --now fedpipe-agent"
    )
    print_answer(done._asdict(), text, as_json=as_json)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


@app.command()
def enrolments(url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """List who asked to be an agent, and what became of it."""
    with coordinator_at(url, token_file) as coordinator:
        found = coordinator.enrolments()
    nobody = "nobody has asked yet: `fedpipe token` makes a token, `fedpipe enrol` on a server uses it"
    print_answer(found, _table(found) if found else nobody, as_json=as_json)


def _decision(what: str) -> Callable[..., None]:
    def decide(
        agent: AgentId,
        reason: Reason = "",
        url: Url = DEFAULT_URL,
        token_file: TokenFile = None,
        as_json: Json = False,
    ) -> None:
        with coordinator_at(url, token_file) as coordinator:
            found = coordinator.decide(agent, what, reason)
        print_answer(found, f"{found.agent} is {found.state}", as_json=as_json)

    return decide


for _what, _text in DECISIONS.items():
    app.command(_what, help=_text)(_decision(_what))


@app.command("mosquitto-config")
def mosquitto_config(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to; the files name each other by this place.")],
    host: Annotated[list[str], typer.Option(metavar="NAME", help="The broker's DNS name or address; may be repeated.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 8883,
    config: Annotated[Path, typer.Option(metavar="FILE", help="The coordinator's configuration.")] = Path(
        "/etc/fedpipe/coordinator.toml"
    ),
) -> None:
    """Write mosquitto's configuration: TLS with client certificates, access by agent, revocations, limits."""
    from coordinator.config import CoordinatorConfig
    from coordinator.trust import mosquitto
    from coordinator.trust.command import audited
    from coordinator.trust.service import open_office
    from protocol.daemon import load_toml

    loaded = load_toml(config, CoordinatorConfig)
    office = open_office(loaded)
    try:
        with audited(loaded, "mosquitto-config", ", ".join(host)):
            mosquitto.write(out, office, host, port, time.time())
    finally:
        office.registry.close()
    folder = out.resolve()
    print(
        f"Written to {folder}.  Next:\n"
        f"  1. copy it: install -m 644 {folder}/mosquitto.conf /etc/mosquitto/conf.d/fedpipe.conf && systemctl restart mosquitto\n"
        f'  2. in {config}: broker.url = "mqtts://{host[0]}:{port}", and under [trust] broker_dir = "{folder}"\n'
        "  3. after a revocation mosquitto reads the files anew at SIGHUP: systemctl enable --now fedpipe-mosquitto-reload.path"
    )


def _table(found: list[EnrolmentView]) -> Table:
    from rich.table import Table

    table = Table("agent", "state", "since", "certificate", "from", "key", "reason", box=None, pad_edge=False)
    for one in found:
        since = one.decided_at or one.asked_at
        ends = f"{(one.expires_at - time.time()) / 86_400:.0f} days" if one.expires_at else "-"
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
        table.add_row(one.agent, str(one.state), day, ends, one.address, one.key[:16], one.reason)
    return table
