"""The coordinator's configuration file: one Struct per table, every default with its reason."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.bus import BrokerConfig
from protocol.messages import Id

Positive = Annotated[int, Meta(ge=1, le=2**50)]
Duration = Annotated[float, Meta(gt=0, le=10**8)]


class Web(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP API.  Loopback unless told; `token_file` holds the bearer token, and a public address demands one."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8470
    """0 takes a free port; it is written to `state_dir/api.json`."""
    token_file: str = ""


class Transfer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How uploads are pulled.  The budget, not the number of agents, bounds the memory of broker and coordinator."""

    window: Annotated[int, Meta(ge=1, le=256)] = 12
    budget_bytes: Positive = 32 * 2**20
    timeout_s: Duration = 5.0
    max_update_bytes: Positive = 16 * 2**30


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole configuration file."""

    fleet: Id = "main"
    state_dir: str = "/var/lib/fedpipe-coordinator"
    jobs_dir: str = ""
    """Job files dropped here are submitted; empty: `state_dir/jobs`."""
    broker: BrokerConfig = BrokerConfig()
    web: Web = Web()
    transfer: Transfer = Transfer()
    heartbeat_s: Duration = 15.0
    """An agent silent for three of these is taken for lost until it speaks again."""
    allow_methods: Annotated[list[str], Meta(max_length=64)] = []
    """Third-party methods (entry points) that jobs may use."""
    log_level: str = "INFO"
