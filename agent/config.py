"""The agent's configuration file: one Struct per table, every default with its reason."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from agent.bases import BasesConfig
from agent.data import DataConfig
from agent.supervisor import ChildConfig
from protocol.bus import BrokerConfig
from protocol.messages import Id, Name

Positive = Annotated[int, Meta(ge=1, le=2**50)]
Duration = Annotated[float, Meta(gt=0, le=10**8)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this server allows fedpipe to take."""

    max_global_rank: Annotated[int, Meta(ge=1, le=1024)] = 1024
    """Components of the global adapter that are downloaded and held; fewer save memory."""
    max_model_bytes: Positive = 8 * 2**30
    """A larger global adapter is refused."""


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
    log_level: str = "INFO"
