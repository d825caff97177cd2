"""What `fedpipe demo` was asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the demo.

    `model` is the folder of a Hugging Face model, or "auto" for a small one that is made on this machine; `data` is a folder
    with one file per agent, or "auto" for text found on this machine; `broker` is "embedded", "mosquitto" or a url.
    Everything is written below `out`.
    """

    agents: int = 3
    rounds: int = 5
    model: str = "auto"
    data: str = "auto"
    broker: str = "embedded"
    out: Path = Path("fedpipe-demo")
    seed: int = 0
    json: bool = False
