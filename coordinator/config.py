"""The coordinator's configuration file: one Struct per table, every default with its reason."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from coordinator.bucket import BulkConfig
from coordinator.cost import Prices
from coordinator.trackers import TrackersConfig
from protocol.bus import BrokerConfig
from protocol.messages import Id
from protocol.reloading import Live

LIVE: Final = Live(
    (
        "keep",
        "transfer.up_bytes_per_s",
        "transfer.down_bytes_per_s",
        "allow_methods",
        "max_agents",
        "web.token_file",
        "trackers",
        "prices",
        "log_level",
    )
)
"""What a reload changes at once."""
Positive = Annotated[int, Meta(ge=1, le=2**50)]
Duration = Annotated[float, Meta(gt=0, le=10**8)]


class Web(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP API.  Loopback unless told; `token_file` holds the bearer token, and a public address demands one."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8470
    """0 takes a free port; it is written to `state_dir/api.json`."""
    token_file: str = ""
    tls: Literal["auto", "on", "off"] = "auto"
    """auto: HTTPS on any address but loopback, once there is an authority."""


class Trust(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Identity: certificates, join tokens, signed plans.  In force once `fedpipe-coordinator ca init` has made the authority."""

    dir: str = ""
    """The authority, its keys and the registry; empty: `state_dir/trust`."""
    host: str = "0.0.0.0"  # noqa: S104 - servers come from outside; this listener does nothing but enrol
    port: Annotated[int, Meta(ge=0, le=65535)] = 8443
    """Where servers enrol and renew, over HTTPS."""
    names: Annotated[list[str], Meta(max_length=100)] = []
    """DNS names and addresses under which this coordinator is reached: they stand in its certificate."""
    broker_url: str = ""
    """What agents are told; empty: `broker.url`."""
    broker_dir: str = ""
    """Folder of `fedpipe mosquitto-config`: its acl, crl.pem and server.pem are kept up to date; empty: nothing is."""
    certificate_days: Annotated[float, Meta(gt=0, le=3650)] = 90.0
    """Life of an agent's certificate; it renews it itself at two thirds."""


class Transfer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How bulk is moved.  The budget, not the number of agents, bounds the memory of broker and coordinator."""

    window: Annotated[int, Meta(ge=1, le=256)] = 4
    """Chunks in flight from one agent, until it is known how many its link takes."""
    budget_bytes: Positive = 24 * 2**20
    """Chunks under way from all agents: bounds the broker's memory and ours."""
    timeout_s: Duration = 5.0
    max_update_bytes: Positive = 16 * 2**30
    broadcast: bool = True
    """One copy of a model for all agents that listen; off: one for each."""
    up_bytes_per_s: Annotated[float, Meta(ge=0, le=10**15)] = 0.0
    """All updates together arrive no faster; 0 is no such cap."""
    down_bytes_per_s: Annotated[float, Meta(ge=0, le=10**15)] = 0.0
    """All models together leave no faster; 0 is no such cap."""


class Keep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stays on the disk, beyond what is needed to go on; see coordinator/pruning.py."""

    versions: Annotated[int, Meta(ge=1, le=10**6)] = 20
    """Newest versions of a job at work, beside the one with the best held-out loss."""
    ended_versions: Annotated[int, Meta(ge=1, le=10**6)] = 5
    """The same once the job has ended."""
    update_rounds: Annotated[int, Meta(ge=0, le=10**6)] = 0
    """Rounds of each job whose single updates stay after they are folded, so that `replay` can fold them again.  None by
    default: an update says more about one server's data than the aggregate does."""
    replay_rounds: Annotated[int, Meta(ge=2, le=10**6)] = 20
    """Round ends, over all jobs, that the journal reaches back to."""
    replay_bytes: Annotated[int, Meta(ge=0, le=2**60)] = 2**30
    """Of all of these: what past rounds may take in journal.sqlite.  The two newest snapshots stay, however large."""
    max_bytes: Annotated[int, Meta(ge=0, le=2**60)] = 0
    """Size of the whole state folder, above which the oldest goes first; 0: as the counts above have it."""
    min_free_bytes: Annotated[int, Meta(ge=0, le=2**60)] = 256 * 2**20
    """Below so much free space nothing new is taken in: the rest is for the journal and the next version.  Below twice as much,
    past rounds are given up."""


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole configuration file."""

    fleet: Id = "main"
    state_dir: str = "/var/lib/fedpipe-coordinator"
    jobs_dir: str = ""
    """Job files dropped here are submitted; empty: `state_dir/jobs`."""
    broker: BrokerConfig = BrokerConfig()
    web: Web = Web()
    trust: Trust = Trust()
    transfer: Transfer = Transfer()
    bulk: BulkConfig = BulkConfig()
    keep: Keep = Keep()
    trackers: TrackersConfig = TrackersConfig()
    prices: Prices = Prices()
    heartbeat_s: Duration = 15.0
    """An agent silent for three of these is taken for lost until it speaks again."""
    max_agents: Annotated[int, Meta(ge=1, le=10**6)] = 20_000
    """Agents that are remembered; one more is refused, so that invented names cannot fill memory and disk."""
    allow_methods: Annotated[list[str], Meta(max_length=64)] = []
    """Third-party methods (entry points) that jobs may use."""
    log_level: str = "INFO"
