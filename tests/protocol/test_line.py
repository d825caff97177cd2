"""Which transfers begin: so many as can use the credit twice over, in the order in which they came, whoever is silent."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from protocol.line import OVERBOOKED, STILL_S, Key, Line

BUDGET = 100
ROOM = OVERBOOKED * BUDGET


def keys(n: int) -> list[Key]:
    return [(f"a{number}", "x") for number in range(n)]


class Senders(dict[Key, float]):
    """Since when each has credit and brings nothing."""


def full_line(n: int, n_bytes: int, silent: Senders | None = None) -> Line:
    line = Line(BUDGET, (Senders() if silent is None else silent).get)
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


def test_who_has_credit_and_brings_nothing_keeps_nobody_waiting() -> None:
    silent = Senders()
    line = full_line(7, 50, silent)
    first = line.begin(0.0)
    silent |= {first[0]: 0.0, first[1]: 0.5, first[2]: STILL_S}
    assert line.wake_at == STILL_S
    assert line.begin(STILL_S - 0.01) == []
    assert line.begin(STILL_S) == keys(7)[4:5]
    assert line.begin(STILL_S + 0.5) == keys(7)[5:6]
    assert line.begin(2 * STILL_S) == keys(7)[6:7]
    assert line.wake_at is None, "nobody waits"


def test_who_waits_for_credit_keeps_its_place_however_long_that_takes() -> None:
    line = full_line(5, 50)
    line.begin(0.0)
    assert [line.begin(float(now)) for now in range(1000)] == [[]] * 1000


@given(
    st.lists(st.tuples(st.sampled_from(["join", "leave", "silent", "begin"]), st.integers(0, 7), st.integers(1, 120)))
)
def test_whatever_happens_no_more_is_begun_than_fits_and_nobody_is_forgotten(steps: list[tuple[str, int, int]]) -> None:
    silent, waiting, places, clock = Senders(), dict[Key, int](), dict[Key, int](), count(step=0.5)
    line = Line(BUDGET, silent.get)
    for what, number, n_bytes in steps:
        key, now = (f"a{number}", "x"), next(clock)
        match what:
            case "join" if key not in places and key not in waiting:
                line.join(key, n_bytes)
                waiting[key] = n_bytes
            case "leave":
                line.leave(key)
                for known in (waiting, places, silent):
                    known.pop(key, None)
            case "silent" if key in places:
                silent[key] = now
            case "begin":
                begun = line.begin(now)
                assert begun == list(waiting)[: len(begun)]
                places = {k: n for k, n in places.items() if now - silent.get(k, now) < STILL_S}
                places |= {k: waiting.pop(k) for k in begun}
                assert sum(places.values()) <= ROOM or len(places) == 1
                assert not waiting or sum(places.values()) + next(iter(waiting.values())) > ROOM
                assert (line.wake_at is None) == (not waiting)
