"""A configuration read anew while its daemon runs (SIGHUP): what can change does, what cannot is named, a bad file changes nothing.

    systemctl reload -> SIGHUP -> RELOADING=1 -> read, compare, apply -> READY=1, STATUS: what still waits for a restart

Which keys can change is each daemon's own table of dotted names; a name stands for everything below it.  sd_notify(3) wants the
monotonic clock with RELOADING, so that systemd can tell this reload's READY from an older one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from protocol.daemon import load_toml, notify, set_up_logging
from protocol.errors import OutsideFault

T = TypeVar("T", bound=msgspec.Struct)
logger = logging.getLogger(__name__)


class Live:
    """Keys that may change at run time: those below `names`, but not below `but`."""

    def __init__(self, names: Collection[str], but: Collection[str] = ()) -> None:
        self._names, self._but = tuple(names), tuple(but)

    def __contains__(self, key: str) -> bool:
        return _below(key, self._names) and not _below(key, self._but)


def _below(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the keys whose values differ; a table with keys of its own is one key."""
    found = []
    for name in old.__struct_fields__:
        before, after, key = getattr(old, name), getattr(new, name), f"{prefix}{name}"
        if isinstance(before, msgspec.Struct) and type(before) is type(after):
            found += changes(before, after, f"{key}.")
        elif before != after:
            found.append(key)
    return found


def merged(old: T, new: T, live: Live, prefix: str = "") -> T:
    """The old configuration with those values of the new one that may change at run time."""
    values: dict[str, Any] = {}
    for name in old.__struct_fields__:
        before, after, key = getattr(old, name), getattr(new, name), f"{prefix}{name}"
        if isinstance(before, msgspec.Struct) and type(before) is type(after):
            values[name] = merged(before, after, live, f"{key}.")
        elif key in live:
            values[name] = after
    return msgspec.structs.replace(old, **values)


class Reloading(Generic[T]):
    """`apply` puts a configuration into force, or raises an OutsideFault before it has changed anything."""

    def __init__(self, path: Path, config: T, live: Live, apply: Callable[[T], None]) -> None:
        self._path, self._config, self._live, self._apply = path, config, live, apply

    def listen(self) -> None:
        """Reload at each SIGHUP from now on.  Call it in the main thread's event loop."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)

    def reload(self) -> None:
        """Read the file anew."""
        notify(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))
        try:
            wanted = load_toml(self._path, type(self._config))
            config = merged(self._config, wanted, self._live)
            set_up_logging(config.log_level)  # type: ignore[attr-defined]  # both daemons' configurations have it
            self._apply(config)
        except OutsideFault as error:
            text = "the configuration was not read anew, the old one holds: %s"
            set_up_logging(self._config.log_level)  # type: ignore[attr-defined]
            logger.error(text, error, extra={"action": "reload_refused"})
            notify(READY="1", STATUS=f"reload refused: {error}")
            return
        applied = changes(self._config, config)
        waiting = changes(config, wanted)
        self._config = config
        extra = {"action": "reloaded", "applied": ",".join(applied) or "none"}
        logger.info("the configuration was read anew", extra=extra)
        if waiting:
            text = f"restart for: {', '.join(waiting)}"
            logger.warning("%s", text, extra={"action": "restart_needed"})
        notify(READY="1", STATUS=text if waiting else "configuration read anew")
