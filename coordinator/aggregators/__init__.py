"""How the updates of a round become the next model: pure functions over values, numpy only, one file per method.

An aggregator sees the model, the updates of a round with their weights, and two settings; it returns the next model.  It
gives the same bits for any order of the updates, is blind to a common factor of the weights, leaves alone what nobody
trained, and never turns finite numbers into others: the laws to which the tests hold every registered one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, cast

from protocol import plugins
from protocol.adapters import ALL, Adapter, Factors, Rows, Stack
from protocol.errors import BadConfig


class Deltas(Protocol):
    """An update in low-rank factors, wherever it is: names and ranks are known, factors come one matrix at a time."""

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank by matrix name, for every matrix that was trained."""

    def shape(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of one matrix."""

    def factors(self, name: str) -> Factors:
        """Those of one matrix; the kind says whether a change or the adapter itself.  Raises BadUpdate, OSError."""

    def stack(self, names: Sequence[str], rows: Rows = ALL) -> Stack:
        """Those of matrices of one shape and rank, between which in the order of names there is no other.  Raises as `factors`.

        With `rows` these of each A and of each B alone, as far as there are so many.
        """


@dataclass(frozen=True, slots=True)
class Weighted:
    """One agent's update of one round.

    Its weight is the number of samples it really processed, times a discount if it comes late; 0 leaves it out.
    """

    agent: str
    round: int
    weight: float
    update: Deltas


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The next model, and what there is to say about how it came to be.

    dropped_ratio: by matrix, the share (0..1) of the squared norm that the cut to `max_rank` took away.
    """

    adapter: Adapter
    dropped_ratio: Mapping[str, float]


class Aggregator(Protocol):
    """Makes the next model from the updates of a round.

    With `is_slow = True` on the class, a sum takes long beside the transfer of what it sums: it begins while the last updates come
    (coordinator/ahead.py), and gets the further, the more it asks for matrices in the order of their names.
    """

    accepts: ClassVar[str]

    def aggregate(
        self, model: Mapping[str, Factors], updates: Sequence[Weighted], *, max_rank: int, server_lr: float = 1.0
    ) -> Aggregate:
        """The model after these updates, of at most `max_rank` components per matrix, the ones that matter most first.

        At most one update per (round, agent).  Raises BadUpdate naming what cannot be used, OSError.
        """


BUILT_IN: Final = ("product", "average", "hetlora", "redistribute", "stacking")


def load(name: str, allowed: Collection[str] = ()) -> Aggregator:
    """The aggregator called `name`; one of another distribution (entry point `fedpipe.aggregators`) only if in `allowed`.

    Raises BadConfig for any other name.
    """
    match name:
        case "product":
            from coordinator.aggregators.product import Product

            return Product()
        case "average":
            from coordinator.aggregators.factors import Average

            return Average()
        case "hetlora":
            from coordinator.aggregators.factors import Average

            return Average(by_norm=True)
        case "redistribute":
            from coordinator.aggregators.redistribute import Redistribute

            return Redistribute()
        case "stacking":
            from coordinator.aggregators.stacking import Stacking

            return Stacking()
    found = plugins.load("fedpipe.aggregators", name, allowed=allowed, built_in=BUILT_IN)
    if not (isinstance(found, type) and hasattr(found, "accepts") and hasattr(found, "aggregate")):
        raise BadConfig(f"entry point {name!r} of fedpipe.aggregators is no class with `accepts` and `aggregate`")
    return cast("Aggregator", found())


def is_slow(aggregator: Aggregator) -> bool:
    """Whether its sums shall begin early; those of another distribution need not say."""
    return bool(getattr(aggregator, "is_slow", False))


def fits(kind: str, aggregator: Aggregator) -> None:
    """Raises BadConfig unless the aggregator takes updates of the `kind` that the method's trainer produces."""
    if aggregator.accepts != kind:
        name = type(aggregator).__name__
        raise BadConfig(f"{name} sums updates of kind {aggregator.accepts!r}, the trainer sends {kind!r}: pick another")
