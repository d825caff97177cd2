"""Private text on this server's disk -> examples of a prompt and its completion, split the same way in every round.

    files.py    a file or folder in any of the usual formats -> rows with their place ("train.jsonl line 17")
    shapes.py   a row in any of the usual shapes -> examples
    split.py    examples -> train and held-out part, by a hash of their content
    tokens.py   an example -> token ids and labels

Nothing here leaves the machine; errors quote places and types, never contents.  Reading is a chain of generators: one pass,
memory of one row, until `split.load` keeps what it selects.  torch is not imported.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

Shape = Literal["messages", "prompt", "instruction", "text"]


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data set of this agent.

    Fields: path of a file or folder; shape of its rows, found by their fields if not given; fields maps our field names to
    the file's own ({"completion": "ref"}); max_examples reads only the first so many, 0 is all.
    """

    path: str
    shape: Shape | None = None
    fields: dict[str, str] = {}
    max_examples: Annotated[int, Meta(ge=0)] = 0


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class Example(NamedTuple):
    """What is learnt: the completion, given the prompt.

    A prompt of turns is rendered by the tokenizer's chat template; a prompt of text stands as it is, "" for plain text.
    The key is a digest of the row it came from: examples of one conversation share it, so no split tears them apart.
    """

    key: bytes
    prompt: str | tuple[Turn, ...]
    completion: str
