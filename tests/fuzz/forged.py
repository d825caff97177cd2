"""Messages that a hostile peer would write: the fields of a real one, some of them out of bounds, of another type or missing.

What a message has is read off its type, so a new message or field is forged without a change here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any, TypeAlias

import msgspec
from msgspec import inspect

from protocol.messages import Body, Envelope
from tests.fuzz.script import Script

SESSIONS = [f"{n:016x}" for n in range(3)]
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 1024, 1025, 2**24, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, -(2**63)]
REALS = [0.0, -0.0, 1.0, 0.5, -1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300, 1e9, 1e11, 2.0**53]
TEXTS = [
    "",
    "a",
    "x",
    "a-1",
    "qlora",
    "lora",
    "../../etc",
    "a/b",
    "a\0b",
    "\ud7ff\u2028\n",
    "A",
    "-",
    "%s{0}",
    "é" * 70,
]
HEX = "0123456789abcdef"


ONE_IN = [64, 8, 256, 2]
"""How often a message lies: a single lie in a message that is true otherwise gets deeper than many."""
SIZES = [0, 1, 2, 64, 65, 256, 257, 1025, 3000]
MAX_DISTINCT = 3
"""Members of a long list that differ: a thousand more of them would say the same."""


class Liar(Script):
    """A script that lies now and then; where it ends it is honest, so that every input tells whole messages."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.one_in = self.pick(ONE_IN)

    @property
    def lies(self) -> bool:
        """Whether to lie now."""
        return self.below(self.one_in) == self.one_in - 1


Forge: TypeAlias = Callable[[Liar, int], Any]
"""Makes a value of one type, so deep inside the message."""


@cache
def _bodies() -> tuple[Forge, ...]:
    found = inspect.type_info(Body)
    assert isinstance(found, inspect.UnionType)
    return tuple(_struct(kind) for kind in found.types if isinstance(kind, inspect.StructType))


@cache
def _fields_of_envelope() -> list[str]:
    found = inspect.type_info(Envelope)
    assert isinstance(found, inspect.StructType)
    return [field.name for field in found.fields]


def message(data: bytes) -> bytes:
    """An envelope with some body, as msgpack."""
    liar = Liar(data)
    tree: dict[Any, Any] = {"v": 1, "ts": 1.75e9, "ses": SESSIONS[1], "seq": 1, "b": liar.pick(_bodies())(liar, 0)}
    if liar.below(8) == 7:
        tree |= {liar.pick(_fields_of_envelope()): _anything(liar, 0), "ses": liar.pick(SESSIONS)}
    return msgspec.msgpack.encode(tree)


def _struct(kind: inspect.StructType) -> Forge:
    fields = [(field.encode_name, field.required, _forge(field.type)) for field in kind.fields]
    tag = {kind.tag_field: kind.tag} if kind.tag_field else {}

    def forge(script: Liar, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = dict(tag)
        for name, required, value in fields:
            if not required and script.below(4) == 0:
                continue
            if script.lies:
                if script.below(2):
                    found[name] = _anything(script, depth)
            else:
                found[name] = value(script, depth + 1)
        if script.below(32) == 31:
            found[script.pick(TEXTS)] = _anything(script, depth)
        return found

    return forge


def _forge(kind: inspect.Type) -> Forge:
    """What makes values of this type, its choices drawn up once."""
    match kind:
        case inspect.IntType(ge=low, le=high):
            bounds = [n for n in (low, high) if n is not None]
            return _number([*bounds, *NUMBERS[:8], *(n + d for n in bounds for d in (-1, 1))], kind)
        case inspect.FloatType():
            return _number(REALS, kind)
        case inspect.BoolType():
            return _one_of([False, True], [])
        case inspect.StrType():
            return _text(kind)
        case inspect.BytesType():
            return lambda script, _: script.take(script.below(64))
        case inspect.NoneType():
            return lambda _, __: None
        case inspect.LiteralType(values=values):
            return _one_of(list(values), ["other"])
        case inspect.EnumType(cls=cls):
            return _one_of([member.value for member in cls], ["OTHER"])
        case inspect.StructType():
            return _struct(kind)
        case inspect.UnionType(types=types):
            each = [_forge(t) for t in types]
            return lambda script, depth: script.pick(each)(script, depth)
        case inspect.ListType(item_type=item):
            return _list(_forge(item), *_sizes(kind))
        case inspect.TupleType(item_types=items):
            every = [_forge(item) for item in items]
            return lambda script, depth: [forge(script, depth + 1) for forge in every]
        case inspect.DictType(key_type=key, value_type=value):
            return _dict(_forge(key), _forge(value), *_sizes(kind))
    return _anything


def _one_of(good: Sequence[Any], bad: Sequence[Any]) -> Forge:
    if not bad:
        return lambda script, _: script.pick(good)
    return lambda script, _: script.pick(bad if script.lies else good)


def _number(choices: Sequence[float], kind: inspect.IntType | inspect.FloatType) -> Forge:
    def fits(x: float) -> bool:
        return (
            (kind.ge is None or x >= kind.ge)
            and (kind.gt is None or x > kind.gt)
            and (kind.le is None or x <= kind.le)
            and (kind.lt is None or x < kind.lt)
        )

    return _one_of([x for x in choices if fits(x)], [x for x in choices if not fits(x)])


def _text(kind: inspect.StrType) -> Forge:
    shortest, longest = kind.min_length or 0, kind.max_length
    digests = [digit * n for n in (0, 16, 32, 64) for digit in HEX]
    ends = ["z" * (longest + d) for d in (0, 1)] if longest else ["z" * 3000]

    def fits(text: str) -> bool:
        within = shortest <= len(text) <= (len(text) if longest is None else longest)
        return within and re.search(kind.pattern or "", text) is not None

    choices = [*TEXTS, *ends, *(digests if kind.pattern else [])]
    return _one_of([text for text in choices if fits(text)], [text for text in choices if not fits(text)])


def _sizes(kind: inspect.ListType | inspect.DictType) -> tuple[list[int], list[int]]:
    """Lengths that are allowed, mostly small ones, and lengths that are not."""
    least, most = kind.min_length or 0, SIZES[-1] if kind.max_length is None else kind.max_length
    good = [n for n in SIZES if least <= n <= most]
    return [*good[:2] * 16, *good], [n for n in SIZES if n not in good] or [SIZES[-1]]


def _length(script: Liar, depth: int, good: list[int], bad: list[int]) -> int:
    n = script.pick(bad if script.lies else good)
    return n if depth < 4 else min(n, 2)


def _list(forge: Forge, good: list[int], bad: list[int]) -> Forge:
    def forge_all(script: Liar, depth: int) -> list[Any]:
        n = _length(script, depth, good, bad)
        made = [forge(script, depth + 1) for _ in range(min(n, MAX_DISTINCT))]
        return made if n == len(made) else list(islice(cycle(made), n))

    return forge_all


def _dict(key: Forge, value: Forge, good: list[int], bad: list[int]) -> Forge:
    def forge_all(script: Liar, depth: int) -> dict[Any, Any]:
        n = _length(script, depth, good, bad)
        made = [(key(script, depth + 1), value(script, depth + 1)) for _ in range(min(n, MAX_DISTINCT))]
        return dict(made) if n == len(made) else {f"{k}{i}": v for i, (k, v) in enumerate(islice(cycle(made), n))}

    return forge_all


def _anything(script: Script, depth: int) -> Any:
    match script.below(8):
        case 0:
            return script.pick(NUMBERS)
        case 1:
            return script.pick(REALS)
        case 2:
            return script.pick(TEXTS)
        case 3:
            return script.take(script.below(16))
        case 4:
            return None
        case 5:
            return [_anything(script, depth + 1) for _ in range(script.below(3))] if depth < 50 else []
        case 6:
            return {script.pick(TEXTS): _anything(script, depth + 1)} if depth < 50 else {}
    deep: list[Any] = []
    for _ in range(script.below(600)):
        deep = [deep]
    return deep
