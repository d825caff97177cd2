"""Identity and trust: the fleet's own certificate authority, join tokens, enrolments, and what the broker must know of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.config import CoordinatorConfig

if TYPE_CHECKING:
    from coordinator.audit import Audit
    from coordinator.trust.service import Trust


def trust_folder(config: CoordinatorConfig) -> Path:
    """Where the authority lives, if there is one."""
    return Path(config.trust.dir) if config.trust.dir else Path(config.state_dir) / "trust"


def open_trust(config: CoordinatorConfig, audit: Audit | None = None) -> Trust | None:
    """The trust of this coordinator, once its authority was made.  Raises BadConfig for files that do not fit together."""
    if not (trust_folder(config) / "ca.pem").exists():
        return None
    from coordinator.trust.service import Trust

    return Trust(config, audit)
