"""Wishes, in the imperative: everything an agent's core can ask of the world.  Counterpart of events.py."""

from __future__ import annotations

import msgspec

from protocol.messages import Blob, Execution, Offer, Plan


class Action(msgspec.Struct, frozen=True, kw_only=True, tag_field="action"):
    """Something to do."""


class SayBirth(Action, frozen=True, kw_only=True):
    """Publish presence and the resource report, both retained."""


class Say(Action, frozen=True, kw_only=True):
    """Publish a transition of the work; lost words are said again at the next BusUp."""

    message: Execution


class FetchModel(Action, frozen=True, kw_only=True):
    """Pull the global adapter, or its prefix of `size` bytes with digest `sha256`; comes back as ModelFetched or ModelLost.

    `listen`: it may be broadcast; `by_store`: it can be had from an object store.
    """

    blob: Blob
    size: int
    sha256: str
    listen: bool = False
    by_store: bool = False


class DropModel(Action, frozen=True, kw_only=True):
    """Stop pulling the global adapter."""

    blob: Blob


class StartChild(Action, frozen=True, kw_only=True):
    """Run this work in the training child; `model_sha256` is "" at version 0."""

    plan: Plan
    model_sha256: str
    bytes_down: int


class StopChild(Action, frozen=True, kw_only=True):
    """End the child's work after the present step; it comes back as ChildFinished or ChildFailed.

    `suspend`: keep it on disk if that can be done, for when this plan comes again.
    """

    reason: str
    suspend: bool = False


class PauseChild(Action, frozen=True, kw_only=True):
    """Hold the child's work after the present micro-batch."""

    reason: str


class ResumeChild(Action, frozen=True, kw_only=True):
    """Go on with what was held."""


class ShrinkChild(Action, frozen=True, kw_only=True):
    """Go on with smaller micro-batches."""

    reason: str


class LetChildGo(Action, frozen=True, kw_only=True):
    """End the child as soon as it has no work, so that all its memory is free."""

    reason: str


class KillChild(Action, frozen=True, kw_only=True):
    """The child did not stop when asked: kill it; nothing of its work comes back."""


class OfferUpdate(Action, frozen=True, kw_only=True):
    """Offer an update of the outbox until the coordinator accepts or declines it."""

    offer: Offer


class ForgetUpdate(Action, frozen=True, kw_only=True):
    """Remove an update from the outbox."""

    xfer: str


Wish = (
    SayBirth
    | Say
    | FetchModel
    | DropModel
    | StartChild
    | StopChild
    | PauseChild
    | ResumeChild
    | ShrinkChild
    | LetChildGo
    | KillChild
    | OfferUpdate
    | ForgetUpdate
)
