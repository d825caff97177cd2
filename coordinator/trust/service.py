"""Trust inside the running coordinator: seals what it says, knows whom not to hear, keeps its certificates and the broker's files fresh.

It is there when the authority was made (`fedpipe-coordinator ca init`); without it everything works as on a broker that is trusted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from coordinator.audit import Audit
from coordinator.config import CoordinatorConfig
from coordinator.core.events import AgentRevoked
from coordinator.trust import mosquitto, own, trust_folder
from coordinator.trust.authority import CERTIFICATE_FILE, DAY_S
from coordinator.trust.office import Office
from protocol.bus import BrokerConfig, parse_url
from protocol.errors import OutsideFault

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator
    from coordinator.https import Server

UPKEEP_S: Final = 6 * 3600.0

logger = logging.getLogger(__name__)


def open_office(config: CoordinatorConfig, audit: Audit | None = None) -> Office:
    """The office over the configured folder.  Raises BadConfig when there is no authority, or a damaged one."""
    broker_url = config.trust.broker_url or config.broker.url
    return Office(trust_folder(config), config.fleet, broker_url, config.trust.certificate_days * DAY_S, audit)


class Trust:
    """One coordinator's.  Raises BadConfig for files that do not fit together."""

    def __init__(self, config: CoordinatorConfig, audit: Audit | None = None) -> None:
        self._config, self.folder = config.trust, trust_folder(config)
        self.office = open_office(config, audit)
        self.seal = self.office.keyring.sign
        self.barred = self.office.barred()
        self.servers: list[Server] = []
        self._renew(time.time())
        self._refresh_broker()  # before anybody is told that we are ready: a broker started next reads what is true
        self.broker = self._broker(config.broker)

    @property
    def public_url(self) -> str:
        """Where servers enrol, as far as the configuration says."""
        host = self._config.names[0] if self._config.names else "COORDINATOR"
        return f"https://{host}:{self._config.port}"

    @property
    def https_file(self) -> Path:
        """Key and certificate for whoever listens."""
        return self.folder / own.HTTPS_FILE

    def _broker(self, broker: BrokerConfig) -> BrokerConfig:
        """The broker's configuration, with our own certificate where it names none."""
        if not parse_url(broker.url).tls or broker.cert_file:
            return broker
        return msgspec.structs.replace(
            broker,
            cert_file=str(self.folder / own.CLIENT_FILE),
            ca_file=broker.ca_file or str(self.folder / CERTIFICATE_FILE),
        )

    def bars(self, topic: str) -> bool:
        """Whether whoever speaks here (fed/v1/{fleet}/a/{agent}/...) is not to be heard."""
        levels = topic.split("/", 5)
        return len(levels) > 4 and levels[4] in self.barred

    async def decided(self) -> None:
        """Somebody was accepted, rejected or revoked: whom we hear, and what the broker knows, is another set from now on."""
        self.barred = await asyncio.to_thread(self.office.barred)
        await asyncio.to_thread(self._refresh_broker)

    async def keep(self, coordinator: Coordinator) -> None:
        """Give up what revoked agents were given before a crash; then keep every certificate fresh, until cancelled."""
        for agent in coordinator.fleet.state.agents.values():
            if agent.id in self.barred and (agent.online or agent.task):
                coordinator.tell(AgentRevoked(agent=agent.id))
        while True:
            await asyncio.to_thread(self._refresh_broker)
            try:
                renewed = await asyncio.to_thread(self._renew, time.time())
            except OutsideFault as error:
                logger.error("our certificates could not be renewed: %s", error, extra={"action": "renewal_failed"})
                renewed = False
            if renewed:
                for server in self.servers:
                    server.renewed()
                await coordinator.bus.reconnect()
            await asyncio.sleep(UPKEEP_S)

    def _renew(self, now: float) -> bool:
        office = self.office
        client = own.client_certificate(self.folder, office.authority, office.fleet, now)
        https = own.https_certificate(self.folder, office.authority, self._config.names, now)
        return client or https

    def _refresh_broker(self) -> None:
        if not self._config.broker_dir:
            return
        try:
            mosquitto.refresh(Path(self._config.broker_dir), self.office, time.time())
        except OutsideFault as error:
            logger.error("the broker's files are not up to date: %s", error, extra={"action": "broker_files"})
