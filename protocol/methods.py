"""A method is a trainer on the agents, an aggregator on the coordinator and the kind of update that passes between them.

The method's name travels in every plan.  Each side resolves it here, so that both mean the same by it; what the trainer
produces and the aggregator accepts is checked when a job is submitted (coordinator.aggregators.fits).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec

from protocol import plugins
from protocol.errors import BadConfig


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How one kind of federated fine-tuning is done.  The names refer to the registries of the two sides."""

    name: str
    trainer: str
    kind: str
    aggregator: str


QLORA: Final = Method(name="qlora", trainer="qlora", kind="lora", aggregator="product")

BUILT_IN: Final = (QLORA.name,)


def load(name: str, allowed: Collection[str] = ()) -> Method:
    """The method called `name`; one of another distribution (entry point `fedpipe.methods`) only if in `allowed`.

    Raises BadConfig for any other name.
    """
    match name:
        case "qlora":
            return QLORA
    found = plugins.load("fedpipe.methods", name, allowed=allowed, built_in=BUILT_IN)
    if not isinstance(found, Method) or found.name != name:
        raise BadConfig(f"entry point {name!r} of fedpipe.methods is no Method of that name")
    return found
