"""Whatever happens to the training child, the daemon hears exactly one ending and the next task works.

Most stories run a third-party trainer without torch, installed the way a user's would be: it starts in a blink and can be
told to misbehave.  It says so through the job's name.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent import trainers
from agent.child import Evaluated, Event, Failed, Finished, Phase, Ready, Stepped, Surveyed, TrainTask
from agent.supervisor import ChildConfig, Supervisor
from protocol.errors import BadConfig, IllegalMove
from protocol.messages import Evaluation

MakeTask = Callable[..., TrainTask]

PLUG_IN = """
import os, sys, time
from agent.child import Finished, Phase, Stepped, Surveyed
from protocol import messages
from protocol.errors import Unavailable
from protocol.methods import Method

METHOD = Method(name="plugged", trainer="plugged", kind="lora", aggregator="product")

class Plugged:
    produces = "lora"

    def survey(self, task):
        matrix = messages.Matrix(name="m", d_out=1, d_in=1)
        yield Phase(name="loading")
        yield Surveyed(result=messages.Surveyed(base_sha256="0" * 64, matrices=[matrix], n_train=1, n_eval=0))
        return Finished()

    def train(self, task):
        yield Phase(name="training")
        if task.plan.job == "noisy":
            print("a stray print")
            os.write(1, b"a stray write from C\\n")
        if task.plan.job == "crash":
            1 / 0
        if task.plan.job == "unavailable":
            raise Unavailable("the disk is gone")
        if task.plan.job == "exit":
            os._exit(3)
        step, stop = 0, False
        while not stop and step < task.plan.train.n_steps or task.plan.job == "deaf":
            step += 1
            stop = yield Stepped(step=step, n_steps=0, samples=step, loss=None, tokens=0, seconds=0.0)
        return Finished(samples=step, stopped="stop" if stop else "")
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTask:
    site = tmp_path / "site"
    info = site / "plugged-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "plugged.py").write_text(PLUG_IN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    entries = "[fedpipe.trainers]\nplugged = plugged:Plugged\n[fedpipe.methods]\nplugged = plugged:METHOD\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))

    def make(make_task: MakeTask, **changes: Any) -> TrainTask:
        return make_task(**{"method": "plugged", "allowed": ("plugged",)} | changes)

    return make


MakeSupervisor = Callable[..., Supervisor]


@pytest.fixture
async def make_supervisor(tmp_path: Path) -> AsyncIterator[MakeSupervisor]:
    made: list[Supervisor] = []

    def make(**config: float) -> Supervisor:
        made.append(Supervisor(ChildConfig(threads=1, **config), log=tmp_path / "log" / "child.log"))
        return made[-1]

    yield make
    for one in made:
        await one.aclose()


@pytest.fixture
def supervisor(make_supervisor: MakeSupervisor) -> Supervisor:
    return make_supervisor()


class Story:
    """Records events and acts on the n-th progress."""

    def __init__(self, act: Callable[[], object] = lambda: None, at: int = 3) -> None:
        self.events: list[Event] = []
        self._act, self._at = act, at

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Stepped) and self.n_steps == self._at:
            self._act()

    @property
    def n_steps(self) -> int:
        return sum(isinstance(event, Stepped) for event in self.events)


def send(supervisor: Supervisor, number: signal.Signals) -> None:
    assert supervisor.pid is not None
    os.kill(supervisor.pid, number)


async def test_a_survey_and_a_run_share_a_warm_child(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask
) -> None:
    story = Story()
    assert supervisor.pid is None
    ending = await supervisor.run(plugged(make_task, purpose="survey"), story)
    assert [type(event) for event in story.events] == [Ready, Phase, Surveyed, Finished]
    assert ending is story.events[-1]
    pid, story = supervisor.pid, Story()
    ending = await supervisor.run(plugged(make_task, n_steps=4), story)
    assert supervisor.pid == pid
    assert ending == Finished(samples=4)
    assert [type(event) for event in story.events] == [Phase, *[Stepped] * 4, Finished]
    assert psutil.Process(pid).nice() >= 10
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == 800


async def test_a_stop_brings_what_there_is(supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask) -> None:
    story = Story(lambda: supervisor.stop("deadline"))
    ending = await supervisor.run(plugged(make_task, n_steps=10**7), story)
    assert isinstance(ending, Finished)
    assert ending.stopped == "deadline"
    assert ending.samples >= 3
    supervisor.stop("nothing runs")
    assert await supervisor.run(plugged(make_task, n_steps=2), Story()) == Finished(samples=2)


async def test_a_stop_while_the_child_starts_is_not_lost(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask
) -> None:
    running = asyncio.create_task(supervisor.run(plugged(make_task, n_steps=10**7), Story()))
    await asyncio.sleep(0)
    assert supervisor.pid is None
    supervisor.stop("cancelled")
    ending = await running
    assert isinstance(ending, Finished)
    assert ending.stopped == "cancelled"


async def test_sigterm_to_the_child_is_a_stop_and_ends_it(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask
) -> None:
    story = Story(lambda: send(supervisor, signal.SIGTERM))
    ending = await supervisor.run(plugged(make_task, n_steps=10**7), story)
    assert isinstance(ending, Finished)
    assert ending.stopped == "SIGTERM"
    assert supervisor.pid is None
    assert await supervisor.run(plugged(make_task, n_steps=2), Story()) == Finished(samples=2)


@pytest.mark.parametrize(
    ("job", "reason", "detail"),
    [
        ("crash", "crashed", "ZeroDivisionError"),
        ("exit", "died", "exit code 3"),
        ("unavailable", "unavailable", "the disk is gone"),
    ],
)
async def test_a_fault_of_the_trainer_is_an_ending(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask, job: str, reason: str, detail: str
) -> None:
    ending = await supervisor.run(plugged(make_task, job=job), Story())
    assert isinstance(ending, Failed)
    assert ending.reason == reason
    assert detail in ending.detail
    assert await supervisor.run(plugged(make_task, n_steps=2), Story()) == Finished(samples=2)


async def test_stray_output_goes_to_the_log(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask, tmp_path: Path
) -> None:
    assert await supervisor.run(plugged(make_task, job="noisy", n_steps=2), Story()) == Finished(samples=2)
    log = (tmp_path / "log" / "child.log").read_text()
    assert "a stray print" in log
    assert "a stray write from C" in log


async def test_a_child_that_does_not_stop_is_killed(
    make_supervisor: MakeSupervisor, plugged: MakeTask, make_task: MakeTask
) -> None:
    supervisor = make_supervisor(grace_s=0.2)
    ending = await supervisor.run(plugged(make_task, job="deaf"), Story(lambda: supervisor.stop("cancelled")))
    assert ending == Failed(reason="killed", detail="did not stop within 0.2 s: cancelled")
    assert supervisor.pid is None


async def test_a_child_without_a_sign_of_life_is_killed(
    make_supervisor: MakeSupervisor, plugged: MakeTask, make_task: MakeTask
) -> None:
    supervisor = make_supervisor(hang_s=3)
    freeze = Story(lambda: send(supervisor, signal.SIGSTOP))
    ending = await supervisor.run(plugged(make_task, n_steps=10**7), freeze)
    assert ending == Failed(reason="hung", detail="no sign of life for 3 s")
    assert supervisor.pid is None


async def test_an_idle_child_is_let_go(make_supervisor: MakeSupervisor, plugged: MakeTask, make_task: MakeTask) -> None:
    supervisor = make_supervisor(idle_s=0.01)
    await supervisor.run(plugged(make_task, n_steps=1), Story())
    with open_pidfd(supervisor.pid) as pidfd:
        await gone(pidfd)
    assert await supervisor.run(plugged(make_task, n_steps=2), Story()) == Finished(samples=2)
    await supervisor.aclose()
    assert supervisor.pid is None


async def test_one_task_at_a_time_and_cancelling_kills(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask
) -> None:
    under_way = asyncio.Event()
    task = plugged(make_task, n_steps=10**7)
    running = asyncio.create_task(supervisor.run(task, Story(under_way.set)))
    await under_way.wait()
    with pytest.raises(IllegalMove, match="a task is under way"):
        await supervisor.run(task, Story())
    assert supervisor.is_running
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert supervisor.pid is None
    assert not supervisor.is_running


async def test_closing_lets_a_running_task_hand_over(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask
) -> None:
    under_way = asyncio.Event()
    running = asyncio.create_task(supervisor.run(plugged(make_task, n_steps=10**7), Story(under_way.set)))
    await under_way.wait()
    await supervisor.aclose()
    ending = await running
    assert isinstance(ending, Finished)
    assert ending.stopped == "shutting down"
    assert supervisor.pid is None


async def test_a_child_that_cannot_be_started_is_an_ending(
    supervisor: Supervisor, plugged: MakeTask, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    ending = await supervisor.run(plugged(make_task), Story())
    assert isinstance(ending, Failed)
    assert ending.reason == "no_child"


async def test_a_real_training_survives_a_kill_of_its_child(
    supervisor: Supervisor, make_task: MakeTask, tmp_path: Path
) -> None:
    story = Story(lambda: send(supervisor, signal.SIGKILL))
    ending = await supervisor.run(make_task(n_steps=10**6), story)
    assert ending == Failed(reason="died", detail="SIGKILL (out of memory?)")
    assert story.n_steps >= 3
    assert not (tmp_path / "update.bin").exists()
    story = Story()
    ending = await supervisor.run(make_task(n_steps=3, bits="nf4", evaluate=Evaluation(max_samples=8)), story)
    assert isinstance(ending, Finished)
    assert ending.samples == 24
    assert (tmp_path / "update.bin").is_file()
    assert any(isinstance(event, Evaluated) for event in story.events)
    story = Story(lambda: supervisor.stop("deadline"))
    ending = await supervisor.run(make_task(n_steps=10**6), story)
    assert isinstance(ending, Finished)
    assert ending.stopped == "deadline"
    assert ending.samples == 8 * ending.steps >= 24


PARENT = """
import asyncio, sys
import msgspec
from agent.child import Stepped, TrainTask
from agent.supervisor import ChildConfig, Supervisor

async def main():
    supervisor = Supervisor(ChildConfig(threads=1))
    task = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=TrainTask)
    await supervisor.run(task, lambda event: print(supervisor.pid, flush=True) if isinstance(event, Stepped) else None)

asyncio.run(main())
"""


async def test_the_child_dies_with_its_parent(plugged: MakeTask, make_task: MakeTask) -> None:
    import msgspec

    task = msgspec.msgpack.encode(plugged(make_task, job="deaf"))
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(task)
    parent.stdin.close()
    pid = int(await parent.stdout.readline())
    with open_pidfd(pid) as pidfd:
        parent.kill()
        await gone(pidfd)
    await parent.wait()


class open_pidfd:  # noqa: N801 - reads like open()
    def __init__(self, pid: int | None) -> None:
        assert pid is not None
        self._fd = os.pidfd_open(pid)

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


async def gone(pidfd: int) -> None:
    """Wait until the process behind a pidfd has ended."""
    ended, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], 60)
    assert ended


def test_the_daemons_side_never_imports_torch() -> None:
    modules = "agent.supervisor, agent.child, agent.bases, agent.data.split, agent.trainers, protocol.memory"
    heavy = "{'torch', 'transformers', 'peft', 'bitsandbytes', 'pyarrow', 'huggingface_hub'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.usefixtures("plugged")
def test_the_registry_is_closed() -> None:
    assert trainers.load("qlora").produces == "lora"
    assert trainers.load("plugged", allowed=["plugged"]).produces == "lora"
    for name, allowed in [("plugged", []), ("os.system", []), ("absent", ["absent"])]:
        with pytest.raises(BadConfig):
            trainers.load(name, allowed)
