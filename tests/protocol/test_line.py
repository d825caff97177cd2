"""Which transfers begin: so many as can use the credit twice over, in the order in which they came, whoever stands still."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from protocol.line import OVERBOOKED, STILL_S, Key, Line

BUDGET = 100
ROOM = OVERBOOKED * BUDGET


def keys(n: int) -> list[Key]:
    return [(f"a{number}", "x") for number in range(n)]


def full_line(n: int, n_bytes: int) -> Line:
    line = Line(BUDGET)
    for key in keys(n):
        line.join(key, n_bytes)
    return line


def test_those_that_fit_begin_in_the_order_in_which_they_came() -> None:
    line = full_line(9, 50)
    assert line.begin(0.0) == keys(4)
    assert line.begin(0.0) == []
    line.leave(keys(9)[2])
    assert line.begin(0.0) == [keys(9)[4]]


def test_one_that_is_larger_than_the_room_begins_alone() -> None:
    line = full_line(3, ROOM + 1)
    assert line.begin(0.0) == keys(1)
    line.leave(keys(1)[0])
    assert line.begin(0.0) == [keys(2)[1]]


def test_one_that_leaves_the_line_is_not_begun() -> None:
    line = full_line(6, 50)
    line.leave(keys(6)[1])
    assert line.begin(0.0) == [key for key in keys(5) if key != keys(6)[1]]


def test_who_stands_still_keeps_nobody_waiting() -> None:
    line = full_line(6, 50)
    first = line.begin(0.0)
    line.moved(first[0], 1.0)
    assert line.wake_at == STILL_S
    assert line.begin(STILL_S - 0.01) == []
    assert line.begin(STILL_S) == keys(6)[4:], "three of four brought nothing"
    line.moved(first[1], STILL_S)
    assert line.wake_at is None, "nobody waits"


def test_the_one_that_moves_keeps_its_place() -> None:
    line = full_line(5, 50)
    line.begin(0.0)
    for now in range(100):
        assert line.begin(float(now)) == []
        for key in keys(4):
            line.moved(key, float(now))


@given(
    st.lists(st.tuples(st.sampled_from(["join", "leave", "moved", "begin"]), st.integers(0, 7), st.integers(1, 120)))
)
def test_whatever_happens_no_more_is_begun_than_fits_and_nobody_is_forgotten(steps: list[tuple[str, int, int]]) -> None:
    line, waiting, clock = Line(BUDGET), dict[Key, int](), count(step=0.5)
    places: dict[Key, tuple[int, float]] = {}
    for what, number, n_bytes in steps:
        key, now = (f"a{number}", "x"), next(clock)
        match what:
            case "join" if key not in places and key not in waiting:
                line.join(key, n_bytes)
                waiting[key] = n_bytes
            case "leave":
                line.leave(key)
                waiting.pop(key, None)
                places.pop(key, None)
            case "moved" if key in places and now - places[key][1] < STILL_S:
                line.moved(key, now)
                places[key] = (places[key][0], now)
            case "begin":
                moving = {k: p for k, p in places.items() if now - p[1] < STILL_S}
                begun = line.begin(now)
                assert begun == list(waiting)[: len(begun)]
                places = moving | {k: (waiting.pop(k), now) for k in begun}
                used = sum(n for n, _ in places.values())
                assert used <= ROOM or len(places) == 1
                assert not waiting or used + next(iter(waiting.values())) > ROOM
                assert (line.wake_at is None) == (not waiting)
