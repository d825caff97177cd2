"""The soak in small: a minute of random faults under a fixed seed, and every promise is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.soak import plain_say, soak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


async def test_a_minute_of_faults_breaks_no_promise(tmp_path: Path, base: Path, texts: dict[str, Path]) -> None:
    two = dict(sorted(texts.items())[:2])
    account = await soak(tmp_path / "fleet", base, two, seed=4711, minutes=0.75, say=plain_say, mean_gap_s=5.0)
    assert account.broken == []
    assert account.faults.total() >= 3
    assert account.books is not None
    assert account.books.accepted > 0
    assert account.books.folded_again > 0
