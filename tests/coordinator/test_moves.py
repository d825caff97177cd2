"""The table of phases: what is documented is what is obeyed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from coordinator.core.state import ENDED, MOVES, Phase

ROOT = Path(__file__).parents[2]


def test_the_documented_diagram_is_drawn_from_the_table() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "draw-rounds")]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert drawn.count("-->") == 1 + sum(map(len, MOVES.values())) + len(ENDED)
    page = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8")
    assert drawn in page, "copy the output of scripts/draw-rounds into docs/rounds.md"


def test_every_phase_is_explained_on_the_page() -> None:
    page = (ROOT / "docs" / "rounds.md").read_text(encoding="utf-8")
    assert [phase for phase in Phase if f"| `{phase}` |" not in page] == []


def test_every_phase_can_be_reached_and_left_until_the_end() -> None:
    reached, todo = {Phase.WAITING}, [Phase.WAITING]
    while todo:
        new = MOVES[todo.pop()] - reached
        reached |= new
        todo += new
    assert reached == set(Phase) == set(MOVES)
    assert {phase for phase, after in MOVES.items() if not after} == ENDED
    assert all(Phase.CANCELLED in MOVES[phase] for phase in set(Phase) - ENDED), "an operator can always end a job"
