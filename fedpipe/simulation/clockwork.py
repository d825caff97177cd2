"""Virtual time: happenings in the order of their instants, chance by purpose, the story of what happened and its digest.

Everything that a world does is a call that was put on one heap with an instant.  Ties go by the order in which they were put
there, chance comes from generators that are seeded by (seed, purpose), and nothing iterates over a set: the same seed gives the
same history, byte for byte, in any process.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, deque
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any, Final

import msgspec

EPOCH: Final = 1_750_000_000.0
"""When every world begins, in seconds since the epoch."""
STORY_LINES: Final = 400


class Life:
    """A process from its start to its end; what it had put on the heap dies with it."""

    __slots__ = ("alive",)

    def __init__(self) -> None:
        self.alive = True


class Clockwork:
    """The heap, the chances and the history of one world."""

    def __init__(self, seed: int) -> None:
        self.now = EPOCH
        self.n_happenings = 0
        self.faults: Counter[str] = Counter()
        self.always = Life()
        self._seed = seed
        self._heap: list[tuple[float, int, Life, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = count()
        self._chances: dict[str, Random] = {}
        self._history = hashlib.blake2b(digest_size=16)
        self._story: deque[tuple[float, str, object]] = deque(maxlen=STORY_LINES)

    def chance(self, purpose: str) -> Random:
        """The generator of one purpose: what one part of a world draws does not move what another draws."""
        found = self._chances.get(purpose)
        if found is None:
            found = self._chances[purpose] = Random(f"{self._seed}/{purpose}")
        return found

    def after(self, delay_s: float, life: Life, what: Callable[..., None], *args: object) -> None:
        """Call `what` this much later, if `life` goes on until then."""
        self.at(self.now + delay_s, life, what, *args)

    def at(self, instant: float, life: Life, what: Callable[..., None], *args: object) -> None:
        """Call `what` at this instant, if `life` goes on until then."""
        heapq.heappush(self._heap, (instant, next(self._serial), life, what, args))

    def step(self) -> bool:
        """Go on to the next happening; False when there is none."""
        while self._heap:
            at, _, life, what, args = heapq.heappop(self._heap)
            if life.alive:
                self.now = at
                self.n_happenings += 1
                what(*args)
                return True
        return False

    def note(self, who: str, what: object) -> None:
        """One line of the history."""
        kind = what if isinstance(what, str) else type(what).__name__
        self._history.update(f"{self.now!r} {who} {kind}\n".encode())
        self._story.append((self.now, who, what))

    def mark(self, data: bytes) -> None:
        """Bytes that belong to the history too."""
        self._history.update(data)

    def fault(self, kind: str, who: str) -> None:
        """A fault is done to somebody."""
        self.faults[kind] += 1
        self.note(who, f"-- {kind} --")

    @property
    def digest(self) -> str:
        """Of all that happened so far."""
        return self._history.hexdigest()

    def story(self) -> list[str]:
        """The last happenings, for people; instants are seconds since the world began."""
        return [f"{at - EPOCH:12.3f} s  {who:12}  {brief(what)}" for at, who, what in self._story]


def brief(value: object) -> str:
    """A Struct without its defaults, cut to one line."""
    if not isinstance(value, msgspec.Struct):
        return str(value) if isinstance(value, str) else repr(value)
    fields = [(field, getattr(value, field.name)) for field in msgspec.structs.fields(value)]
    told = [f"{f.name}={brief(part)}" for f, part in fields if part != f.default and part not in ({}, [])]
    return f"{type(value).__name__}({', '.join(told)})"[:400]
