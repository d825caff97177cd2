"""Updates on their way in: which offer is pulled, which is answered, and what a stored one counts for.

Every offer gets exactly one kind of answer, however often and however late it comes: pulled, acknowledged (it is already
here), or declined with the reason.  The identity of an update is (job, round, agent) and its digest; a second, different
update of the same agent for the same round is declined, so nothing counts twice.

An update that comes for an earlier attempt of a round still open to it counts like one of the present attempt.
"""

from __future__ import annotations

from enum import StrEnum

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import learning
from coordinator.core.choice import Choice
from coordinator.core.job import Job
from coordinator.core.plans import contribution, update_limit_bytes
from coordinator.core.state import ENDED, Phase, Share
from protocol.messages import TERMINAL, ExecState, Offer


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
        return Place.NOWHERE, "superseded: a different update of this agent is already counted in this round"
    if state.phase in ENDED or state.phase is Phase.EVALUATING:
        return Place.NOWHERE, f"superseded: the job is {state.phase}"
    if offer.round == state.round_number + 1 and offer.attempt < state.first_attempt:
        return Place.NOWHERE, "superseded: the job was rolled back, and this update was made from a version it has left"
    share = _current_share(job, agent, offer)
    if share and share.state not in TERMINAL:
        return Place.CURRENT, ""
    next_fold = state.round_number + (2 if state.phase is Phase.AGGREGATING else 1)
    if next_fold > job.rules.n_rounds:
        return Place.NOWHERE, "superseded: the last round is closed, and no other will take this update"
    if offer.round in state.missed.get(agent, {}) and next_fold - offer.round <= job.rules.max_staleness:
        return Place.LATE, ""
    is_open_again = offer.round == state.round_number + 1 and state.phase is not Phase.AGGREGATING
    if is_open_again and _tried(job, agent, offer):
        return Place.LATE, ""
    if share:
        return Place.NOWHERE, f"superseded: this share has ended as {share.state}: {share.reason}"
    return Place.NOWHERE, f"superseded: round {offer.round} is closed and the job does not take this update any more"


def _current_share(job: Job, agent: str, offer: Offer) -> Share | None:
    round_ = job.state.round
    if round_ and round_.number == offer.round and job.state.phase is Phase.COLLECTING:
        return round_.shares.get(agent)
    return None


def _choice(job: Job, agent: str, offer: Offer) -> Choice:
    """What was planned for this update; an earlier attempt may have been planned otherwise."""
    share = _current_share(job, agent, offer)
    present = share.choice if share else None
    if share and share.attempt == offer.attempt:
        choice = present
    else:
        choice = _tried(job, agent, offer) or job.state.missed.get(agent, {}).get(offer.round) or present
    assert choice is not None
    return choice


def _tried(job: Job, agent: str, offer: Offer) -> Choice | None:
    """What was planned for the attempt that this update was made in, if that closed without it."""
    return job.state.tried.get(agent, {}).get(offer.round, {}).get(offer.attempt)


def _fault(job: Job, agent: str, offer: Offer, choice: Choice) -> str:
    """Why an offer is refused before a byte of it is pulled; empty when it is fine."""
    limit = update_limit_bytes(job.state, choice)
    train = job.state.spec.train
    row_samples = train.max_tokens if train.packing else 1  # a packed row holds one sample per token at the utmost
    planned = choice.n_samples * row_samples
    n_attempts = max(job.rules.max_attempts, job.state.attempt + 1)  # those that were stopped come on top
    is_known = offer.attempt < n_attempts or _tried(job, agent, offer)
    if not is_known or offer.steps > choice.n_steps:
        return (
            f"bad update: attempt {offer.attempt} with {offer.steps} steps claimed where {choice.n_steps} were planned"
        )
    if offer.blob.size > limit:
        return f"bad update: {offer.blob.size} bytes offered where the plan allows {limit}"
    if offer.samples < 1:
        return "bad update: it was trained on no sample"
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
        reason = _fault(job, agent, offer, _choice(job, agent, offer))
    if reason:
        _decline(job, agent, offer, reason)
        return
    share = _current_share(job, agent, offer)
    if place is Place.CURRENT and share:
        share.offer = offer
        share.state = ExecState.UPLOADING
        share.entered.setdefault(ExecState.UPLOADING, job.now)
    job.out.append(_fetch(job, agent, offer))


def _fetch(job: Job, agent: str, offer: Offer) -> act.Fetch:
    return act.Fetch(
        agent=agent,
        offer=offer,
        method=job.state.spec.job.method,
        matrices=job.state.matrices,
        ranks=_choice(job, agent, offer).ranks,
    )


def _decline(job: Job, agent: str, offer: Offer, reason: str) -> None:
    """Refuse an update for good; one that is unfit ends the share it was made for, and one of a later attempt is given again."""
    superseded = reason.startswith("superseded")
    job.count("superseded_update" if superseded else "bad_update")
    share = _current_share(job, agent, offer)
    is_open = share is not None and share.state not in TERMINAL and not superseded
    if share and is_open and share.attempt == offer.attempt:
        job.end_share(share, offer.round, ExecState.FAILED, reason)
    job.out.append(act.Decline(agent=agent, xfer=offer.blob.xfer, reason=reason))
    if share and is_open and offer.attempt < share.attempt:  # offered instead of training anew, so that has not begun
        share.offer, share.state = None, ExecState.OFFERED
        job.rejoined(agent, reborn=False)


def stored(job: Job, event: ev.UpdateStored) -> None:
    """A verified update is durable: count it once, here or as a late one, and let the agent forget it."""
    agent, offer = event.agent, event.offer
    place, reason = _place(job, agent, offer)
    if place is Place.NOWHERE:
        _decline(job, agent, offer, reason)
        return
    if place is not Place.KNOWN:
        learning.learn(job, agent, _choice(job, agent, offer), offer, event.scores)
        _take(job, agent, offer, place)
    job.out.append(act.Acknowledge(agent=agent, xfer=offer.blob.xfer))


def _take(job: Job, agent: str, offer: Offer, place: Place) -> None:
    """Count a stored update: for its share, for the attempt of its round that is yet to close, or for the next round."""
    state, choice = job.state, _choice(job, agent, offer)
    share = _current_share(job, agent, offer)
    state.seen.setdefault(agent, {})[offer.round] = offer.blob.sha256
    if place is Place.CURRENT and share:
        share.offer = offer
        job.end_share(share, offer.round, ExecState.DONE, "")
    elif offer.round == state.round_number + 1 and state.phase is not Phase.AGGREGATING:
        shares = state.round.shares if state.round else state.carried
        shares[agent] = Share(agent=agent, attempt=offer.attempt, choice=choice, state=ExecState.DONE, offer=offer)
        job.roster.touch(agent)
    else:
        state.late.append(contribution(agent, offer))


def spoiled(job: Job, event: ev.UpdateSpoiled) -> None:
    """An update that could not be had or did not fit: the share fails, the agent is told why."""
    if _place(job, event.agent, event.offer)[0] is not Place.KNOWN:
        _decline(job, event.agent, event.offer, event.reason)


def resume(job: Job) -> None:
    """Pull again what was being pulled."""
    if job.state.phase is not Phase.COLLECTING or job.state.round is None:
        return
    for agent, share in sorted(job.state.round.shares.items()):
        if share.offer and share.state not in TERMINAL:
            job.out.append(_fetch(job, agent, share.offer))
