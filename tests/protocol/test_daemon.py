"""What both daemons share, against the real things: files, a datagram socket as systemd's, processes and signals."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import AgentConfig
from protocol.daemon import (
    EX_CONFIG,
    EX_SOFTWARE,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    Clock,
    LineFormatter,
    OncePer,
    feed_watchdog,
    load_toml,
    notify,
    set_up_logging,
)
from protocol.errors import BadConfig

# ------------------------------------------------------------------------------------------------------ configuration


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    port: int = 1883


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    broker: Table = Table()


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "café"\n[broker]\nport = 8883\n', encoding="utf-8")
    assert load_toml(path, Config) == Config(name="café", broker=Table(port=8883))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "name"),
        ("name = 3", "$.name"),
        ('name = "x"\n[broker]\nport = "1883"', "$.broker.port"),
        ('name = "x"\n[broker]\nprot = 1', "prot"),
        ('name = "x"\nnam = "y"', "nam"),
        ('name = = "x"\nnam = 1', "line 1"),
        ('name = "x"\nname = "y"\nnam = 1', "line 2"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_key(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(BadConfig, match=re.escape(told)) as error:
        load_toml(path, Config)
    assert str(error.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(BadConfig, match="cannot be read") as error:
            load_toml(path, Config)
        assert str(path) in str(error.value)
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfig, match="not valid TOML"):
        load_toml(binary, Config)


# --------------------------------------------------------------------------------------------------------------- clock


def test_the_clock_never_goes_back() -> None:
    clock = Clock()
    assert abs(clock() - time.time()) < 60
    times = [clock() for _ in range(1000)]
    assert times == sorted(times)
    ahead = time.time() + 3600
    later = Clock(at_least=ahead)
    assert ahead <= later() < ahead + 60, "a clock that was set back is covered"
    assert Clock(at_least=later())() >= later() - 1


# ---------------------------------------------------------------------------------------------------------------- logs


def line(message: str, *args: object, journald: bool = True, level: int = logging.INFO, **extra: object) -> str:
    record = logging.getLogger("coordinator.daemon").makeRecord(
        "coordinator.daemon", level, "f.py", 1, message, args, None, extra=extra
    )
    return LineFormatter(journald=journald).format(record)


def test_a_line_holds_the_message_and_its_fields_in_order() -> None:
    assert line("job %s", "moved", round=3, job="j") == "<6>coordinator.daemon: job moved | job=j round=3"
    assert line("x", level=logging.ERROR) == "<3>coordinator.daemon: x"
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d WARNING coordinator\.daemon: x \| a=1", line("x", journald=False, level=logging.WARNING, a=1)
    )


@given(st.text(), st.text(), st.booleans())
def test_whatever_a_peer_says_stays_on_one_line(message: str, reason: str, journald: bool) -> None:
    told = line("%s", message, journald=journald, reason=reason)
    assert len(told.splitlines()) == 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", told), "no terminal is driven by a log"


def test_a_traceback_follows_the_line() -> None:
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f.py", 1, "bad", (), sys.exc_info())
    first, *rest = LineFormatter(journald=True).format(record).split("\n")
    assert first == "<3>x: bad"
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "ZeroDivisionError: by zero"


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield root
    root.handlers[:] = before[0]
    root.setLevel(before[1])


def test_the_environment_sets_the_level(root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDPIPE_LOG_LEVEL", raising=False)
    set_up_logging("warning")
    assert root_logger.level == logging.WARNING
    monkeypatch.setenv("FEDPIPE_LOG_LEVEL", "debug")
    set_up_logging("warning")
    assert root_logger.level == logging.DEBUG
    assert len(root_logger.handlers) == 1
    monkeypatch.setenv("FEDPIPE_LOG_LEVEL", "loud")
    with pytest.raises(BadConfig, match="LOUD"):
        set_up_logging()


# ------------------------------------------------------------------------------------------------------------- OncePer


def test_a_complaint_is_let_through_once_per_period() -> None:
    once = OncePer(60.0)
    assert once("a", 0.0) == 0
    assert [once("a", t) for t in (0.0, 30.0, 59.9)] == [None] * 3
    assert once("b", 30.0) == 0
    assert once("a", 60.0) == 3
    assert once("a", 119.0) is None
    assert once("a", 500.0) == 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 50)), max_size=60))
def test_nothing_is_lost_in_the_counting(calls: list[tuple[str, float]]) -> None:
    once, now = OncePer(60.0), 0.0
    told: dict[str, list[float]] = {}
    n_told = n_held = 0
    for key, step in calls:
        now += step
        held = once(key, now)
        if held is not None:
            assert all(now - at >= 60.0 for at in told.get(key, []))
            told.setdefault(key, []).append(now)
            n_told, n_held = n_told + 1, n_held + held
    waiting = sum(once(key, now + 1e6) or 0 for key in told)
    assert n_told + n_held + waiting == len(calls)


def test_many_keys_do_not_fill_the_memory() -> None:
    once = OncePer(60.0, max_keys=10)
    told = [once(str(n), 0.0) for n in range(1000)]
    assert told[:11] == [0] * 11, "ten by name, and one for all the others"
    assert told[11:] == [None] * 989
    assert len(once._held) == 11
    assert once("999", 61.0) == 0
    assert len(once._held) == 1, "the old ones are forgotten"


# ------------------------------------------------------------------------------------------------------------- systemd


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that systemd listens on."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@fedpipe-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_systemd_is_told(systemd: socket.socket) -> None:
    notify(READY="1", STATUS="round 3 – fine")
    assert systemd.recv(4096).decode() == "READY=1\nSTATUS=round 3 – fine"


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY="1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify(READY="1")


async def test_the_watchdog_is_fed_only_while_healthy(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    pulse = iter([True, False, True])
    dead = asyncio.Event()

    def healthy() -> bool:
        beat = next(pulse, None)
        if beat is None:
            dead.set()
        return bool(beat)

    feeding = asyncio.create_task(feed_watchdog(healthy))
    await dead.wait()
    feeding.cancel()
    systemd.setblocking(False)
    assert [systemd.recv(99), systemd.recv(99)] == [b"WATCHDOG=1"] * 2
    with pytest.raises(BlockingIOError):
        systemd.recv(99)
    monkeypatch.delenv("WATCHDOG_USEC")
    await feed_watchdog(healthy)


# ----------------------------------------------------------------------------------------------------------- lifecycle

DAEMON = """
import asyncio, sys
from protocol.daemon import notify, run, set_up_logging
from protocol.errors import BadConfig, BadMessage, Unavailable
async def main(stop):
    async def fail(error):
        raise error
    async def nested(*errors):
        async with asyncio.TaskGroup() as group:
            for error in errors:
                group.create_task(fail(error))
    async def wait():
        notify(READY="1")
        await stop.wait()
        notify(STATUS="winding down")
    async def hang():
        await wait()
        await asyncio.Event().wait()
    await eval(sys.argv[1])
set_up_logging()
sys.exit(run(main))
"""


def daemon(what: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", DAEMON, what], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        ("fail(BadConfig('a.toml: $.x'))", EX_CONFIG, "a.toml: $.x"),
        ("fail(Unavailable('no disk'))", EX_UNAVAILABLE, "no disk"),
        ("fail(BadMessage('odd'))", EX_TEMPFAIL, "odd"),
        ("nested(Unavailable('no disk'))", EX_UNAVAILABLE, "no disk"),
        ("fail(KeyError('a bug'))", EX_SOFTWARE, "Traceback"),
        ("nested(BadConfig('x'), KeyError('a bug'))", EX_SOFTWARE, "KeyError: 'a bug'"),
        ("asyncio.sleep(0)", 0, ""),
    ],
)
def test_how_it_ends_is_an_exit_code(what: str, code: int, told: str) -> None:
    process = daemon(what)
    _, errors = process.communicate()
    assert process.returncode == code, errors
    assert told in errors
    assert ("Traceback" in errors) == (code == EX_SOFTWARE), "only our own faults need a trace"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_winds_it_down(systemd: socket.socket, number: int) -> None:
    process = daemon("wait()")
    assert systemd.recv(99) == b"READY=1"
    process.send_signal(number)
    assert [systemd.recv(99), systemd.recv(99)] == [b"STOPPING=1", b"STATUS=winding down"]
    _, errors = process.communicate()
    assert process.returncode == 0
    assert errors == ""


def test_a_second_signal_ends_it_at_once(systemd: socket.socket) -> None:
    process = daemon("hang()")
    assert systemd.recv(99) == b"READY=1"
    process.terminate()
    assert [systemd.recv(99), systemd.recv(99)] == [b"STOPPING=1", b"STATUS=winding down"]
    os.kill(process.pid, signal.SIGTERM)
    process.communicate()
    assert process.returncode == EX_TEMPFAIL


def test_a_bad_name_is_explained_without_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text('agent = "A b"\n')
    with pytest.raises(
        BadConfig, match=r"agent.toml: Expected a name: 1 to 64 of a-z, 0-9 and inner dashes - at `\$.agent`"
    ):
        load_toml(path, AgentConfig)
