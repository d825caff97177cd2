"""Updates on their way in: which offer is pulled, which is answered, and what a stored one counts for.

Every offer gets exactly one kind of answer, however often and however late it comes: pulled, acknowledged (it is already
here), or declined with the reason.  The identity of an update is (job, round, agent) and its digest; a second, different
update of the same agent for the same round is declined, so nothing counts twice.
"""

from __future__ import annotations

from enum import StrEnum

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.job import Job
from coordinator.core.plans import contribution, update_limit_bytes
from coordinator.core.state import ENDED, Phase, Share
from protocol.messages import ExecState, Offer


class Place(StrEnum):
    """Where an offered update belongs."""

    CURRENT = "current"
    LATE = "late"
    KNOWN = "known"
    NOWHERE = "nowhere"


def _place(job: Job, agent: str, offer: Offer) -> tuple[Place, str]:
    state = job.state
    known = state.seen.get(agent, {}).get(offer.round)
    if known == offer.blob.sha256:
        return Place.KNOWN, ""
    if known:
        return Place.NOWHERE, "a different update of this agent is already counted in this round"
    if state.phase in ENDED or state.phase is Phase.EVALUATING:
        return Place.NOWHERE, f"superseded: the job is {state.phase}"
    round_ = state.round
    if state.phase is Phase.COLLECTING and round_ and offer.round == round_.number and agent in round_.shares:
        return Place.CURRENT, ""
    if offer.round in state.missed.get(agent, {}) and offer.round > state.round_number - job.rules.max_staleness:
        return Place.LATE, ""
    return Place.NOWHERE, f"superseded: round {offer.round} is closed and the job does not take this update any more"


def _ranks(job: Job, agent: str, offer: Offer, place: Place) -> dict[str, int]:
    if place is Place.LATE:
        return job.state.missed[agent][offer.round]
    assert job.state.round is not None
    choice = job.state.round.shares[agent].choice
    return choice.ranks if choice else {}


def _fault(job: Job, agent: str, offer: Offer, place: Place) -> str:
    """Why an offer is refused before a byte of it is pulled; empty when it is fine."""
    limit = update_limit_bytes(job.state, _ranks(job, agent, offer, place))
    if offer.blob.size > limit:
        return f"bad update: {offer.blob.size} bytes offered where the plan allows {limit}"
    if offer.samples < 1:
        return "bad update: it was trained on no sample"
    if place is Place.CURRENT and job.state.round:
        choice = job.state.round.shares[agent].choice
        planned = choice.n_steps * choice.batch * choice.accumulation if choice else 0
        if offer.samples > planned:
            return f"bad update: {offer.samples} samples claimed where {planned} were planned"
    return ""


def offered(job: Job, event: ev.UpdateOffered) -> None:
    """Answer an offer: pull it, say that it is here, or decline it."""
    agent, offer = event.agent, event.offer
    place, reason = _place(job, agent, offer)
    if place is Place.KNOWN:
        job.out.append(act.Acknowledge(agent=agent, xfer=offer.blob.xfer))
        return
    if place is not Place.NOWHERE:
        reason = _fault(job, agent, offer, place)
    if reason:
        _decline(job, agent, offer, reason)
        return
    share = _current_share(job, agent, offer)
    if share:
        share.offer = offer
        share.state = ExecState.UPLOADING
    ranks = _ranks(job, agent, offer, place)
    job.out.append(act.Fetch(agent=agent, offer=offer, matrices=job.state.matrices, ranks=ranks))


def _current_share(job: Job, agent: str, offer: Offer) -> Share | None:
    round_ = job.state.round
    if round_ and round_.number == offer.round and job.state.phase is Phase.COLLECTING:
        return round_.shares.get(agent)
    return None


def _decline(job: Job, agent: str, offer: Offer, reason: str) -> None:
    job.count("superseded_update" if reason.startswith("superseded") else "bad_update")
    share = _current_share(job, agent, offer)
    if share and share.state is not ExecState.DONE and not reason.startswith("superseded"):
        job.end_share(share, offer.round, ExecState.FAILED, reason)
    job.out.append(act.Decline(agent=agent, xfer=offer.blob.xfer, reason=reason))


def stored(job: Job, event: ev.UpdateStored) -> None:
    """A verified update is durable: count it once, here or as a late one, and let the agent forget it."""
    agent, offer = event.agent, event.offer
    place, reason = _place(job, agent, offer)
    if place is Place.NOWHERE:
        _decline(job, agent, offer, reason)
        return
    if place is not Place.KNOWN:
        job.state.seen.setdefault(agent, {})[offer.round] = offer.blob.sha256
    if place is Place.LATE:
        del job.state.missed[agent][offer.round]
        job.state.late.append(contribution(agent, offer))
    share = _current_share(job, agent, offer)
    if place is Place.CURRENT and share:
        share.offer = offer
        job.end_share(share, offer.round, ExecState.DONE, "")
    job.out.append(act.Acknowledge(agent=agent, xfer=offer.blob.xfer))


def spoiled(job: Job, event: ev.UpdateSpoiled) -> None:
    """An update that could not be had or did not fit: the share fails, the agent is told why."""
    _decline(job, event.agent, event.offer, event.reason)


def resume(job: Job) -> None:
    """Pull again what was being pulled."""
    round_ = job.state.round
    if job.state.phase is not Phase.COLLECTING or round_ is None:
        return
    for agent, share in sorted(round_.shares.items()):
        if share.state is ExecState.UPLOADING and share.offer and share.choice:
            ranks = share.choice.ranks
            job.out.append(act.Fetch(agent=agent, offer=share.offer, matrices=job.state.matrices, ranks=ranks))
