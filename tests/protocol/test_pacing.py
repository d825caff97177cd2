"""A token bucket for bulk: the mean is the cap, for chunks of any size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.pacing import BURST_S, EARLY_S, LOOK_S, Pace


@given(st.lists(st.integers(1, 4 * 2**20), min_size=2, max_size=60), st.floats(1e3, 1e9))
def test_the_mean_is_the_cap_whatever_the_chunks(sizes: list[int], bytes_per_s: float) -> None:
    pace, now = Pace(bytes_per_s), 100.0
    for size in sizes:
        while (wait_s := pace.wait_s(now)) > 0:
            now += wait_s
        pace.take(size, now)
    earliest = (sum(sizes[:-1]) / bytes_per_s) - BURST_S
    assert earliest - len(sizes) * EARLY_S <= now - 100 <= max(0, earliest + EARLY_S) + 1e-6 * sum(sizes) / bytes_per_s


@pytest.mark.parametrize(("unit_bytes", "n"), [(100, 2), (1000, 1)])
def test_what_may_go_at_once_is_the_burst_and_at_least_one(unit_bytes: int, n: int) -> None:
    assert Pace(1000.0).most(0, unit_bytes) == n


def test_without_a_cap_nothing_waits_and_closed_everything_does() -> None:
    pace = Pace()
    pace.take(10**12, 0)
    assert pace.wait_s(0) == 0
    pace.renew(0, is_open=False)
    assert pace.wait_s(0) == LOOK_S
    pace.renew(1000)
    assert pace.wait_s(0) == 0
    pace.take(1250, 0)
    assert pace.wait_s(0) == 1
