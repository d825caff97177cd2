"""The sum of a round, begun before its last updates are whole: matrix by matrix, as far as these have come.

An update lists its matrices in the order in which they are summed, and arrives from its beginning on.  So while the last agents
send, what they have sent already is summed with what the others sent before, and the sum and the transfer end together: a
round takes the longer of the two, not both.  Nothing is estimated.  It is the fold that would run afterwards, on a thread that
waits for bytes, so the result has the same bits; and it counts only if every byte it read proves to be of a verified file, and
the round closes with just these updates.  Otherwise it is thrown away, and the fold is done as if this had not been.

What an agent sends is not believed before its time: an update is opened only against its plan, so it cannot make the fold
take more memory than planned.  One such sum is at work at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Self

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.folding import Early, Unchecked
from protocol.arriving import Arriving, Source, settled
from protocol.errors import Unavailable

logger = logging.getLogger(__name__)

_IN_VAIN: Final = "nobody waits for the sum"
Fold = Callable[[act.Aggregate, Early], ev.Aggregated]


@dataclass(slots=True)
class _Sum:
    """One sum: until it is `asked` for it keeps nothing."""

    wish: act.Aggregate
    sources: Sequence[Source]
    asked: Future[None] = field(default_factory=Future)
    is_waiting: bool = False
    made: asyncio.Future[ev.Aggregated] = field(init=False)

    def wait(self) -> None:
        """In the thread of the fold, when all is summed and written.  Raises Unavailable where that is in vain."""
        for source in self.sources:
            settled(source)
        self.is_waiting = True
        self.asked.result()

    @property
    def is_cut_short(self) -> bool:
        """Whether it ended because an update stopped coming, which may come again."""
        return self.made.done() and isinstance(self.made.exception(), Unavailable)


class Ahead:
    """Sums that are made before they are asked for, by job.  `fold` makes one, in a thread."""

    def __init__(self, fold: Fold) -> None:
        self._fold = fold
        self._sums: dict[str, _Sum] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nobody will ask any more: no thread waits on."""
        for job in list(self._sums):
            self.give_up(job)

    def may_begin(self, wish: act.Aggregate) -> bool:
        """Whether this is not under way or done already, nor a sum of another job at work."""
        mine = self._sums.get(wish.job)
        if mine and mine.wish == wish and not mine.is_cut_short:
            return False
        return all(one.is_waiting or one.made.done() for job, one in self._sums.items() if job != wish.job)

    def begin(self, wish: act.Aggregate, unchecked: Mapping[str, Unchecked]) -> None:
        """Begin, with these updates still on their way; another sum of the same job is given up."""
        self.give_up(wish.job)
        mine = self._sums[wish.job] = _Sum(wish, [one.source for one in unchecked.values()])
        # A thread of its own: it waits for files that the threads of the loop verify.
        worker = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        loop = asyncio.get_running_loop()
        mine.made = loop.run_in_executor(worker, self._fold, wish, Early(unchecked, mine.wait))
        mine.made.add_done_callback(lambda made: made.cancelled() or made.exception())  # nobody may ever ask
        worker.shutdown(wait=False)

    def give_up(self, job: str) -> None:
        """Nobody will ask for the sum of this job, if there is one."""
        mine = self._sums.pop(job, None)
        if mine and not mine.asked.done():
            mine.asked.set_exception(Unavailable(_IN_VAIN))
            for source in mine.sources:
                if isinstance(source, Arriving):
                    source.lost(_IN_VAIN)

    async def take(self, wish: act.Aggregate) -> ev.Aggregated | None:
        """The end of this sum, if it was begun and all went well; else None, and it is to be made from the beginning."""
        mine = self._sums.get(wish.job)
        if mine is None or mine.wish != wish:
            self.give_up(wish.job)
            return None
        began = time.monotonic()
        mine.asked.set_result(None)
        try:
            done = await mine.made
        except Exception as error:  # noqa: BLE001 - it read what nobody had checked: what the updates do to a fold, that fold will say
            logger.info("summed again: %s", error, extra={"action": "ahead_failed", "job": wish.job})
            return None
        finally:
            self.give_up(wish.job)
        extra = {"action": "ahead", "job": wish.job, "round": wish.round, "left_s": round(time.monotonic() - began, 3)}
        logger.info("summed while updates were coming", extra=extra)
        return done
