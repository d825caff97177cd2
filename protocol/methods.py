"""A method is a trainer on the agents, an aggregator on the coordinator and the kind of update that passes between them.

The method's name travels in every plan.  Each side resolves it here, so that both mean the same by it; what the trainer
produces and the aggregator accepts is checked when a job is submitted (coordinator.aggregators.fits).

`qlora` is fedpipe's own; the others are published baselines to compare it with.
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
FEDAVG: Final = Method(name="fedavg", trainer="continued", kind="lora-values", aggregator="average")
"""Mean of A and of B (McMahan et al., 2017, on LoRA factors); zero-padded where ranks differ."""
HETLORA: Final = Method(name="hetlora", trainer="continued", kind="lora-values", aggregator="hetlora")
"""Cho et al., 2024, arXiv 2401.06432: zero-padding with sparsity weights, truncation by prefix; without rank pruning."""
FLEXLORA: Final = Method(name="flexlora", trainer="continued", kind="lora-values", aggregator="redistribute")
"""Bai et al., 2024, arXiv 2402.11505."""
FLORA: Final = Method(name="flora", trainer="fresh", kind="lora", aggregator="stacking")
"""Wang et al., 2024, arXiv 2409.05976."""
FFALORA: Final = Method(name="ffalora", trainer="frozen-a", kind="lora-values", aggregator="average")
"""Sun et al., 2024, arXiv 2403.12313; without its differential privacy."""

_METHODS: Final = {m.name: m for m in (QLORA, FEDAVG, HETLORA, FLEXLORA, FLORA, FFALORA)}
BUILT_IN: Final = tuple(_METHODS)


def load(name: str, allowed: Collection[str] = ()) -> Method:
    """The method called `name`; one of another distribution (entry point `fedpipe.methods`) only if in `allowed`.

    Raises BadConfig for any other name.
    """
    if name in _METHODS:
        return _METHODS[name]
    found = plugins.load("fedpipe.methods", name, allowed=allowed, built_in=BUILT_IN)
    if not isinstance(found, Method) or found.name != name:
        raise BadConfig(f"entry point {name!r} of fedpipe.methods is no Method of that name")
    return found
