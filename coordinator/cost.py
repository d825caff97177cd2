"""What the ended rounds of a job have cost: the agents' time, energy as far as it is known, bytes, and money at the operator's prices.

Time and energy are recorded with each share; prices are not, so a price that is corrected holds for what is past too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import add
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from msgspec.structs import asdict, astuple

from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.figures import duration_text, energy_text
from protocol.messages import Id

HOUR_S: Final = 3600.0
KWH_J: Final = 3.6e6


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent costs while it works."""

    per_hour: Annotated[float, Meta(ge=0, le=10**6)] = 0.0
    """From the plan it was given to the end of its share, also while it waits for a link."""
    per_kwh: Annotated[float, Meta(ge=0, le=10**6)] = 0.0
    """Of the energy that is measured or declared."""


class Prices(Price, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job's cost is worked out by: looked at anew each time, so that a change holds for what is past too."""

    currency: Annotated[str, Meta(max_length=8)] = ""
    """As EUR; empty: no amount is worked out."""
    agents: dict[Id, Price] = {}
    """Of agents whose price is another one."""

    def __post_init__(self) -> None:
        if not self.currency and any(price.per_hour or price.per_kwh for price in (self, *self.agents.values())):
            raise ValueError("a price needs its currency: add currency = 'EUR' under [prices]")

    def of(self, agent: str) -> Price:
        """What holds for this agent."""
        return self.agents.get(agent, self)


FREE: Final = Prices()


class Spent(msgspec.Struct, frozen=True):
    """What one agent, or all of them, have spent on the rounds of a job that ended.

    Fields: work_s, time from a plan that was taken to the end of its share; joules of devices that trained, with
    declared_j the part that is an owner's figure; unmetered_s, the part of work_s whose energy nobody knows.
    """

    train_s: float = 0.0
    samples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    n_shares: int = 0
    n_failed: int = 0
    work_s: float = 0.0
    joules: float = 0.0
    declared_j: float = 0.0
    unmetered_s: float = 0.0


class CostView(Spent, frozen=True, kw_only=True):
    """What a job has cost: gpu_s is the part of train_s that GPUs worked.

    money: at the prices of now, without the energy that nobody knows; None where no price is set.
    """

    gpu_s: float = 0.0
    money: float | None = None
    currency: str = ""


def work_s(share: ShareRecord) -> float:
    """How long an agent was at work on a share; one that never took its plan was not."""
    return max(share.train_s, share.wall_s if share.entered else 0.0)


def worked(record: RoundRecord) -> Iterator[ShareRecord]:
    """The shares that were worked on in this attempt of a round, without those that an earlier one left to it."""
    return (share for share in record.shares.values() if not 0 < share.ended_at < record.opened_at)


def spent_text(cost: CostView) -> str:
    """What a job has cost so far, in a line: time at work, energy and what it is known from, money."""
    energy = energy_text(cost.joules)
    if energy and cost.declared_j:
        energy += " declared" if cost.declared_j == cost.joules else f" ({energy_text(cost.declared_j)} of it declared)"
    if cost.unmetered_s:
        unknown = f"unknown for {duration_text(cost.unmetered_s)}"
        energy = f"{energy}, {unknown}" if energy else "energy not known"
    money = "" if cost.money is None else f"{cost.money:,.2f} {cost.currency}"
    return "; ".join(filter(None, [f"{duration_text(cost.work_s)} at work", energy, money]))


def with_share(spent: Spent, share: ShareRecord) -> Spent:
    """The same with one more share."""
    energy, worked_s = share.energy, work_s(share)
    joules = energy.joules if energy else 0.0
    more = Spent(
        train_s=share.train_s,
        samples=share.samples,
        bytes_up=share.bytes_up,
        bytes_down=share.bytes_down,
        n_shares=1,
        n_failed=int(share.state != "DONE"),
        work_s=worked_s,
        joules=joules,
        declared_j=joules if energy and energy.source == "declared" else 0.0,
        unmetered_s=0.0 if energy else worked_s,
    )
    return Spent(*map(add, astuple(spent), astuple(more)))


def cost_so_far(spent: Mapping[str, Spent], devices: Mapping[str, str], prices: Prices = FREE) -> CostView:
    """What all agents have spent until the last ended round.  `devices` says what each agent trains on."""
    whole = Spent(*map(sum, zip(*map(astuple, spent.values()), strict=True)))
    by_hour = sum(prices.of(agent).per_hour * one.work_s / HOUR_S for agent, one in spent.items())
    by_energy = sum(prices.of(agent).per_kwh * one.joules / KWH_J for agent, one in spent.items())
    return CostView(
        **asdict(whole),
        gpu_s=sum(one.train_s for agent, one in spent.items() if devices.get(agent, "cpu") != "cpu"),
        money=by_hour + by_energy if prices.currency else None,
        currency=prices.currency,
    )
