"""What both daemons share: configuration, clock, logs, signals, systemd, exit codes.

One TOML file per daemon, decoded into frozen Structs, so that a typo is an error with its path and not a silent default.
Logs are one line per event on stderr, with journald's priority prefix under systemd.  Exit codes tell systemd what to do:
78 configuration and 77 authentication must not loop, 69 and 75 may.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from protocol.errors import BadConfig, NotAllowed, OutsideFault, Unavailable
from protocol.malloc import keep_pages
from protocol.topics import ID_RULE

EX_OK: Final = 0
EX_SOFTWARE: Final = 70
EX_UNAVAILABLE: Final = 69
EX_TEMPFAIL: Final = 75
EX_NOPERM: Final = 77
EX_CONFIG: Final = 78
IDLE_TICK_S: Final = 1.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------ configuration


def load_toml(path: Path, kind: type[T]) -> T:
    """Read one TOML file into a Struct.  Raises BadConfig that names the file and the key."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{path}: cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: not valid TOML: {error}") from None
    return to_struct(raw, kind, str(path))


def to_struct(raw: object, kind: type[T], where: str) -> T:
    """Validate plain values against a Struct.  Raises BadConfig that names `where` and the key."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise BadConfig(f"{where}: {_in_words(str(error))}") from None


def _in_words(text: str) -> str:
    """A pattern for programmers, said for people."""
    return re.sub(r"Expected `str` matching regex '\^\[a-z0-9\].*?'(?= - at|$)", f"Expected a name: {ID_RULE}", text)


# --------------------------------------------------------------------------------------------------------------- clock


class Clock:
    """Seconds since the epoch that never go back: the wall clock once at the start, then the monotonic one.

    An NTP step can so neither fire nor freeze a deadline; `at_least` (the last journalled instant) covers a clock that was
    set back between two runs.
    """

    def __init__(self, at_least: float = 0.0) -> None:
        self._offset = max(time.time(), at_least) - time.monotonic()

    def __call__(self) -> float:
        """Now."""
        return time.monotonic() + self._offset


class Timer:
    """Ticks when something is due.  What is due may change at any moment: `moved` makes the timer look again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._moved = asyncio.Event()

    def moved(self) -> None:
        """Look again at what is due."""
        self._moved.set()

    async def run(self, due: Callable[[], Iterable[float | None]], tick: Callable[[], None]) -> None:
        """Call `tick` whenever the earliest of `due()` has come, and at least once a second, until cancelled."""
        while True:
            self._moved.clear()
            wait_s = min((at - self._clock() for at in due() if at is not None), default=IDLE_TICK_S)
            try:
                async with asyncio.timeout(min(max(0.0, wait_s), IDLE_TICK_S)):  # wait_for can swallow a cancellation
                    await self._moved.wait()
            except TimeoutError:
                tick()


# ---------------------------------------------------------------------------------------------------------------- logs

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


class LineFormatter(logging.Formatter):
    """`[<6>]logger: message | key=value ...`: what was passed as `extra` becomes the fields, sorted by name."""

    def __init__(self, *, journald: bool) -> None:
        super().__init__(None if journald else "%(asctime)s")
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever peers put into message and fields; a traceback follows on lines of its own."""
        extra = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        fields = " ".join(f"{k}={v}" for k, v in sorted(extra.items()))
        line = _CONTROL.sub(" ", f"{record.name}: {record.getMessage()}" + (f" | {fields}" if fields else ""))
        if self._journald:
            head = f"<{_PRIORITY.get(record.levelno, 6)}>"
        else:
            head = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname:<7} "
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return head + line + trace


def set_up_logging(level: str = "INFO") -> None:
    """Log to stderr; `FEDPIPE_LOG_LEVEL` wins over `level`.  Raises BadConfig for a level that there is not."""
    wanted = os.environ.get("FEDPIPE_LOG_LEVEL", level).upper()
    if wanted not in logging.getLevelNamesMapping():
        raise BadConfig(f"no log level {wanted!r}: use DEBUG, INFO, WARNING or ERROR")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(journald="JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(wanted)


class OncePer:
    """Lets a repeated complaint through once per `period_s` and key, and counts what it held back.

    It remembers `max_keys` keys of the last period; all further ones share one more, so that whoever invents keys is told of
    once.  So at most max_keys + 1 complaints per period, and memory for as many.
    """

    def __init__(self, period_s: float = 60.0, max_keys: int = 1000) -> None:
        self._period_s, self._max_keys = period_s, max_keys
        self._held: dict[str, tuple[float, int]] = {}
        self._swept_at = -period_s

    def __call__(self, key: str, now: float) -> int | None:
        """The number held back since the last time when `key` may speak now, else None."""
        if key not in self._held and len(self._held) >= self._max_keys:
            if now - self._swept_at >= self._period_s:
                self._swept_at = now
                self._held = {k: told for k, told in self._held.items() if now - told[0] < self._period_s}
            key = key if len(self._held) < self._max_keys else ""
        last, held = self._held.get(key, (-self._period_s, 0))
        if now - last < self._period_s:
            self._held[key] = (last, held + 1)
            return None
        self._held[key] = (now, 0)
        return held


# ------------------------------------------------------------------------------------------------------------- systemd


def notify(**fields: str) -> None:
    """Tell systemd how things stand (sd_notify protocol), as in READY="1" or STATUS="round 3"; without systemd do nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    text = "\n".join(f"{key}={value}" for key, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            logger.debug("systemd was not told", extra={"action": "notify_failed", "error": str(error)})


async def feed_watchdog(healthy: Callable[[], bool]) -> None:
    """Ping systemd's watchdog at half its period, only while `healthy()`; returns at once when there is none."""
    period_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    while period_us:
        if healthy():
            notify(WATCHDOG="1")
        await asyncio.sleep(period_us / 2e6)


# ----------------------------------------------------------------------------------------------------------- lifecycle


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Run a daemon until it returns or a SIGTERM or SIGINT sets its stop event; a second signal ends it at once.

    Returns the exit code: 0, 78 for BadConfig, 77 for NotAllowed, 69 for Unavailable, 70 for our own faults (the trace is logged).
    """

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def asked() -> None:
            if stop.is_set():
                os._exit(EX_TEMPFAIL)
            stop.set()
            notify(STOPPING="1")

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked)
        await main(stop)

    keep_pages(is_one_arena=True)
    try:
        asyncio.run(supervised())
    except (OutsideFault, ExceptionGroup) as error:
        return _exit_code(error)
    except Exception:  # the last line of defence: a trace in the log and a code for systemd
        logger.exception("stopped by a fault of our own", extra={"action": "crashed"})
        return EX_SOFTWARE
    return EX_OK


def _exit_code(error: Exception) -> int:
    group = error if isinstance(error, ExceptionGroup) else ExceptionGroup("", [error])
    outside, ours = group.split(OutsideFault)
    if ours:
        logger.error("stopped by a fault of our own", exc_info=error, extra={"action": "crashed"})
        return EX_SOFTWARE
    first: BaseException | None = outside
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, OutsideFault)
    logger.error("%s", first, extra={"action": "refused"})
    return exit_code(first)


def exit_code(fault: OutsideFault) -> int:
    """What a command or daemon ends with for a fault from outside: 78 and 77 must not loop, 69 and 75 may."""
    match fault:
        case BadConfig():
            return EX_CONFIG
        case Unavailable():
            return EX_UNAVAILABLE
        case NotAllowed():
            return EX_NOPERM
    return EX_TEMPFAIL
