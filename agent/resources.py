"""What this server gives at this moment: the report, how far training gives way to the host, and the hours of bulk.

Looks (agent/watch.py, agent/profiler.py) go into policies (agent/host.py, agent/caps.py), every `report_s`, and more often while
there is something that could give way; what comes out otherwise than before is told, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from agent import profiler, upkeep
from agent.caps import Caps
from agent.config import AgentConfig
from agent.core import events as ev
from agent.host import Host
from agent.watch import Watch, minute_of_day
from protocol.daemon import notify
from protocol.messages import Report

logger = logging.getLogger(__name__)


class Resources:
    """What is given under `config`, as of the last look; the first one is taken here and blocks for some milliseconds.

    `child` says which process trains, `is_working` whether there is a share.  `tell` hands another level to the core,
    `reported` is called when `report` is another one, `opened` when bulk may move again.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        clock: Callable[[], float],
        child: Callable[[], int | None],
        is_working: Callable[[], bool],
        tell: Callable[[ev.HostSpoke], None],
        reported: Callable[[], None],
        opened: Callable[[], None],
    ) -> None:
        self._config, self._clock = config, clock
        self._child, self._is_working = child, is_working
        self._tell, self._reported, self._opened = tell, reported, opened
        self._folder = Path(config.state_dir)
        self._renewed = asyncio.Event()
        self.link = profiler.Link()
        self.host, self.watch = Host(config.limits), Watch(config.device)
        self.caps = Caps(config.limits, minute_of_day())
        if self.host.see(self.watch.look(None), clock()).level != "run":
            self._give_way()
        self.report = self._look_around(None)

    def renew(self, config: AgentConfig) -> None:
        """Another configuration, in force at once."""
        self._config = config
        self.host.renew(config.limits)
        self._keep_hours()
        self._renewed.set()

    async def allowed_bytes(self) -> int:
        """Memory that a training child may hold; 0: not known."""
        free, own = await asyncio.to_thread(self.watch.memory, self._child())
        return 0 if own is None else max(1, self._config.limits.allowed_bytes(free, own))  # 0 would be "not known"

    def _look_around(self, child: int | None) -> Report:
        verdict = self.host.verdict
        report = profiler.profile(
            self._folder,
            self.link,
            limits=self._config.limits,
            device=self._config.device,
            child=child,
            paused=verdict.reason if verdict.level in {"pause", "stop"} else "",
        )
        return self.caps.applied(report)

    async def report_change(self) -> None:
        """Look at everything, and report it if it is worth a message."""
        report = await asyncio.to_thread(self._look_around, self._child())
        if profiler.changed(self.report, report):
            self.report = report
            self._reported()

    async def watch_resources(self) -> None:
        """Look at everything, the agent's own folder and the hours included, until cancelled."""
        while True:
            await asyncio.sleep(self._config.report_s)
            await asyncio.to_thread(upkeep.tidy, self._folder, self._config.keep)
            self._keep_hours()
            await self.report_change()

    async def watch_host(self) -> None:
        """Look often while there is something that could give way, else as often as at everything, until cancelled."""
        idle_until = self._clock() + self._config.report_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.limits.yield_to.every_s):
                    await self._renewed.wait()
            is_renewed = self._renewed.is_set()
            self._renewed.clear()
            child = self._child()
            if not self._is_working() and child is None and self._clock() < idle_until and not is_renewed:
                continue
            idle_until = self._clock() + self._config.report_s
            level = self.host.verdict.level
            sample = await asyncio.to_thread(self.watch.look, child)
            if self.host.see(sample, self._clock()).level != level:
                self._give_way()
                await self.report_change()
            elif is_renewed:
                await self.report_change()

    def _keep_hours(self) -> None:
        """Let bulk flow, or wait, as its hours begin and end."""
        if not self.caps.renew(self._config.limits, minute_of_day()):
            return
        text = self.caps.reason or "updates and models may move now"
        logger.info("%s", text, extra={"action": "transfer_hours"})
        notify(STATUS=text)
        if self.caps.is_open:
            self._opened()

    def _give_way(self) -> None:
        level, reason = self.host.verdict
        extra = {"action": "yield", "level": level} | ({"reason": reason} if reason else {})
        logger.warning("the host needs the device" if reason else "the host leaves the device to training", extra=extra)
        self._tell(ev.HostSpoke(level=level, reason=reason))
