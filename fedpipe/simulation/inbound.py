"""Updates on their way to the coordinator, as coordinator/traffic.py has them: pulled, judged, lost for now, or withdrawn.

Between an offer that the core wants and its verdict an update is known here, and its repeated offers are no news.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.core import actions as act
from coordinator.core import events as ev
from fedpipe.simulation.broker import TOPICS
from fedpipe.simulation.transfers import Pull
from protocol.messages import Blob, Refuse

if TYPE_CHECKING:
    from fedpipe.simulation.cloud import Cloud

RETRY_S = 15.0
JUDGE_S = 0.05


class Inbound:
    """All uploads of one life of a coordinator; what is complete lies on its disk."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._pulls: dict[str, dict[str, Pull | None]] = {}  # by agent and transfer; None: it is here and being judged

    def is_on_its_way(self, agent: str, blob: Blob) -> bool:
        """Whether this offer is being pulled or judged already."""
        return blob.xfer in self._pulls.get(agent, {})

    def fetch(self, wish: act.Fetch) -> None:
        """Pull an update, or judge at once what is here already."""
        pulls, xfer = self._pulls.setdefault(wish.agent, {}), wish.offer.blob.xfer
        if wish.offer.blob.sha256 in self._cloud.disk.blobs:
            self._pulled(wish)
        elif not pulls.get(xfer):
            pull = pulls[xfer] = self._pull(wish, xfer)
            pull.go()

    def _pull(self, wish: act.Fetch, xfer: str) -> Pull:
        cloud, edge = self._cloud, self._cloud.edges[wish.agent]
        return Pull(
            cloud.clockwork,
            cloud.life,
            edge.traits.upload_s,
            connection=lambda: cloud.connection_with(wish.agent),
            holds=lambda: edge.sends(xfer),
            done=lambda: self._pulled(wish),
            lost=lambda: self._lost(wish),
            refused=lambda: self._withdrawn(wish),
        )

    def stop(self, agent: str, xfer: str) -> None:
        """Not wanted any more."""
        pull = self._pulls.get(agent, {}).pop(xfer, None)
        if pull:
            pull.stop()

    def nudge(self, agent: str | None = None) -> None:
        """This agent is back, or the broker: what waits for it goes on."""
        for name in list(self._pulls) if agent is None else [agent]:
            for pull in list(self._pulls.get(name, {}).values()):
                if pull:
                    pull.nudge()

    def _pulled(self, wish: act.Fetch) -> None:
        blob = wish.offer.blob
        self._pulls.setdefault(wish.agent, {})[blob.xfer] = None
        self._cloud.disk.blobs.add(blob.sha256)
        self._cloud.spawn(f"judge/{wish.agent}/{blob.xfer}", JUDGE_S, lambda: self._judge(wish))

    def _judge(self, wish: act.Fetch) -> None:
        sha256 = wish.offer.blob.sha256
        self.stop(wish.agent, wish.offer.blob.xfer)
        if sha256 in self._cloud.spoiled:
            self._cloud.disk.blobs.discard(sha256)
            self._cloud.tell(ev.UpdateSpoiled(agent=wish.agent, offer=wish.offer, reason="bad update: not finite"))
        else:
            self._cloud.tell(ev.UpdateStored(agent=wish.agent, offer=wish.offer))

    def _lost(self, wish: act.Fetch) -> None:
        xfer = wish.offer.blob.xfer
        self.stop(wish.agent, xfer)
        self._cloud.say(TOPICS.down(wish.agent, "grant"), Refuse(xfer=xfer, reason="silent", retry_after_s=RETRY_S))

    def _withdrawn(self, wish: act.Fetch) -> None:
        self.stop(wish.agent, wish.offer.blob.xfer)
        reason = "withdrawn by the agent: not here any more"
        self._cloud.tell(ev.UpdateSpoiled(agent=wish.agent, offer=wish.offer, reason=reason))
