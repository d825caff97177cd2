"""One target under libFuzzer, in a process of its own: `python -m tests.fuzz.child TARGET [libFuzzer's options]`."""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from typing import Any, Final

import atheris  # type: ignore[import-untyped]

OURS: Final = ["protocol", "agent", "coordinator", "fedpipe"]
DERIVED: Final = ["coordinator.core.roster"]
"""Every event runs through it: its branches take a third of the time, and show in what the jobs then do."""

with atheris.instrument_imports(include=OURS, exclude=DERIVED):
    from tests.fuzz.files import scratch
    from tests.fuzz.targets import TARGETS, UNGUIDED


def often_anew(data: bytes, max_size: int, seed: int) -> bytes:
    """Every other input from scratch, the rest from the one at hand."""
    if seed % 2:
        return bytes(atheris.Mutate(data, max_size))
    draw = random.Random(seed)
    return draw.randbytes(draw.randint(1, max_size))


if __name__ == "__main__":
    logging.disable()
    tempfile.tempdir = scratch("child").name
    name = sys.argv[1]
    again = f"{sys.executable} -m tests.fuzz.child {name}"  # how libFuzzer starts its helpers, by sh
    options: dict[str, Any] = {"custom_mutator": often_anew} if name in UNGUIDED else {}
    atheris.Setup([again, *sys.argv[2:]], TARGETS[name], enable_python_coverage=True, **options)
    atheris.Fuzz()
