"""A disk that is full now may have room in a minute: what was trained is written again and again until it must be given up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from typing import Final

from agent.child import LAST_TRIES_S, Phase
from agent.trainers import TrainingFailed

logger = logging.getLogger(__name__)

AGAIN_S: Final = 1.0


def insisting(write: Callable[[], object], *, is_stopping: bool) -> Generator[Phase, bool, None]:
    """Call `write` until it raises no OSError, with a sign of life between; told to stop, for LAST_TRIES_S more.

    Raises TrainingFailed("disk") then.  There is always a stop: the plan's, at the latest.
    """
    give_up_at = time.monotonic() + LAST_TRIES_S if is_stopping else None
    is_complained = False
    while True:
        try:
            write()
            return
        except OSError as error:
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise TrainingFailed(
                    "disk", f"the update cannot be written: {error}: make room on this agent"
                ) from error
            if not is_complained:
                logger.warning("the update cannot be written, tried again: %s", error, extra={"action": "disk"})
            is_complained = True
        if (yield Phase(name="saving")) and give_up_at is None:
            give_up_at = time.monotonic() + LAST_TRIES_S
        time.sleep(AGAIN_S)
