"""Which looks belong to which role: an agent's server, the coordinator's, and wherever an operator sits."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from agent.config import AgentConfig
from coordinator.config import CoordinatorConfig
from fedpipe.doctor import api, machine, network, session, training
from fedpipe.doctor.findings import Finding, Series, failed, ok, skipped, warning
from protocol.bus import BrokerConfig
from protocol.daemon import load_toml
from protocol.errors import BadConfig

Role = Literal["agent", "coordinator", "operator"]
CONFIGS: Final[dict[str, Path]] = {
    "agent": Path("/etc/fedpipe/agent.toml"),
    "coordinator": Path("/etc/fedpipe/coordinator.toml"),
}
BRIEF_S: Final = 30.0
BROKER_S: Final = 90.0


class How(NamedTuple):
    """How closely to look: `quick` leaves out torch and most of the data, `take_over` disturbs a daemon that runs."""

    quick: bool = False
    take_over: bool = False


def agent(config: AgentConfig, place: Path, how: How) -> list[Series]:
    """An agent's server."""
    broker, identity = config.broker, Path(config.identity_dir) if config.identity_dir else None
    name = config.agent if identity or broker.cert_file else ""
    # An enrolled agent's clock is compared with that of the coordinator's own answer.
    heard = session.HEARD[:1] if identity else session.HEARD
    series = [
        Series(
            ("configuration", "user"), lambda: _introduced(f"agent {config.agent} of fleet {config.fleet}, {place}")
        ),
        _broker(broker, heard, lambda: _agent_session(config, identity, how)),
        Series(("certificate",), lambda: network.own_certificate(broker.cert_file, name)),
        Series(("private-files",), lambda: machine.private(_private(broker, identity))),
        Series(("state-dir", "disk"), lambda: machine.state_dir(Path(config.state_dir), 2**28)),
        Series(("memory", "open-files"), machine.memory),
        Series(("gpu",), lambda: training.gpu(config.device), 60.0),
        Series(("models",), lambda: training.models(config.base)),
        Series(("data",), lambda: training.data(config, quick=how.quick), training.READ_S + 30),
        Series(("service",), lambda: machine.service("fedpipe-agent")),
    ]
    if identity:
        series.append(Series(("identity", "enrolment", "clock"), lambda: _identity(config, identity), BRIEF_S))
    if not how.quick:
        series.append(Series(training.TORCH, lambda: training.torch(config.device), training.TORCH_S + 10))
    return series


def coordinator(config: CoordinatorConfig, place: Path, how: How) -> list[Series]:
    """The coordinator's server."""
    folder, web = Path(config.state_dir), config.web
    trust = _trust(config)
    broker = _own(config.broker, trust)
    secrets = [web.token_file, broker.password_file, broker.key_file or broker.cert_file]
    secrets += [str(file) for file in (trust / "ca.key", trust / "ca-old.key") if file.exists()]
    return [
        Series(("configuration", "user"), lambda: _introduced(f"coordinator of fleet {config.fleet}, {place}")),
        _broker(broker, (), lambda: _coordinator_session(config, broker, how)),
        Series(("certificate",), lambda: network.own_certificate(broker.cert_file, "")),
        Series(("authority",), lambda: _authority(trust)),
        Series(("bulk",), lambda: _bulk(config), BRIEF_S),
        Series(("private-files",), lambda: machine.private(secrets)),
        Series(("state-dir", "disk"), lambda: machine.state_dir(folder, config.keep.min_free_bytes)),
        Series(("memory", "open-files"), machine.memory),
        Series(("service",), lambda: machine.service("fedpipe-coordinator")),
        Series(api.CHECKS, lambda: api.coordinator(*api_of(config))),
    ]


def operator(url: str, token_file: Path | None) -> list[Series]:
    """Wherever an operator sits."""
    return [
        Series(("private-files",), lambda: machine.private([str(token_file or "")])),
        Series(api.CHECKS, lambda: api.coordinator(url, token_file)),
    ]


def api_of(config: CoordinatorConfig) -> tuple[str, Path | None, Path | None]:
    """Where the API is (what a coordinator that runs has written, else what is configured), its token, its authority."""
    authority = _trust(config) / "ca.pem"
    token_file = Path(config.web.token_file) if config.web.token_file else None
    try:
        url = msgspec.json.decode((Path(config.state_dir) / "api.json").read_bytes(), type=_Place).url
    except (OSError, msgspec.MsgspecError):
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.web.host, config.web.host)  # noqa: S104
        url = f"http://{host}:{config.web.port}"
    return url, token_file, authority if authority.exists() else None


def _authority(trust: Path) -> Iterator[Finding]:
    """Finding authority: how long everything that it issued can be verified."""
    from coordinator.trust.authority import DAY_S, SOON_S, Authority

    if not (trust / "ca.pem").exists():
        yield skipped("authority", "there is none", "`fedpipe-coordinator ca init` makes one")
        return
    found = Authority.load(trust)
    left_s = found.ends_at - time.time()
    text = f"{found.fingerprint[:16]}, for {left_s / DAY_S:.0f} days"
    if found.predecessor:
        text += "; the one before it is trusted as well"
    if left_s <= 0:
        yield failed("authority", f"it has ended: {text}", "begin anew with `fedpipe-coordinator ca init` elsewhere")
    elif left_s < SOON_S:
        yield warning("authority", text, "`fedpipe-coordinator ca rotate`: every agent must renew once before its end")
    else:
        yield ok("authority", text)


def _bulk(config: CoordinatorConfig) -> Iterator[Finding]:
    """Finding bulk: whether the object store does what is asked of it."""
    from coordinator.bucket import Bucket, prove

    if not config.bulk.url:
        yield skipped("bulk", "models and updates go over the broker")
        return
    bucket = Bucket(config.bulk)
    began_s = time.monotonic()
    asyncio.run(prove(bucket, f"doctor-{secrets.token_hex(8)}"))
    text = f"{config.bulk.url} takes, gives and deletes an object in {1000 * (time.monotonic() - began_s):.0f} ms"
    if bucket.plain_hosts - {"127.0.0.1", "::1", "localhost"}:
        advice = "write https:// in bulk.endpoint, or name it in limits.http_hosts of every agent"
        yield warning("bulk", f"{text}, but without TLS, where no agent follows", advice)
    else:
        yield ok("bulk", text)


def _trust(config: CoordinatorConfig) -> Path:
    return Path(config.trust.dir) if config.trust.dir else Path(config.state_dir) / "trust"


class _Place(msgspec.Struct):
    url: str


def _introduced(who: str) -> Iterator[Finding]:
    yield ok("configuration", who)
    yield from machine.user()


# ------------------------------------------------------------------------------------------------------------- broker


def _broker(config: BrokerConfig, heard: tuple[str, ...], looks: Callable[[], Iterator[Finding]]) -> Series:
    def both() -> Iterator[Finding]:
        for finding in network.way(config):
            yield finding
            if finding.status == "failed":
                return
        yield from looks()

    return Series((*network.CHECKS, *session.CHECKS, *heard), both, BROKER_S)


def _agent_session(config: AgentConfig, identity: Path | None, how: How) -> Iterator[Finding]:
    client_id = config.agent
    if not how.take_over and machine.runs("fedpipe-agent", "agent", lambda place: _is_same(place, config)):
        if config.broker.cert_file:
            yield from _left_alone()
            return
        client_id = f"{config.agent}-doctor"
    opened = None
    if identity:
        from agent.identity import Identity
        from protocol.messages import CoordinatorState
        from protocol.signing import Verifier

        verifier = Verifier(Identity(identity).trust.signing_keys)
        opened = lambda topic, payload: verifier.open(topic, payload, 0.0, CoordinatorState)  # noqa: E731
    guest = session.as_agent(config.fleet, config.agent, client_id, opened)
    found = session.session(config.broker, guest)
    yield from (one for one in found if one.check != "clock" or not identity)


def _coordinator_session(config: CoordinatorConfig, broker: BrokerConfig, how: How) -> Iterator[Finding]:
    client_id = f"fedpipe-coordinator-{config.fleet}"
    if not how.take_over and machine.runs("fedpipe-coordinator", "coordinator", lambda place: _is_same(place, config)):
        if broker.cert_file:
            yield from _left_alone()
            return
        client_id += "-doctor"
    yield from session.session(broker, session.as_coordinator(config.fleet, client_id))


def _is_same(place: Path, config: AgentConfig | CoordinatorConfig) -> bool:
    """Whether the daemon of that file is the one of `config`; it may lie there and here."""
    try:
        other = load_toml(place, type(config))
    except BadConfig:
        return False
    return _names(other) == _names(config)


def _names(config: AgentConfig | CoordinatorConfig) -> tuple[str, str, str]:
    return getattr(config, "agent", ""), config.fleet, config.broker.url


def _left_alone() -> Iterator[Finding]:
    """With a certificate the broker takes us for the daemon that runs, and would throw that out."""
    yield skipped(
        "mqtt",
        "the daemon runs, and a second connection with its certificate would end its own",
        "--take-over looks all the same",
    )


def _own(broker: BrokerConfig, trust: Path) -> BrokerConfig:
    """With the certificate that the coordinator has issued to itself, where the configuration names none."""
    if not broker.url.startswith("mqtts://") or broker.cert_file or not (trust / "coordinator.pem").exists():
        return broker
    ca_file = broker.ca_file or str(trust / "ca.pem")
    return msgspec.structs.replace(broker, cert_file=str(trust / "coordinator.pem"), ca_file=ca_file)


# ----------------------------------------------------------------------------------------------------------- identity


def _private(broker: BrokerConfig, identity: Path | None) -> list[str]:
    files = [broker.password_file, broker.key_file or broker.cert_file]
    return [*files, str(identity / "agent.pem")] if identity else files


def _identity(config: AgentConfig, folder: Path) -> Iterator[Finding]:
    from agent.identity import AUTHORITY_FILE, Identity

    found = Identity(folder)
    if (found.trust.fleet, found.agent) != (config.fleet, config.agent):
        raise BadConfig(
            f"{folder} is the identity of {found.agent} of fleet {found.trust.fleet}: correct agent, fleet or identity_dir"
        )
    yield ok("identity", f"{found.agent} of fleet {found.trust.fleet}, enrolled at {found.trust.coordinator}")
    yield from api.desk(found.trust.coordinator, folder / AUTHORITY_FILE)
