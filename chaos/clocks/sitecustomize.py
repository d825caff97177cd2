"""A wall clock that can be wrong: with this folder on PYTHONPATH, time.time() is off by the seconds in the file $CLOCK_SHIFT.

Python imports a module of this name at its start.  The file is read at each call, so the clock can jump while a daemon runs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_right = time.time
_shift = Path(os.environ["CLOCK_SHIFT"])


def _wrong() -> float:
    try:
        return _right() + float(_shift.read_text())
    except (OSError, ValueError):
        return _right()


time.time = _wrong
