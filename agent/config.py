"""The agent's configuration file: one Struct per table, every default with its reason."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from agent.bases import BasesConfig
from agent.data import DataConfig
from agent.limits import Limits
from agent.supervisor import ChildConfig
from protocol.bus import BrokerConfig
from protocol.messages import Id, Name

Duration = Annotated[float, Meta(gt=0, le=10**8)]


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole configuration file."""

    agent: Id
    fleet: Id = "main"
    state_dir: str = "/var/lib/fedpipe-agent"
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    methods: Annotated[list[Name], Meta(min_length=1, max_length=64)] = msgspec.field(default_factory=lambda: ["qlora"])
    """What this agent may be asked to do; third-party methods are entry points that must be named here."""
    broker: BrokerConfig = BrokerConfig()
    data: dict[Id, DataConfig] = {}
    base: BasesConfig = BasesConfig()
    child: ChildConfig = ChildConfig()
    limits: Limits = Limits()
    heartbeat_s: Duration = 15.0
    progress_s: Duration = 2.0
    """While training, progress is said this often at most."""
    report_s: Duration = 60.0
    """The server's resources are looked at this often; only changes are published."""
    probe_bytes: Annotated[int, Meta(ge=0, le=4 * 2**20)] = 256 * 1024
    """Sent once to measure the uplink while no update has gone over it yet, in one chunk at most; 0 is never."""
    log_level: str = "INFO"
