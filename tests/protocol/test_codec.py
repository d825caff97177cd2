"""The codec: every message survives the trip, everything else is one error and little memory."""

import contextlib
import enum
import tracemalloc
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from protocol.codec import MAX_MESSAGE_BYTES, decode, encode
from protocol.errors import BadMessage
from protocol.messages import Body, Cancel, Done, Execution, Grant, Matrix, Presence, Progress, Surveyed

SESSION = "0123456789abcdef"


def strategy(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a message field, from the same annotations that the decoder checks; so new messages are covered too."""
    match kind:
        case inspect.IntType():
            return st.integers(
                kind.ge if kind.ge is not None else -(2**63), kind.le if kind.le is not None else 2**63 - 1
            )
        case inspect.FloatType():
            low = kind.ge if kind.ge is not None else kind.gt
            high = kind.le if kind.le is not None else kind.lt
            return st.floats(
                low, high, exclude_min=kind.gt is not None, exclude_max=kind.lt is not None, allow_nan=False
            )
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern, alphabet="abcdef0123456789-")
        case inspect.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=min(kind.max_length or 20, 20))
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.EnumType():
            return st.sampled_from(list[enum.Enum](kind.cls))
        case inspect.BytesType(max_length=most):
            return st.binary(max_size=min(most or 64, 64))
        case inspect.ListType():
            return st.lists(
                strategy(kind.item_type),
                min_size=kind.min_length or 0,
                max_size=min((kind.min_length or 0) + 3, kind.max_length or 9),
            )
        case inspect.TupleType():
            return st.tuples(*map(strategy, kind.item_types))
        case inspect.DictType():
            return st.dictionaries(strategy(kind.key_type), strategy(kind.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of(*map(strategy, kind.types))
        case inspect.StructType():
            return st.builds(kind.cls, **{field.name: strategy(field.type) for field in kind.fields})
    raise NotImplementedError(kind)


def wrap(body: object, **changes: object) -> bytes:
    """An envelope around raw builtins, with any field replaced."""
    raw: bytes = msgpack.packb({"v": 1, "ts": 1.0, "ses": SESSION, "seq": 0, "b": body} | changes)
    return raw


@pytest.mark.parametrize("kind", get_args(Body), ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_every_message_survives_the_trip(kind: type, data: st.DataObject) -> None:
    body = data.draw(strategy(inspect.type_info(kind)))
    envelope = decode(encode(body, session=SESSION, seq=3, now=12.5))
    assert envelope.b == body
    assert type(envelope.b) is kind
    assert (envelope.v, envelope.ts, envelope.ses, envelope.seq) == (1, 12.5, SESSION, 3)


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_are_a_bad_message(payload: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(payload)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(JSON, st.sampled_from(["v", "ts", "ses", "seq", "b"]))
def test_any_value_in_any_field_is_accepted_or_a_bad_message(value: object, field: str) -> None:
    try:
        decode(wrap({"t": "rebirth"}, **{field: value}))
    except BadMessage:
        return
    assert field in {"v", "ts", "seq"}, "only a number can have been acceptable"


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_message_is_accepted_or_a_bad_message(data: st.DataObject) -> None:
    payload = bytearray(encode(Grant(xfer="0" * 32, ranges=[(0, 8), (12, 4)]), session=SESSION, seq=1, now=1.0))
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), min_size=1, max_size=4)):
        payload[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadMessage):
        decode(bytes(payload))


def test_a_flipped_bit_changes_nothing_that_is_said() -> None:
    whole = encode(Grant(xfer="0" * 32, ranges=[(0, 8), (12, 4)]), session=SESSION, seq=1, now=1.0)
    said, n_refused = decode(whole), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(damaged))
        except BadMessage:
            n_refused += 1
        else:
            assert msgspec.structs.replace(found, crc=said.crc) == said
    assert n_refused > 8 * (len(whole) - 8)  # the rest are bits of the checksum's own name, which is then unknown


def test_damage_is_counted_as_such() -> None:
    whole = encode(Cancel(job="job", round=1, attempt=1), session=SESSION, seq=1, now=1.0)
    with pytest.raises(BadMessage, match="damaged") as refused:
        decode(whole.replace(b"job", b"jab"))
    assert refused.value.kind == "damaged"


def test_every_truncation_is_a_bad_message() -> None:
    payload = encode(Presence(session=SESSION, online=True, methods=["qlora"]), session=SESSION, seq=0, now=1.0)
    for length in range(len(payload)):
        with pytest.raises(BadMessage):
            decode(payload[:length])
    with pytest.raises(BadMessage):
        decode(payload + b"\x00")


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], {}, 1.5, b"1", 2**64 - 1])
def test_another_version_is_refused_and_says_so(version: object) -> None:
    with pytest.raises(BadMessage, match="upgrade"):
        decode(wrap({"t": "rebirth"}, v=version))


@pytest.mark.parametrize(
    "body",
    [
        {"t": "nonsense"},
        {},
        [],
        None,
        {"t": "done"},
        {"t": "done", "xfer": "../../../etc/passwd"},
        {"t": "done", "xfer": "0" * 31},
        {"t": "done", "xfer": 7},
        {"t": "done", "xfer": "0" * 32 + "\n"},
        {"t": "grant", "xfer": "0" * 32, "ranges": []},
        {"t": "grant", "xfer": "0" * 32, "ranges": [[-1, 1]]},
        {"t": "grant", "xfer": "0" * 32, "ranges": [[0, 0]]},
        {"t": "grant", "xfer": "0" * 32, "ranges": [[0, 10**6]]},
        {"t": "grant", "xfer": "0" * 32, "ranges": [[0, 1]] * 257},
        {"t": "cancel", "job": "Not An Id", "round": 1, "attempt": 1},
        {"t": "cancel", "job": "a/b", "round": 1, "attempt": 1},
        {"t": "cancel", "job": "job\n", "round": 1, "attempt": 1},
        {"t": "cancel", "job": "job", "round": 2**60, "attempt": 1},
        {"t": "cancel", "job": "job", "round": 1, "attempt": 1, "reason": "x" * 2001},
        {"t": "exec", "job": "job", "round": 1, "attempt": 1, "serial": 1, "state": "WHATEVER"},
        {"t": "report", "cpu_load_ratio": float("nan")},
    ],
)
def test_an_impossible_body_is_refused(body: object) -> None:
    with pytest.raises(BadMessage):
        decode(wrap(body))


def test_unknown_fields_are_ignored_so_that_minor_versions_can_add_some() -> None:
    assert decode(wrap({"t": "rebirth", "urgency": {"much": [1, 2]}}, extra=[])).b.__class__.__name__ == "Rebirth"


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1v", b"\xdc\x00\x01"], ids=["array", "map", "array16"])
def test_deep_nesting_is_a_bad_message(opening: bytes) -> None:
    for depth in (100, 1_000, 10_000, 500_000):
        with pytest.raises(BadMessage):
            decode(opening * depth + b"\xc0")


@pytest.mark.parametrize(
    "lie",
    [
        b"\xdd\xff\xff\xff\xff",  # array of 4 G
        b"\xdf\xff\xff\xff\xff",  # map of 4 G
        b"\xdb\xff\xff\xff\xff",  # text of 4 GB
        b"\xc6\xff\xff\xff\xff",  # bytes of 4 GB
        b"\xc9\xff\xff\xff\xff\x01",  # extension of 4 GB
        b"\xdd\x00\x00\x4e\x20" * 1000,  # an array of 20,000 in an array of 20,000 in ...
    ],
)
def test_a_claimed_length_allocates_nothing(lie: bytes) -> None:
    payload = wrap(None)[:-1] + lie
    tracemalloc.start()
    with pytest.raises(BadMessage):
        decode(payload)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20


def test_a_message_above_the_limit_is_refused_on_both_sides() -> None:
    with pytest.raises(BadMessage, match="exceeds"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))
    matrices = [Matrix(name=f"{i:0199d}", d_out=1, d_in=1) for i in range(20_000)]
    body = Execution(
        job="job",
        round=0,
        attempt=0,
        serial=0,
        state="DONE",  # type: ignore[arg-type]
        surveyed=Surveyed(base_sha256="0" * 64, matrices=matrices, n_train=1, n_eval=1),
    )
    with pytest.raises(BadMessage, match="exceeds"):
        encode(body, session=SESSION, seq=0, now=0.0)


def test_the_error_names_the_field() -> None:
    with pytest.raises(BadMessage, match=r"\$\.b\.round"):
        decode(wrap({"t": "cancel", "job": "job", "round": -1, "attempt": 1}))


def test_what_arrives_is_typed() -> None:
    envelope = decode(encode(Cancel(job="job", round=1, attempt=2), session=SESSION, seq=0, now=0.0))
    with pytest.raises(AttributeError):
        envelope.b.job = "other"  # type: ignore[union-attr,misc]
    assert msgspec.structs.asdict(decode(encode(Progress(), session=SESSION, seq=1, now=0.0)).b)["phase"] == "idle"
    assert decode(encode(Done(xfer="a" * 32), session=SESSION, seq=1, now=0.0)).b == Done(xfer="a" * 32)
