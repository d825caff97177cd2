"""The agent's configuration file: one Struct per table, every default with its reason."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.bases import BasesConfig
from agent.data import DataConfig
from agent.limits import Limits
from agent.supervisor import ChildConfig
from agent.upkeep import KeepConfig
from protocol.bus import BrokerConfig
from protocol.messages import Id, Name
from protocol.metrics import place_of
from protocol.reloading import Live

LIVE: Final = Live(
    (
        *(
            "data",
            "base",
            "child",
            "limits",
            "keep",
            "heartbeat_s",
            "progress_s",
            "report_s",
            "checkpoint_s",
            "probe_bytes",
            "probe_within_s",
            "power_w",
        ),
        "log_level",
    ),
    but=("limits.max_global_rank", "limits.max_model_bytes", "limits.max_inflight_bytes", "limits.http_hosts"),
)
"""What a reload changes at once; a run that is under way goes on as it began."""
Duration = Annotated[float, Meta(gt=0, le=10**8)]


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole configuration file."""

    agent: Id
    fleet: Id = "main"
    state_dir: str = "/var/lib/fedpipe-agent"
    identity_dir: str = ""
    """What `fedpipe enrol` made here: who this server is, and whose orders it takes; empty: any from its broker."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    methods: Annotated[list[Name], Meta(min_length=1, max_length=64)] = msgspec.field(default_factory=lambda: ["qlora"])
    """What this agent may be asked to do; third-party methods are entry points that must be named here."""
    broker: BrokerConfig = BrokerConfig()
    data: dict[Id, DataConfig] = {}
    base: BasesConfig = BasesConfig()
    child: ChildConfig = ChildConfig()
    limits: Limits = Limits()
    keep: KeepConfig = KeepConfig()
    heartbeat_s: Duration = 15.0
    progress_s: Duration = 2.0
    """While training, progress is said this often at most."""
    report_s: Duration = 60.0
    """The server's resources are looked at this often; only changes are published."""
    checkpoint_s: Annotated[float, Meta(ge=0, le=10**6)] = 60.0
    """Training is kept on disk this often, so that a restart goes on from there; 0 is never, also not at a stop."""
    probe_bytes: Annotated[int, Meta(ge=0, le=4 * 2**20)] = 256 * 1024
    """Sent once to measure the uplink while no update has gone over it yet, in one chunk at most; 0 is never."""
    probe_within_s: Annotated[float, Meta(ge=0, le=10**6)] = 30.0
    """At a random instant so soon after the connection: a fleet that comes back at once must not fill the broker's queue."""
    power_w: Annotated[float, Meta(ge=0, le=10**6)] = 0.0
    """What this server draws while it trains, for the cost of a job where nothing measures it; 0: not known."""
    metrics: str = ""
    """Where Prometheus may ask, as "127.0.0.1:9464"; empty: nowhere."""
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if self.metrics:
            place_of(self.metrics)
