"""What becomes of a share when its child dies, its daemon goes down or its disk refuses: `Training` with real children.

The trainer is a third-party one without torch that keeps itself as the built-in one does; the job's name tells it where to die.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import training as training_module
from agent.bases import BasesConfig
from agent.checkpoints import Header, Point, steps_at, write
from agent.child import LAST_TRIES_S
from agent.config import AgentConfig
from agent.core import actions as act
from agent.core import events as ev
from agent.core.work import SUSPENDED
from agent.data import DataConfig
from agent.outbox import Outbox
from agent.starts import MAX_STARTS, Starts
from agent.supervisor import ChildConfig
from agent.training import Training
from agent.upkeep import KeepConfig, open_folder, tidy
from protocol.blobs import Blobs
from protocol.errors import Unavailable
from protocol.messages import Base, Blob, Offer, Plan
from protocol.messages import Training as Numbers

PLUG_IN = """
import os, signal
from pathlib import Path
from agent import checkpoints
from agent.child import Finished, Phase, Resumed, Stepped
from protocol.methods import Method

METHOD = Method(name="plugged", trainer="plugged", kind="lora", aggregator="product")

class Plugged:
    produces = "lora"

    def train(self, task):
        plan, self.path, self.out, self.at = task.plan, Path(task.checkpoint), task.out_file, None
        yield Phase(name="training")
        stored = checkpoints.find(self.path, plan.job)
        step = stored.header.point.steps if stored else 0
        if stored:
            yield Resumed(step=step, n_steps=plan.train.n_steps)
        dies_at = int(plan.job.rpartition("-")[2]) if plan.job.startswith("dies") else None
        stop = False
        while not stop and step < plan.train.n_steps:
            step += 1
            self.at = checkpoints.Header(key=plan.job, job=plan.job, round=plan.round, point=checkpoints.Point(step, step))
            if step == dies_at and not (plan.job.startswith("dies-once") and stored):
                os.kill(os.getpid(), signal.SIGKILL)
            if task.checkpoint_s < 1 and step % 5 == 0:
                checkpoints.write(self.path, self.at, [])
            stop = yield Stepped(step=step, n_steps=plan.train.n_steps, samples=step, loss=1.0, tokens=1, seconds=0.1)
        Path(task.out_file).write_bytes(b"update" * 100 + b"%d" % plan.round)
        return Finished(file=task.out_file, samples=step, steps=step, stopped="stop" if stop else "")

    def suspend(self):
        if self.at is None:
            return None
        checkpoints.write(self.path, self.at, [])
        steps = self.at.point.steps
        Path(self.out).write_bytes(b"so far" * 100)
        return Finished(file=self.out, samples=steps, steps=steps)
"""


def a_plan(**changes: Any) -> Plan:
    said = {
        "job": "j",
        "round": 1,
        "attempt": 0,
        "purpose": "train",
        "method": "plugged",
        "base": Base(source="toy"),
        "ranks": {"m": 1},
        "train": Numbers(n_steps=changes.pop("n_steps", 20)),
        "issued_at": 0.0,
        "stop_after_s": 1000.0,
        "ttl_s": 2000.0,
    }
    return Plan(**said | changes)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentConfig:
    site, base = tmp_path / "site", tmp_path / "toy"
    info = site / "plugged_kept-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "plugged_kept.py").write_text(PLUG_IN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-kept\nVersion: 1.0\n")
    entries = "[fedpipe.trainers]\nplugged = plugged_kept:Plugged\n[fedpipe.methods]\nplugged = plugged_kept:METHOD\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"")
    (tmp_path / "agent").mkdir()
    return AgentConfig(
        agent="a1",
        state_dir=str(tmp_path / "agent"),
        methods=["plugged"],
        data={"default": DataConfig(path="nowhere")},
        base=BasesConfig(models={"toy": str(base)}),
        child=ChildConfig(threads=1),
        checkpoint_s=0.5,
        power_w=100.0,
    )


class Bench:
    """One daemon's life: a Training, its outbox, and every fact that it told."""

    def __init__(self, config: AgentConfig) -> None:
        self.config, self.folder = config, Path(config.state_dir)
        self.told: list[ev.Happened] = []
        self.outbox = Outbox(self.folder / "outbox")
        self.outbox.load()
        self.training = self._made()
        self._moved = asyncio.Condition()

    def _made(self) -> Training:
        async def unknown() -> int:
            return 0

        return Training(
            self.config,
            blobs=Blobs(self.folder / "blobs"),
            outbox=self.outbox,
            tell=self.told.append,
            moved=lambda: asyncio.ensure_future(self._tell()) and None,
            allowed_bytes=unknown,
            look=lambda: None,
            up_bytes_per_s=lambda: 0.0,
        )

    async def _tell(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(60), self._moved:
            await self._moved.wait_for(what)

    async def run(
        self, plan: Plan, *, at: Callable[[], bool] | None = None, then: Callable[[], Any] | None = None
    ) -> Any:
        """The run's end; `then` is called as soon as `at` is true."""
        self.told.clear()
        async with asyncio.TaskGroup() as group:
            self.training.begin(act.StartChild(plan=plan, model_sha256="", bytes_down=0), group)
            if at and then:
                await self.until(at)
                then()
        (end,) = [fact for fact in self.told if isinstance(fact, ev.ChildFinished | ev.ChildFailed)]
        return end

    def step(self, n: int) -> Callable[[], bool]:
        return lambda: self.training.progress.step >= n

    def files(self) -> set[str]:
        found = {path.name for path in self.folder.iterdir()} - {"outbox", "blobs", "training.log"}
        return {name for name in found if (self.folder / name).read_bytes().strip()}


@pytest.fixture
async def bench(config: AgentConfig) -> AsyncIterator[Bench]:
    one = Bench(config)
    yield one
    await one.training.wind_down()


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record)["action"] for record in caplog.records if "action" in vars(record)]


async def test_a_child_that_dies_once_costs_no_step_that_was_kept(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    end = await bench.run(a_plan(job="dies-once-13"))
    assert end.update.steps == 20
    assert end.energy.source == "declared"
    assert end.update.energy == end.energy, "an update takes it along, into the outbox and over a restart"
    assert actions(caplog) == ["child_started", "child_died", "child_started", "resumed"]
    assert "resumed at step 10 of 20" in caplog.text
    assert bench.files() == set(), "nothing is left of it"


async def test_a_child_that_dies_at_the_same_step_is_given_up(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    end = await bench.run(a_plan(job="dies-13"))
    assert end.reason.startswith("died: SIGKILL (out of memory?); begun "), (
        "the coordinator learns from its first words"
    )
    assert end.reason.endswith(f"begun {MAX_STARTS} times from step 10 without getting further")
    assert end.energy.joules > 0, "what was in vain was spent all the same"
    assert actions(caplog).count("child_started") == MAX_STARTS + 1, "once from the beginning"
    assert bench.files() == set()
    assert (await bench.run(a_plan(round=2))).update is not None, "the next round is another matter"


async def test_a_death_with_nothing_kept_ends_the_share(bench: Bench) -> None:
    end = await bench.run(a_plan(job="dies-3"))
    assert end.reason == "died: SIGKILL (out of memory?)"
    assert bench.files() == set()


async def test_a_daemon_that_goes_down_with_its_child_does_not_begin_for_ever(config: AgentConfig) -> None:
    starts = Starts(Path(config.state_dir) / "training.starts")
    for _ in range(MAX_STARTS):
        assert starts.begin(a_plan(), 0) == ""
    bench = Bench(config)
    end = await bench.run(a_plan())
    assert end.reason == f"died: begun {MAX_STARTS} times from step 0 without getting further"
    for _ in range(MAX_STARTS):
        assert starts.begin(a_plan(), 0) == ""
    assert starts.begin(a_plan(), 5) == "", "it got further"
    assert starts.begin(a_plan(round=2), 0) == ""


async def test_a_daemon_that_is_stopped_goes_on_at_its_next_start(
    bench: Bench, config: AgentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plan = a_plan(n_steps=10**6)
    end = await bench.run(plan, at=bench.step(7), then=lambda: bench.training.stop("stopping", suspend=True))
    assert end.update.stopped == SUSPENDED
    assert end.update.steps >= 7
    assert bench.files() == {"training.checkpoint"}
    assert [offer.blob for offer in Outbox(bench.outbox.folder).load()] == [end.update.blob]
    assert bench.training.supervisor.pid is None
    again = Bench(config)
    end = await again.run(plan, at=again.step(8), then=lambda: again.training.stop("deadline"))
    assert end.stopped == "deadline"
    assert end.update.samples >= 8
    assert "resumed" in actions(caplog)
    await again.training.wind_down()


async def test_a_child_that_somebody_ends_is_begun_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def end_it() -> None:
        pid = bench.training.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)

    running = asyncio.create_task(bench.run(a_plan(n_steps=10**6), at=bench.step(7), then=end_it))
    await bench.until(lambda: "resumed" in actions(caplog))
    bench.training.stop("deadline")
    assert (await running).stopped == "deadline"


async def test_an_older_round_leaves_no_checkpoint(bench: Bench) -> None:
    await bench.run(a_plan(n_steps=10**6), at=bench.step(7), then=lambda: bench.training.stop("s", suspend=True))
    end = await bench.run(a_plan(round=2))
    assert end.update.steps == 20
    assert bench.files() == set()


async def test_what_is_owed_beyond_the_quota_goes_oldest_first(config: AgentConfig) -> None:
    bench = Bench(replaced(config, keep=KeepConfig(outbox_bytes=1300)))  # two updates
    first = (await bench.run(a_plan())).update
    second = (await bench.run(a_plan(round=2))).update
    assert not any(isinstance(fact, ev.UpdateDeclined) for fact in bench.told)
    third = (await bench.run(a_plan(round=3))).update
    (dropped,) = [fact for fact in bench.told if isinstance(fact, ev.UpdateDeclined)]
    assert dropped.xfer == first.blob.xfer
    assert "keep.outbox_bytes" in dropped.reason
    bench.outbox.forget(dropped.xfer)
    assert bench.outbox.surplus(700) == [second.blob.xfer]
    assert bench.outbox.surplus(1) == [second.blob.xfer], "the newest stays"
    assert {offer.blob.xfer for offer in Outbox(bench.outbox.folder).load()} == {second.blob.xfer, third.blob.xfer}
    await bench.training.wind_down()


def replaced(config: AgentConfig, **changes: Any) -> AgentConfig:
    import msgspec

    return msgspec.structs.replace(config, **changes)


# -------------------------------------------------------------------------------------------------------- the disk


async def test_an_outbox_that_refuses_is_tried_until_there_is_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_module, "DISK_AGAIN_S", 0.01)
    away = bench.folder / "away"
    bench.outbox.folder.rename(away)
    end = await bench.run(
        a_plan(),
        at=lambda: bench.training.progress.phase == "saving",
        then=lambda: away.rename(bench.outbox.folder),
    )
    assert end.update.steps == 20
    assert [offer.blob for offer in Outbox(bench.outbox.folder).load()] == [end.update.blob]
    assert actions(caplog).count("disk") == 1, "said once"


async def test_an_outbox_that_refuses_to_the_end_is_a_named_failure_and_keeps_the_training(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LAST_TRIES_S > 1
    monkeypatch.setattr(training_module, "DISK_AGAIN_S", 0.01)
    monkeypatch.setattr(training_module.child, "LAST_TRIES_S", 0.05)
    away = bench.folder / "away"
    bench.outbox.folder.rename(away)
    end = await bench.run(
        a_plan(),
        at=lambda: bench.training.progress.phase == "saving",
        then=lambda: bench.training.stop("deadline"),
    )
    assert end.reason.startswith(f"disk: {bench.outbox.folder}: ")
    assert "make room" in end.reason
    away.rename(bench.outbox.folder)
    assert bench.outbox.load() == []
    assert (bench.folder / "training.update").is_file()
    assert (await bench.run(a_plan())).update.steps == 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def test_on_a_full_disk_what_was_there_stays_and_what_is_new_waits(small_disk: Path) -> None:
    checkpoint, update, outbox = small_disk / "c", small_disk / "training.update", Outbox(small_disk / "outbox")
    header = Header(key="k", job="j", round=1, point=Point(5, 5))
    write(checkpoint, header, [])
    update.write_bytes(bytes(1000))
    ballast = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        write(checkpoint, header, [memoryview(bytes(10_000))])
    assert steps_at(checkpoint, "j", 1) == 5
    blob = Blob(sha256="0" * 64, size=1)
    offer = Offer(job="j", round=1, attempt=0, kind="lora", blob=blob, samples=1)
    with pytest.raises(Unavailable, match=r"No space left.*make room"):
        outbox.keep(update, offer)
    assert update.read_bytes() == bytes(1000)
    assert list(outbox.folder.iterdir()) == []
    ballast.unlink()
    kept = outbox.keep(update, offer)
    assert [found.blob for found in Outbox(outbox.folder).load()] == [kept.blob]


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


async def test_a_read_only_disk_ends_nothing_but_the_share(config: AgentConfig, small_disk: Path) -> None:
    config = replaced(config, state_dir=str(small_disk))
    bench = Bench(config)
    first = (await bench.run(a_plan())).update
    await bench.training.wind_down()  # a log that is open for writing would hold the disk as it is
    remount(small_disk, "ro")
    with pytest.raises(Unavailable, match="Read-only"):
        open_folder(small_disk)
    bench = Bench(config)
    end = await bench.run(a_plan(round=2))
    assert end.reason.startswith("no_child: the training process cannot be started: [Errno 30]")
    bench.outbox.forget(first.blob.xfer)
    tidy(small_disk, KeepConfig(days=1e-9, log_bytes=4096))
    remount(small_disk, "rw")
    assert (await bench.run(a_plan(round=2))).update is not None, "it recovers by itself"
    await bench.training.wind_down()
