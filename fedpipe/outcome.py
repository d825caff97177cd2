"""What came of a federation: the figures that the report shows and that report.json holds, and nothing of how they look.

A loss is the mean -log p per token of the completions, in nats.  "Held-out" text was seen by nobody in training; each agent
measures on its own.  Means over agents weigh every agent alike, whatever the size of its data.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from statistics import fmean
from typing import Final

import msgspec

from coordinator.cost import CostView
from coordinator.plan_views import PlanView, under_training

PACKAGES: Final = ("fedpipe", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "aiomqtt")


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the report."""


class Participant(Fact, frozen=True, kw_only=True):
    """One agent: how much text it holds and how it trained last; `rank` is the mean over the matrices that it trained."""

    n_train: int = 0
    n_held_out: int = 0
    bits: str = ""
    n_matrices: int = 0
    rank: float = 0.0


class Eval(Fact, frozen=True, kw_only=True):
    """Held-out losses before, after, and of every agent that trains for itself.

    `per_agent` is agent -> (base, final) on its own text; `alone` the mean over everybody's text of what that agent learns
    alone; `alone_on` agent that trained -> whose text -> loss.
    """

    base: float
    final: float
    alone: dict[str, float] = {}
    per_agent: dict[str, tuple[float, float]] = {}
    alone_on: dict[str, dict[str, float]] = {}

    @classmethod
    def of(
        cls, base: Mapping[str, float], final: Mapping[str, float], alone: Mapping[str, Mapping[str, float]]
    ) -> Eval:
        """Take the means of agent -> loss before, after, and alone (who trained -> whose text -> loss)."""
        both = {agent: (base[agent], final[agent]) for agent in base if agent in final}
        return cls(
            base=fmean(b for b, _ in both.values()),
            final=fmean(f for _, f in both.values()),
            alone={agent: fmean(losses.values()) for agent, losses in alone.items()},
            per_agent=both,
            alone_on={agent: dict(losses) for agent, losses in alone.items()},
        )

    @property
    def best_alone(self) -> str:
        """The agent that gets furthest alone, '' if none was tried."""
        return min(self.alone, key=lambda agent: self.alone[agent], default="")


class AgentRound(Fact, frozen=True, kw_only=True):
    """One agent's share of one round.  `wall_s` runs from the plan to the acknowledged update, `train_s` is the training."""

    state: str
    reason: str = ""
    samples: int = 0
    loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    train_s: float = 0.0
    wall_s: float = 0.0
    planned_samples: int = 0


class RoundOutcome(Fact, frozen=True, kw_only=True):
    """One round of training.  `began_s` counts from the start of the run; `loss` is the training loss over all agents.

    `held_out` is what the agents measured with the model that this round made: agent -> loss; empty if nobody did.
    """

    round: int
    wall_s: float
    began_s: float = 0.0
    loss: float | None = None
    outcome: str = ""
    agents: dict[str, AgentRound] = {}
    held_out: dict[str, float] = {}

    @property
    def under_training(self) -> float | None:
        """1 - processed / planned samples; None where nothing was planned."""
        return under_training((a.samples, a.planned_samples) for a in self.agents.values())


class Sample(Fact, frozen=True, kw_only=True):
    """One held-out prompt, what the text says, and what the base and the federated model say."""

    prompt: str
    reference: str
    before: str
    after: str
    agent: str = ""


class Note(Fact, frozen=True, kw_only=True):
    """Something that happened on the way, `at_s` seconds after the start: a kill, a dropout, a restart."""

    at_s: float
    text: str


def versions() -> dict[str, str]:
    """Versions of what made the result, as installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Report(Fact, frozen=True, kw_only=True):
    """A whole run."""

    model: str
    method: str = "qlora"
    seed: int = 0
    broker: str = ""
    wall_s: float = 0.0
    eval: Eval
    agents: dict[str, Participant] = {}
    rounds: list[RoundOutcome] = []
    samples: list[Sample] = []
    events: list[Note] = []
    adapter: str = ""
    plan: PlanView | None = None
    cost: CostView = CostView()
    versions: dict[str, str] = msgspec.field(default_factory=versions)

    @property
    def names(self) -> list[str]:
        """The agents, in their own order."""
        return list(self.eval.per_agent) or list(self.agents)

    @property
    def bytes_moved(self) -> int:
        """Bytes of updates and models in all rounds."""
        return sum(a.bytes_up + a.bytes_down for r in self.rounds for a in r.agents.values())

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Held-out loss after so many rounds: agent -> points, starting with the base at 0."""
        curves = {agent: [(0, base)] for agent, (base, _) in self.eval.per_agent.items()}
        for outcome in self.rounds:
            for agent, loss in outcome.held_out.items():
                if agent in curves:
                    curves[agent].append((outcome.round, loss))
        return curves

    @property
    def mean_curve(self) -> list[tuple[int, float]]:
        """Mean of the curves, at the rounds after which every agent measured."""
        points = [dict(curve) for curve in self.curves.values()]
        shared = sorted(set.intersection(*(set(p) for p in points))) if points else []
        return [(n, fmean(p[n] for p in points)) for n in shared]
