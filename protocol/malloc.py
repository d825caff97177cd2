"""What glibc is told about memory (mallopt(3)): as it comes, it gives pages back to the kernel that are wanted again at once.

Each page that comes back is zeroed first: of a daemon that was a third of the processor time of a transfer, of a training child
half of what it takes to read a model and to write an update, of an exact sum of products 40 %.  So pages are kept while there is
work, up to the limits that glibc's own adjustment would come to, and given back when it is done.  Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
from typing import Final

_LIMITS: Final = {-1: 64 * 2**20, -3: 32 * 2**20}
"""M_TRIM_THRESHOLD: free memory that is kept; M_MMAP_THRESHOLD: what is larger is given back at once."""
_ARENA_MAX: Final = -8


def keep_pages(*, is_one_arena: bool) -> None:
    """Call it at the start of a process.  One arena suits threads that take turns: of many, each keeps the most it ever held."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in (_LIMITS | ({_ARENA_MAX: 1} if is_one_arena else {})).items():
            mallopt(parameter, value)


def give_back() -> None:
    """What is free is the kernel's again.  Costs some milliseconds."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
