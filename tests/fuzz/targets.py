"""Every target by its name: a function that takes any bytes and returns, whatever they are.

A target may meet the errors of protocol/errors.py and handles them; any other exception is a crash, and so is a broken law.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tests.fuzz import arrival, bulk, cloud, edge, files, wire

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "codec": wire.codec_bytes,
    "forged": wire.codec_forged,
    "arrival": arrival.arrival,
    "frame": wire.frame,
    "bitmap": wire.bitmap,
    "tensor": wire.tensor,
    "update": files.update,
    "model": files.model,
    "tar": files.tar,
    "transfer": bulk.transfer,
    "session": edge.session,
    "round": cloud.round_,
}

UNGUIDED: Final = {"forged"}
"""What these run is C, which says nothing of its edges: by mutation alone the fuzzer would stay with its first inputs."""
