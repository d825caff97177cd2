"""Alarms against a dictionary of times."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.alarms import Alarms

STEPS = st.lists(
    st.tuples(st.just("set"), st.integers(0, 4), st.integers(0, 30))
    | st.tuples(st.just("cancel"), st.integers(0, 4), st.just(0))
    | st.tuples(st.just("ring"), st.just(0), st.integers(0, 5)),
    max_size=60,
)


@given(STEPS)
def test_each_rings_once_at_the_last_time_that_was_set(steps: list[tuple[str, int, int]]) -> None:
    alarms: Alarms[int] = Alarms()
    due: dict[int, float] = {}
    now = 0
    for what, key, number in steps:
        if what == "set":
            alarms.set(key, now + number)
            due[key] = now + number
        elif what == "cancel":
            alarms.cancel(key)
            due.pop(key, None)
        else:
            now += number
            rung = alarms.ring(now)
            assert sorted(rung) == sorted(key for key, at in due.items() if at <= now)
            due = {key: at for key, at in due.items() if at > now}
            assert alarms.wake_at is None or alarms.wake_at > now, "the clock would spin"
        assert [key in alarms for key in range(5)] == [key in due for key in range(5)]
        assert (alarms.wake_at is None) == (not due)
        assert alarms.wake_at is None or alarms.wake_at <= min(due.values()), "somebody would sleep too long"


def test_moving_to_later_does_not_grow_the_heap() -> None:
    alarms: Alarms[str] = Alarms()
    for at in range(10_000):
        alarms.set("a", at)
    assert len(alarms._heap) == 1
    assert alarms.ring(9_998) == []
    assert alarms.wake_at == 9_999
