"""Spelling exercises: signatures with made-up names, and as completion just the words of the name.

    def _median_socket_path(self, x):                             Median socket path.
        \"\"\"

So small a model does not discover within minutes, from docstrings alone, that the words of the answer mostly stand in the
question; these exercises show nothing else, and the attention that copies forms in about a thousand steps.
They are made of public words only: the same text that they accompany.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Final

from fedpipe.corpus import Pair

MAX_WORDS: Final = 4
_NAME = re.compile(r"\b(def|class) (\w+)(?=[(:])")
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_WORD = re.compile(r"[A-Za-z]{3,}")


def spelling(pairs: Sequence[Pair], n: int, seed: int = 0) -> list[Pair]:
    """Make `n` exercises of the words and signatures of `pairs`; the same arguments give the same exercises."""
    words = _words(pairs)
    rng = random.Random(f"spelling {seed}")
    return [_exercise(rng.choice(pairs), rng.choices(words, k=rng.randint(2, MAX_WORDS)), rng) for _ in range(n)]


def _words(pairs: Sequence[Pair]) -> list[str]:
    found: set[str] = set()
    for pair in pairs:
        for _, name in _NAME.findall(pair.prompt):
            found.update(part.lower() for part in _PART.findall(name) if len(part) > 2)
        found.update(word.lower() for word in _WORD.findall(pair.completion))
    return sorted(found)


def _exercise(pair: Pair, words: list[str], rng: random.Random) -> Pair:
    """Give the signature's innermost definition a name of these words, in its own spelling."""
    last = list(_NAME.finditer(pair.prompt))[-1]
    snake = rng.choice(("", "_")) + "_".join(words)
    name = snake if last[1] == "def" else "".join(word.capitalize() for word in words)
    prompt = pair.prompt[: last.start(2)] + name + pair.prompt[last.end(2) :]
    return Pair(prompt, " ".join(words).capitalize() + ".")
