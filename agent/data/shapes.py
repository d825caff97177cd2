"""Rows -> examples: the shapes in which people keep instruction data.

    messages                          a conversation [{role, content}, ...]; every assistant turn is one example
    prompt, completion                as they stand, nothing between them
    instruction (+ input), output     one user turn and its answer
    text                              no prompt: every token is learnt

A row with an empty completion has nothing to teach and is passed over; a field that is missing or of another type is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from agent.data import DataConfig, Example, Shape, Turn
from agent.data.files import Row, kind
from protocol.errors import BadConfig

MARKS: Final[dict[Shape, tuple[str, ...]]] = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The fields that a row of each shape must have; the first shape that fits is taken."""


def examples(rows: Iterable[Row], config: DataConfig) -> Iterator[Example]:
    """The examples of all rows, in order.  Raises BadConfig naming file, line and field."""
    for where, found in rows:
        fields = {**found, **{ours: found[theirs] for ours, theirs in config.fields.items() if theirs in found}}
        shape = config.shape or _shape_of(fields, where)
        key = _key(shape, fields)
        match shape:
            case "messages":
                yield from _conversation(key, fields, where)
                continue
            case "prompt":
                example = Example(key, _text(fields, "prompt", where), _text(fields, "completion", where))
            case "instruction":
                example = Example(key, (Turn("user", _instruction(fields, where)),), _text(fields, "output", where))
            case "text":
                example = Example(key, "", _text(fields, "text", where))
        if example.completion.strip():
            yield example


def _shape_of(fields: Mapping[str, Any], where: str) -> Shape:
    for shape, marks in MARKS.items():
        if all(mark in fields for mark in marks):
            return shape
    known = "; ".join(" + ".join(marks) for marks in MARKS.values())
    raise BadConfig(
        f"{where}: fields {sorted(map(str, fields))[:12]} are none of the known shapes ({known}): set `fields`"
    )


def _key(shape: Shape, fields: Mapping[str, Any]) -> bytes:
    """16 bytes that only the learnt content decides: neither its place nor a column that is not used."""
    names = {"messages": ("messages",), "instruction": ("instruction", "input", "output")}.get(shape, MARKS[shape])
    content = json.dumps([fields.get(name) for name in names], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise BadConfig(f"{where}: field '{name}' is missing")
    value = fields[name]
    if not isinstance(value, str):
        raise BadConfig(f"{where}: field '{name}' must be text, got {kind(value)}")
    return value


def _instruction(fields: Mapping[str, Any], where: str) -> str:
    instruction = _text(fields, "instruction", where)
    more = "" if fields.get("input") is None else _text(fields, "input", where)
    return f"{instruction}\n\n{more}" if more.strip() else instruction


def _conversation(key: bytes, fields: Mapping[str, Any], where: str) -> Iterator[Example]:
    messages = fields.get("messages")
    if not isinstance(messages, list):
        raise BadConfig(f"{where}: field 'messages' must be a list, got {kind(messages)}")
    turns: list[Turn] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadConfig(f"{where}: field 'messages[{number}]' must be an object, got {kind(message)}")
        named = {f"messages[{number}].{part}": message.get(part) for part in ("role", "content")}
        turn = Turn(*(_text(named, part, where) for part in named))
        if turn.role == "assistant" and turn.content.strip():
            yield Example(key, tuple(turns), turn.content)
        turns.append(turn)
    if not any(turn.role == "assistant" for turn in turns):
        raise BadConfig(f"{where}: field 'messages' has no assistant turn to learn from")
