"""One daemon per state folder, whatever way the one before ended."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.service import serve as serve_agent
from coordinator.config import CoordinatorConfig
from coordinator.service import serve as serve_coordinator
from protocol.daemon import exit_code
from protocol.errors import Unavailable
from protocol.sole import hold

HOLDER = """
import sys, time
from pathlib import Path
from protocol.sole import hold
hold(Path(sys.argv[1]), "agent")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_is_first_and_a_killed_one_leaves_nothing(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    with pytest.raises(
        Unavailable, match=rf"another agent \(process {other.pid}\) works in {tmp_path}: stop it"
    ) as told:
        hold(tmp_path, "agent")
    assert exit_code(told.value) == 69
    other.send_signal(signal.SIGKILL)
    other.wait()
    hold(tmp_path, "agent")
    assert (tmp_path / "lock").stat().st_size == 0, "nothing is written, which a full disk would refuse"


def test_both_daemons_look_before_they_touch_anything(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    stop, config = asyncio.Event(), tmp_path / "x.toml"
    for serving in (
        serve_coordinator(CoordinatorConfig(state_dir=str(tmp_path)), stop, config),
        serve_agent(AgentConfig(agent="a", state_dir=str(tmp_path)), stop, config),
    ):
        with pytest.raises(Unavailable, match=str(other.pid)):
            asyncio.run(serving)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_used_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="cannot be opened: Not a directory: see state_dir"):
        hold(tmp_path / "file" / "state", "coordinator")
