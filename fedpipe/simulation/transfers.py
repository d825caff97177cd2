"""A bulk transfer as one delayed happening: it goes on while both sides are connected, breaks off, and resumes where it was.

The chunk machine itself (protocol/transfer.py) has its own simulation; what the cores see of it is when a blob is here, that it
cannot be had for the moment, or that the other side does not hold it any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fedpipe.simulation.clockwork import Clockwork, Life

PATIENCE_S: Final = 40.0
MAX_TRIES: Final = 8
"""Both together as in protocol/transfer.py: a silent sender is given up after some five minutes."""


class Pull:
    """One transfer, driven by its receiver, whose `life` it shares.

    `connection` names the present connection of both sides, None while there is none; `holds` says whether the sender has the
    blob; then one of `done`, `lost` (for now) and `refused` (for good) is called, once.
    """

    def __init__(
        self,
        clockwork: Clockwork,
        life: Life,
        seconds: float,
        *,
        connection: Callable[[], tuple[int, int] | None],
        holds: Callable[[], bool],
        done: Callable[[], None],
        lost: Callable[[], None],
        refused: Callable[[], None],
    ) -> None:
        self.left_s = seconds
        self._clockwork, self._life = clockwork, life
        self._connection, self._holds = connection, holds
        self._done, self._lost, self._refused = done, lost, refused
        self._turn = self._tries = 0
        self._moving = False

    def go(self) -> None:
        """Begin, or look whether it can go on."""
        self._turn += 1
        connection = self._connection()
        self._moving = connection is not None and self._holds()
        if connection is None:
            self._tries += 1
            if self._tries > MAX_TRIES:
                self.stop()
                self._lost()
            else:
                self._clockwork.after(PATIENCE_S, self._life, self._again, self._turn)
        elif self._moving:
            self._tries = 0
            self._clockwork.after(self.left_s, self._life, self._arrived, self._turn, connection)
        else:
            self.stop()
            self._refused()

    def nudge(self) -> None:
        """The other side is back."""
        if not self._moving:
            self.go()

    def stop(self) -> None:
        """Not wanted any more."""
        self._turn += 1

    def _again(self, turn: int) -> None:
        if turn == self._turn:
            self.go()

    def _arrived(self, turn: int, connection: tuple[int, int]) -> None:
        if turn != self._turn:
            return
        if self._connection() == connection:
            self.stop()
            self._done()
        else:
            self._clockwork.faults["transfer broken off"] += 1
            self.left_s *= self._clockwork.chance("transfers").random()
            self.go()
