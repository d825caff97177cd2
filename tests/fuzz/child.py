"""One target under libFuzzer, in a process of its own: `python -m tests.fuzz.child TARGET [libFuzzer's options]`."""

from __future__ import annotations

import logging
import sys

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["protocol", "agent", "coordinator", "fedpipe"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    logging.disable()
    target = TARGETS[sys.argv[1]]
    again = f"{sys.executable} -m tests.fuzz.child {sys.argv[1]}"  # how libFuzzer starts its helpers, by sh
    atheris.Setup([again, *sys.argv[2:]], target, enable_python_coverage=True)
    atheris.Fuzz()
