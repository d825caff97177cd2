"""What both sides must agree on: topics, messages, codec, tensors, transfers; plus the bus and the daemons' scaffolding."""

from importlib.metadata import version
from typing import Final

SOFTWARE: Final = f"fedpipe {version('fedpipe')}"
"""Who we say we are: on the bus, over HTTP, in exported folders."""
