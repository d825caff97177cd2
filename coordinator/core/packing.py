"""What most agents have in common is held once: in memory, and in a snapshot.

Agents with one base list the same matrices, and most are planned for with the same ranks: of a model with 6,000 matrices each
list has a quarter of a megabyte as bytes and a whole one as objects.
"""

from __future__ import annotations

from typing import Final

import msgspec

from coordinator.core.state import JobState
from protocol.messages import Matrix, Surveyed

MAX_LISTS: Final = 8
"""Lists of matrices that a snapshot may hold for more than one agent: honest agents have one."""


def share_matrices(state: JobState, found: Surveyed) -> Surveyed:
    """The same, with another agent's list of matrices if that is equal: of 6,000 each takes a megabyte.  O(different lists)."""
    lists = (member.surveyed.matrices for member in state.members.values() if member.surveyed)
    known = next((known for known in lists if _same(known, found.matrices)), found.matrices)
    return msgspec.structs.replace(found, matrices=known)


def packed(state: JobState) -> JobState:
    """The same for a snapshot: of equal lists of matrices, and of equal ranks, the first alone.  Linear in members."""
    firsts: list[tuple[str, list[Matrix]]] = []
    members, alike = dict(state.members), {}
    for agent, member in state.members.items():
        if found := member.surveyed:
            known = next((other for other, matrices in firsts if _same(matrices, found.matrices)), "")
            if known:
                brief = msgspec.structs.replace(found, matrices=found.matrices[:1])  # one at least: Surveyed
                members[agent], alike[agent] = msgspec.structs.replace(member, surveyed=brief), known
            elif len(firsts) < MAX_LISTS:
                firsts.append((agent, found.matrices))
    return msgspec.structs.replace(state, members=members, alike=alike, plan=state.plan and state.plan.packed())


def unpack(state: JobState) -> None:
    """Undo that, and let snapshots of earlier versions hold equal lists once, too."""
    for agent, member in state.members.items():
        if found := member.surveyed:
            known = state.members[state.alike[agent]].surveyed if agent in state.alike else None
            member.surveyed = (
                msgspec.structs.replace(found, matrices=known.matrices) if known else share_matrices(state, found)
            )
    state.alike = {}
    state.plan = state.plan and state.plan.unpacked()


def _same(one: list[Matrix], other: list[Matrix]) -> bool:
    return one is other or one == other
