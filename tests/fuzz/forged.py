"""Messages that a hostile peer would write: the fields of a real one, some of them out of bounds, of another type or missing.

What a message has is read off its type, so a new message or field is forged without a change here.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

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


@cache
def _fields(kind: type) -> inspect.StructType:
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return found


@cache
def _bodies() -> tuple[inspect.StructType, ...]:
    found = inspect.type_info(Body)
    assert isinstance(found, inspect.UnionType)
    return tuple(t for t in found.types if isinstance(t, inspect.StructType))


def message(script: Script) -> bytes:
    """An envelope with some body, as msgpack."""
    kind = script.pick(_bodies())
    body = _struct(kind, script, 0) | {kind.tag_field or "t": kind.tag}
    tree: dict[Any, Any] = {"v": 1, "ts": 1.75e9, "ses": script.pick(SESSIONS), "seq": 1, "b": body}
    if script.below(8) == 0:
        tree |= {script.pick([f.name for f in _fields(Envelope).fields]): _anything(script, 0)}
    return msgspec.msgpack.encode(tree)


def _struct(kind: inspect.StructType, script: Script, depth: int) -> dict[Any, Any]:
    found = {}
    for field in kind.fields:
        whim = script.below(16)
        if whim == 0 or (whim < 6 and not field.required):
            continue
        found[field.encode_name] = _anything(script, depth) if whim == 1 else _value(field.type, script, depth + 1)
    if script.below(32) == 0:
        found[script.pick(TEXTS)] = _anything(script, depth)
    return found


def _value(kind: inspect.Type, script: Script, depth: int) -> Any:
    match kind:
        case inspect.IntType(ge=low, le=high):
            bounds = [n for n in (low, high) if n is not None]
            return script.pick([*bounds, *bounds, *(n + d for n in bounds for d in (-1, 1)), *NUMBERS[:8]])
        case inspect.FloatType():
            return script.pick(REALS)
        case inspect.BoolType():
            return bool(script.below(2))
        case inspect.StrType(pattern=pattern, max_length=longest):
            return _text(pattern or "", longest, script)
        case inspect.BytesType():
            return script.take(script.below(64))
        case inspect.NoneType():
            return None
        case inspect.LiteralType(values=values):
            return script.pick([*values, *values, "other"])
        case inspect.EnumType(cls=cls):
            return script.pick([*(member.value for member in cls), "OTHER"])
        case inspect.StructType():
            return _struct(kind, script, depth)
        case inspect.UnionType(types=types):
            return _value(script.pick(types), script, depth)
        case inspect.ListType(item_type=item):
            return [_value(item, script, depth + 1) for _ in range(_length(script, depth))]
        case inspect.TupleType(item_types=items):
            return [_value(item, script, depth + 1) for item in items]
        case inspect.DictType(key_type=key, value_type=item):
            n = _length(script, depth)
            return {_value(key, script, depth + 1): _value(item, script, depth + 1) for _ in range(n)}
    return _anything(script, depth)


def _length(script: Script, depth: int) -> int:
    n = script.below(64)
    return script.pick([3000, 257, 65]) if n == 63 and depth < 4 else n % 3


def _text(pattern: str, longest: int | None, script: Script) -> str:
    if "a-f" in pattern and script.below(8):
        n = int(pattern.split("{")[1].split("}", maxsplit=1)[0])
        return (HEX[script.below(16)] * n)[: n - (script.below(16) == 0)]
    if longest and script.below(16) == 0:
        return "z" * (longest + script.below(2))
    return script.pick(TEXTS)


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
