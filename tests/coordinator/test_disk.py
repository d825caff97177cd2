"""A disk that is full, read-only or failing: nothing is accepted, nothing is lost, and everything goes on by itself afterwards."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from coordinator.config import CoordinatorConfig, Keep
from coordinator.core import events as ev
from coordinator.core.state import Phase
from coordinator.daemon import Coordinator
from coordinator.disk import Disk, DiskState
from coordinator.pruning import Need, prune
from coordinator.store import Store
from coordinator.submission import watch_folder
from protocol.blobs import Blobs
from protocol.errors import Unavailable
from protocol.memory_bus import MemoryBroker
from protocol.messages import Report
from protocol.spool import Spool
from tests.conftest import Served
from tests.coordinator.daemon.peer import PATIENCE_S, blob_of
from tests.coordinator.daemon.stage import GOOD, PHASES, Stage, job_spec, undisturbed
from tests.full_disk import largest_file

MIB = 2**20


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("daemon.DISK_RETRY_S", "upkeep.LOOK_S", "work.RETRY_S", "traffic.RETRY_S", "submission.SCAN_S"):
        monkeypatch.setattr(f"coordinator.{name}", 0.01)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(Stage(tmp_path, stack, keep=Keep(min_free_bytes=MIB)))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return asyncio.run(undisturbed(tmp_path_factory.mktemp("undisturbed"), "a", "bb"))


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """A function that mounts a small file system of its own in memory on a folder, or changes one: mount(folder, "size=1m")."""
    mounted: list[Path] = []

    def run(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and not mounted:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        assert not done.returncode, done.stderr
        mounted.append(folder)

    yield run
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path, leave_bytes: int = 0) -> Path:
    """A file that takes the rest of a small file system."""
    ballast = folder / "ballast"
    free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    assert free_bytes < 64 * MIB, "not the small one"
    with suppress(OSError), ballast.open("ab") as file:
        file.write(bytes(max(0, free_bytes - leave_bytes)))
    return ballast


@contextmanager
def full_journal(one: Coordinator) -> Iterator[None]:
    """Every disk there is lets no file grow beyond the journal's log: so only the log is refused."""
    with largest_file(Path(f"{one.store.path}-wal").stat().st_size):
        yield


@contextmanager
def read_only_journal(one: Coordinator) -> Iterator[None]:
    one.store._db.execute("PRAGMA query_only = 1")
    try:
        yield
    finally:
        one.store._db.execute("PRAGMA query_only = 0")


async def becomes(one: Coordinator, state: DiskState) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while one.disk.state is not state:  # noqa: ASYNC110 - nothing tells a test of it
            await asyncio.sleep(0.005)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(r)["action"] for r in caplog.records if vars(r).get("action") in {"disk", "disk_ok"}]


# ------------------------------------------------------------------------------------------------------ the named state


def test_a_state_is_told_when_it_begins_and_when_it_is_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    moved: list[DiskState] = []
    disk = Disk(tmp_path, 0, lambda: moved.append(disk.state))
    disk.look()
    disk.wrote("journal")
    for _ in range(100):
        disk.refused("journal", Unavailable("no space"))
    disk.refused("snapshot", Unavailable("no space"))
    assert (disk.state, disk.reason) == (DiskState.REFUSED, "no space")
    disk.wrote("journal")
    assert disk.state is DiskState.REFUSED, "the snapshot still waits"
    disk.wrote("snapshot")
    assert (disk.state, disk.reason) == (DiskState.OK, "")
    assert moved == [DiskState.REFUSED, DiskState.OK]
    assert told(caplog) == ["disk", "disk_ok"]


def test_little_room_is_a_state_of_its_own(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 2**60)
    disk.look()
    assert disk.state is DiskState.LOW
    assert "keep.min_free_bytes" in disk.reason
    assert 0 < disk.deficit_bytes < 2**60
    disk.refused("journal", Unavailable("no space"))
    assert (disk.state, disk.reason) == (DiskState.REFUSED, "no space")


def test_a_transfer_leaves_the_reserve_free(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    blob = blob_of(path)
    with pytest.raises(Unavailable, match="are to stay so"):
        Spool(Blobs(tmp_path / "x"), reserve_bytes=2**60).open(blob)
    spool = Spool(Blobs(tmp_path / "y"), reserve_bytes=1)
    partial = spool.open(blob)
    assert partial.write(0, path.read_bytes()[:1024])
    partial._reserve_bytes = 2**60  # what others wrote meanwhile
    with pytest.raises(Unavailable, match="are to stay free"):
        partial.write(1, path.read_bytes()[1024:2048])
    assert spool.open(blob).have.count == 1, "what was there is there"


# ----------------------------------------------------------------------------------------------------- on any machine


@pytest.mark.parametrize("fault", [full_journal, read_only_journal])
async def test_a_journal_that_is_refused_in_the_middle_of_uploads(
    stage: Stage, wanted: list[str], fault: Callable[[Coordinator], object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one = await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    n_events = one._seq
    with fault(one):  # type: ignore[attr-defined]
        stage.peers["bb"]._work(stage.peers["bb"].plans[-1])
        await becomes(one, DiskState.REFUSED)
        for n in range(20):
            one.tell(ev.AgentReported(agent="a", report=Report(n_cpus=n)))
        for _ in range(2):
            with pytest.raises(Unavailable, match="make room or check the disk"):
                await stage.submit(job_spec(name="k"))
        assert "disk: " in one.status()
        assert not stage.peers["bb"].accepted, "nobody is told that it is safe"
        stage.peers["bb"].birth()
        async with asyncio.timeout(PATIENCE_S):
            await stage.peers["bb"].was_refused.wait()
        assert stage.peers["bb"].refused[-1].retry_after_s > 0, "its update stays in the outbox"
        assert stage.peers["bb"].offers
    await becomes(one, DiskState.OK)
    stage.peers["bb"].birth()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert told(caplog) == ["disk", "disk_ok"], "once, not with every try"
    reports = [e for e in one.store.replay(n_events) if isinstance(e.event, ev.AgentReported)]
    assert [e.event.report.n_cpus for e in reports if isinstance(e.event, ev.AgentReported)][-1] == 19
    assert len(reports) < 20, "only the last report waits"


async def test_a_stop_while_the_disk_refuses_is_a_stop(stage: Stage) -> None:
    one = await stage.start()
    one.store._db.execute("PRAGMA query_only = 1")
    await stage.stop()
    await stage.start()


async def test_a_snapshot_that_was_refused_is_made_up_for_and_stops_nobody(stage: Stage, wanted: list[str]) -> None:
    one = await stage.start()
    save, refused = one.store.save_snapshot, []

    def refuse(seq: int, state: bytes) -> None:
        one.store._db.execute("PRAGMA query_only = 1")
        try:
            save(seq, state)
        except Unavailable:
            refused.append(seq)
            raise
        finally:
            one.store._db.execute("PRAGMA query_only = 0")

    one.store.save_snapshot = refuse  # type: ignore[method-assign]
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(PHASES["plans of round 2 are out"])
    one.store.save_snapshot = save  # type: ignore[method-assign]
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert refused
    assert next(one.store.snapshots()).seq > refused[-1]


async def test_a_failing_read_of_an_update_is_our_fault_and_not_its_agents(stage: Stage, wanted: list[str]) -> None:
    """/proc/self/mem is a file that gives EIO."""
    one = await stage.start()
    await stage.peer("a", "bb")
    bb = stage.peers["bb"]
    bb.deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    offer = bb.update(bb.plans[-1])
    one.blobs.path(offer.blob.sha256).symlink_to("/proc/self/mem")
    bb._work(bb.plans[-1])
    async with asyncio.timeout(PATIENCE_S):
        await bb.was_refused.wait()
    assert bb.refused[-1].retry_after_s > 0
    assert "could not be read back here" in bb.refused[-1].reason
    one.blobs.path(offer.blob.sha256).unlink()
    bb.birth()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted


async def test_a_job_file_waits_for_the_disk(stage: Stage) -> None:
    one = await stage.start()
    folder = stage.folder / "jobs"
    watching = asyncio.create_task(watch_folder(one, folder))
    with read_only_journal(one):
        folder.mkdir(exist_ok=True)
        (folder / "k.toml").write_text('job.name = "k"\nmodel.source = "toy"\n')
        await becomes(one, DiskState.REFUSED)
        assert [p.name for p in folder.iterdir()] == ["k.toml"]
    await stage.until(lambda one: "k" in one.fleet.state.jobs)
    async with asyncio.timeout(PATIENCE_S):
        while not (folder / "k.submitted").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert [p.name for p in folder.iterdir()] == ["k.submitted"]
    watching.cancel()


def test_the_state_is_in_health_and_fleet(served: Served) -> None:
    assert httpx.get(f"{served.url}/v1/health").json()["disk"] == "ok"
    served.loop.call_soon_threadsafe(served.coordinator.disk.refused, "a test", Unavailable("no space"))
    found = httpx.get(f"{served.url}/v1/fleet").json()
    assert (found["disk"], found["disk_reason"]) == ("refused", "no space")
    assert httpx.get(f"{served.url}/v1/health").json()["disk"] == "refused"


# ------------------------------------------------------------------------------------------------- on a real small disk


async def test_a_disk_that_fills_up_in_the_middle_of_uploads(
    stage: Stage, wanted: list[str], mount: Callable[..., None]
) -> None:
    cloud = stage.folder / "cloud"
    mount(cloud, "size=8m")
    one = await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    fill(cloud)
    async with asyncio.timeout(PATIENCE_S):
        while Path(f"{one.store.path}-wal").stat().st_size:  # noqa: ASYNC110 - first it gives back what it can
            await asyncio.sleep(0.005)
    ballast = fill(cloud)
    stage.peers["bb"]._work(stage.peers["bb"].plans[-1])
    await becomes(one, DiskState.REFUSED)
    with pytest.raises(Unavailable, match="full"):
        await stage.submit(job_spec(name="k"))
    await stage.kill()
    ballast.unlink()
    one = await stage.start()
    await becomes(one, DiskState.OK)
    for peer in stage.peers.values():
        peer.birth()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD


async def test_a_start_on_a_full_disk_takes_nothing_and_goes_on_when_there_is_room(
    stage: Stage, wanted: list[str], mount: Callable[..., None]
) -> None:
    cloud = stage.folder / "cloud"
    mount(cloud, "size=8m")
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    await stage.stop()
    assert not (cloud / "journal.sqlite-shm").exists(), "or there is room for what readers share"
    ballast = fill(cloud)
    one = await stage.start()
    await becomes(one, DiskState.REFUSED)
    with pytest.raises(Unavailable, match="full"):
        await stage.submit(job_spec(name="k"))
    assert stage.job().phase is Phase.COLLECTING
    ballast.unlink()
    await becomes(one, DiskState.OK)
    for peer in stage.peers.values():
        peer.deaf_in = None
        peer.birth()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert "k" not in one.fleet.state.jobs
    beside = Store(cloud / "journal.sqlite", read_only=True)  # as `replay` reads it
    assert len(beside.versions("j")) == 2
    beside.close()


async def test_with_little_room_no_update_is_taken_in_and_the_journal_goes_on(
    stage: Stage, wanted: list[str], mount: Callable[..., None]
) -> None:
    cloud = stage.folder / "cloud"
    mount(cloud, "size=8m")
    one = await stage.start()
    await stage.peer("a", "bb")
    bb = stage.peers["bb"]
    bb.deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    ballast = fill(cloud, leave_bytes=MIB // 2)
    await becomes(one, DiskState.LOW)
    bb._work(bb.plans[-1])
    async with asyncio.timeout(PATIENCE_S):
        await bb.was_refused.wait()
    assert "keep.min_free_bytes" in bb.refused[-1].reason
    assert bb.refused[-1].retry_after_s > 0
    await stage.submit(job_spec(name="k"))
    assert not list(one.blobs.partial.glob("bb.*"))
    ballast.unlink()
    await becomes(one, DiskState.OK)
    await one.post(ev.JobCancelled(job="k"))
    bb.birth()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted


def test_a_journal_gives_room_back_where_hardly_any_is_left(tmp_path: Path, mount: Callable[..., None]) -> None:
    mount(tmp_path, "size=16m")
    store, blobs = Store(tmp_path / "journal.sqlite"), Blobs(tmp_path / "blobs")
    for number in range(40):
        store.save_snapshot(store.append([(1.0, ev.Tick())])[-1], bytes([number]) + os.urandom(MIB // 4))
    store.shrink()
    fill(tmp_path, leave_bytes=3 * MIB // 2)
    before = (tmp_path / "journal.sqlite").stat().st_size
    assert before > 10 * MIB
    prune(store, blobs, Keep(replay_rounds=10**6), Need(set(), {}, set()), tight_bytes=2**40)
    assert len(list(store.snapshots())) == 2
    assert (tmp_path / "journal.sqlite").stat().st_size < MIB
    store.close()


async def test_files_on_a_disk_that_turns_read_only_wait_for_it(
    stage: Stage, wanted: list[str], mount: Callable[..., None]
) -> None:
    blobs = stage.folder / "cloud" / "blobs"
    mount(blobs, "size=4m")
    one = await stage.start()
    await stage.peer("a", "bb")
    bb = stage.peers["bb"]
    bb.deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    mount(blobs, "remount,ro")
    await becomes(one, DiskState.REFUSED)
    assert f"{blobs} cannot be written" in one.disk.reason
    bb._work(bb.plans[-1])
    async with asyncio.timeout(PATIENCE_S):
        await bb.was_refused.wait()
    assert bb.refused[-1].retry_after_s > 0
    mount(blobs, "remount,rw")
    await becomes(one, DiskState.OK)
    bb.birth()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted


async def test_an_upload_on_a_disk_that_turns_read_only_goes_on_where_it_was(
    tmp_path: Path, wanted: list[str], mount: Callable[..., None]
) -> None:
    """The coordinator has not looked at its disk yet: chunks that arrive are the first to be refused."""
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, keep=Keep(min_free_bytes=MIB)))
        blobs = stage.folder / "cloud" / "blobs"
        mount(blobs, "size=4m")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("coordinator.upkeep.LOOK_S", 1000.0)
            await stage.start()
            await stage.peer("a", "bb")
            bb, n_chunks = stage.peers["bb"], 0

            def one_chunk(topic: str, _: bytes) -> bool:
                nonlocal n_chunks
                if "/bb/up/d/" in topic:
                    n_chunks += 1
                    if n_chunks == 2:
                        mount(blobs, "remount,ro")
                return False

            stage.broker.drop = one_chunk
            await stage.submit(job_spec())
            async with asyncio.timeout(PATIENCE_S):
                await bb.was_refused.wait()
            assert "Read-only file system" in bb.refused[0].reason
            mount(blobs, "remount,rw")
            async with asyncio.timeout(PATIENCE_S):
                while stage.job().phase is not Phase.COMPLETED:
                    for peer in stage.peers.values():  # as agents do: what was put off is offered again and again
                        for offer in peer.offers.values():
                            peer.say("offer", offer)
                    await asyncio.sleep(0.05)
            await stage.ended()
            assert stage.masters() == wanted


async def test_a_version_that_finds_no_room_is_made_when_there_is(
    tmp_path: Path, wanted: list[str], mount: Callable[..., None]
) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, keep=Keep(min_free_bytes=0)))
        blobs = stage.folder / "cloud" / "blobs"
        mount(blobs, "size=1m")
        one = await stage.start()
        await stage.peer("a", "bb")
        stage.peers["bb"].deaf_in = 1
        await stage.submit(job_spec())
        await stage.until(PHASES["one update is here"])
        ballast = fill(
            blobs, leave_bytes=2 * os.sysconf("SC_PAGESIZE")
        )  # for the update and its log, not for a version
        stage.peers["bb"]._work(stage.peers["bb"].plans[-1])
        await becomes(one, DiskState.REFUSED)
        assert stage.job().phase is Phase.AGGREGATING
        assert "No space left" in one.disk.reason
        ballast.unlink()
        assert (await stage.ended()).phase is Phase.COMPLETED
        assert stage.masters() == wanted
        assert one.disk.state is DiskState.OK


async def test_an_export_waits_for_room_and_holds_up_nothing_else(
    stage: Stage, mount: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    exports = stage.folder / "cloud" / "exports"
    mount(exports, "size=8k")
    one = await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(lambda _: stage.job().phase is Phase.COMPLETED)
    async with asyncio.timeout(PATIENCE_S):
        while "not exported" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert not stage.export().exists()
    mount(exports, "remount,size=1m")
    await stage.ended()
    assert (stage.export() / "adapter_model.safetensors").is_file()
    assert one.disk.state is DiskState.OK
    assert caplog.text.count("not exported") == 1


def test_a_start_on_a_disk_that_cannot_be_written_says_so(tmp_path: Path, mount: Callable[..., None]) -> None:
    folder = tmp_path / "cloud"
    mount(folder, "size=4m")
    Store(folder / "journal.sqlite").close()
    (folder / "blobs").mkdir()
    mount(folder, "remount,ro")
    for state_dir in (folder, folder / "deeper"):
        with pytest.raises(Unavailable, match=f"{state_dir}"):
            Coordinator(CoordinatorConfig(state_dir=str(state_dir)), MemoryBroker().bus("coordinator"))
