"""What a fleet has in common, held once: whatever the choices are, the same comes back."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.choice import Choice, share_ranks
from coordinator.core.state import RoundPlan

RANKS = st.sampled_from([{}, {"k": 2, "q": 2}, {"q": 2, "k": 2}, {"k": 1, "q": 3}, {"k": 4}, {"q": 4}])
CHOICES = st.dictionaries(
    st.sampled_from("abcdefgh"), RANKS.map(lambda ranks: Choice(ranks=dict(ranks), bits="nf4", n_steps=1, batch=1))
)


@given(CHOICES)
def test_a_plan_comes_back_from_the_disk_as_it_was(choices: dict[str, Choice]) -> None:
    plan = RoundPlan(round=1, reason="", choices=choices)
    kept = msgspec.convert(msgspec.to_builtins(plan.packed()), RoundPlan)
    assert kept.unpacked() == plan
    assert list(kept.unpacked().choices) == list(choices), "in their order, too"
    assert plan.unpacked() == plan, "as earlier versions wrote it"
    assert plan.packed() == kept.unpacked().packed(), "the bytes follow from the content alone"
    assert not plan.alike


@given(CHOICES)
def test_equal_ranks_are_one_map(choices: dict[str, Choice]) -> None:
    shared = share_ranks(choices)
    assert shared == choices
    kept = RoundPlan(round=1, reason="", choices=choices).packed()
    for agent, other in kept.alike.items():
        assert kept.choices[agent].ranks == {}
        assert choices[agent].ranks == choices[other].ranks
        assert other not in kept.alike
        assert shared[agent].ranks is shared[other].ranks
