"""The agents' side of published baselines: QLoRA that starts its adapter otherwise, and sends values instead of a change.

    method             starts from                                   learns     sends
    fedavg, hetlora    the first r components of the global adapter  A and B    their values
    flexlora           the same, of U S and V^T                      A and B    their values
    ffalora            the same; A is the common random start        B          the values of both (A never changes)
    flora              random A, B = 0, on top of the frozen sum     A and B    the change

The published methods are cited where their sums are (coordinator/aggregators/); quantization of the base, AdamW, clipping
and early stops are fedpipe's own and the same for all.  On the wire the scale alpha / r is inside B; a continued adapter
takes it out again, so that steps have the size that they have in plain LoRA.  All agents share the first round's A (drawn
from the job's seed), without which averaging factors would average unrelated bases.
"""

from __future__ import annotations

from typing import ClassVar

from agent.trainers.lora import Start
from agent.trainers.qlora import QLora
from protocol.messages import Plan
from protocol.updates import Kind


class Continued(QLora):
    """Trains the global adapter on, at the agent's own rank."""

    produces: ClassVar[Kind] = "lora-values"
    start: ClassVar[Start] = "continued"

    @staticmethod
    def adapter_seed(plan: Plan) -> int:
        """The job's seed: what the global adapter has no components for starts alike on all agents and in all rounds."""
        return plan.data_seed


class FrozenA(Continued):
    """Trains B alone, against an A that all agents share and nobody changes."""

    start: ClassVar[Start] = "frozen-a"


class Fresh(QLora):
    """Trains a change that starts at random in every round, on top of the frozen global adapter."""

    start: ClassVar[Start] = "fresh"
