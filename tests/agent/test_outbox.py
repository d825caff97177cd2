"""The outbox: what is listed is whole, whatever killed the process, and nothing else is ever offered."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.outbox import Outbox
from protocol.errors import Unavailable
from protocol.messages import Blob, Offer
from tests.full_disk import largest_file

DATA = bytes(range(256)) * 20


def offer(number: int = 1) -> Offer:
    """As the daemon hands it in: everything but the digest and the size."""
    blob = Blob(sha256="0" * 64, size=1, chunk=2048)
    return Offer(job="j", round=number, attempt=2, kind="lora", blob=blob, samples=7, loss=1.5, stopped="deadline")


def finished(folder: Path, data: bytes = DATA) -> Path:
    """The file that a training child left."""
    path = folder / "training.update"
    path.write_bytes(data)
    return path


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox")


def names(outbox: Outbox) -> list[str]:
    return sorted(path.name for path in outbox.folder.iterdir())


def killed_at(call: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child process that is killed (SIGKILL) at its n-th open, rename or unlink; whether it came that far."""
    pid = os.fork()
    if pid == 0:
        left = iter(range(call))

        def hook(name: str, _: object) -> None:
            if name in {"open", "os.rename", "os.remove"} and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in {0, signal.SIGKILL}
    return status == signal.SIGKILL


def test_what_is_kept_survives_a_restart_with_its_digest_and_size(outbox: Outbox, tmp_path: Path) -> None:
    source = finished(tmp_path)
    kept = outbox.keep(source, offer())
    assert kept.blob == Blob(sha256=hashlib.sha256(DATA).hexdigest(), size=len(DATA), chunk=2048)
    assert (kept.samples, kept.loss, kept.stopped, kept.attempt) == (7, 1.5, "deadline", 2)
    assert not source.exists(), "it is moved, not copied"
    again = Outbox(outbox.folder)
    assert again.path(kept.blob.xfer) is None, "nothing is offered before it was looked at"
    assert again.load() == [kept]
    for box in (outbox, again):
        path = box.path(kept.blob.xfer)
        assert path is not None
        assert path.read_bytes() == DATA
    assert again.path("a" * 32) is None


def test_a_loss_that_is_no_number_is_kept_as_none(outbox: Outbox, tmp_path: Path) -> None:
    lost = Offer(job="j", round=1, attempt=0, kind="lora", blob=offer().blob, samples=1, loss=float("nan"))
    outbox.keep(finished(tmp_path), lost)
    assert [o.loss for o in Outbox(outbox.folder).load()] == [None]


def test_the_oldest_is_offered_first(outbox: Outbox, tmp_path: Path) -> None:
    kept = [outbox.keep(finished(tmp_path, bytes([n]) * 9), offer(n)) for n in (3, 1, 2)]
    for age, one in enumerate(reversed(kept)):
        os.utime(outbox.folder / f"{one.blob.sha256}.json", (1e9 - age, 1e9 - age))
    assert [o.round for o in Outbox(outbox.folder).load()] == [3, 1, 2]


def test_what_is_forgotten_is_gone(outbox: Outbox, tmp_path: Path) -> None:
    kept = outbox.keep(finished(tmp_path), offer())
    other = outbox.keep(finished(tmp_path, b"other"), offer(2))
    outbox.forget(kept.blob.xfer)
    outbox.forget(kept.blob.xfer)
    outbox.forget("a" * 32)
    assert outbox.path(kept.blob.xfer) is None
    assert Outbox(outbox.folder).load() == [other]
    assert names(outbox) == [f"{other.blob.sha256}.json", f"{other.blob.sha256}.update"]


def test_killed_anywhere_while_keeping_it_is_whole_or_not_there(outbox: Outbox, tmp_path: Path) -> None:
    found = []
    while killed_at(len(found), lambda: outbox.keep(finished(tmp_path), offer())):
        box = Outbox(outbox.folder)
        offers = box.load()
        found.append(len(offers))
        for one in offers:
            path = box.path(one.blob.xfer)
            assert path is not None
            assert path.read_bytes() == DATA
            box.forget(one.blob.xfer)
        assert names(outbox) == [], "nothing half done is left"
    assert 0 in found
    assert 1 in found, "a kill after the last rename loses nothing"
    assert found == sorted(found), "once it is listed it stays"
    assert len(Outbox(outbox.folder).load()) == 1


def test_killed_anywhere_while_forgetting_nothing_broken_is_offered(outbox: Outbox, tmp_path: Path) -> None:
    found, going_on = [], True
    while going_on:
        kept = outbox.keep(finished(tmp_path), offer())
        going_on = killed_at(len(found), lambda: outbox.forget(kept.blob.xfer))  # noqa: B023 - it runs here and now
        found.append(len(Outbox(outbox.folder).load()))
        assert len(names(outbox)) == 2 * found[-1]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (1, 0)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"t":"offer","job":"../x"}', b"\x00" * 300, b"null"])
def test_a_damaged_entry_is_set_aside_and_the_others_are_offered(
    outbox: Outbox, tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = outbox.keep(finished(tmp_path), offer()), outbox.keep(finished(tmp_path, b"good"), offer(2))
    (outbox.folder / f"{bad.blob.sha256}.json").write_bytes(damage)
    assert Outbox(outbox.folder).load() == [good]
    assert [vars(r)["file"] for r in caplog.records] == [f"{bad.blob.sha256}.json"]
    assert Outbox(outbox.folder).load() == [good]
    assert len(caplog.records) == 1, "it is complained about once"
    left = {f"{bad.blob.sha256}.broken", f"{bad.blob.sha256}.update"}
    assert left <= set(names(outbox)), "both parts are there for whoever wants to know"


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", b"", None])
def test_an_update_of_another_size_is_not_offered(outbox: Outbox, tmp_path: Path, data: bytes | None) -> None:
    kept = outbox.keep(finished(tmp_path), offer())
    file = outbox.folder / f"{kept.blob.sha256}.update"
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    again = Outbox(outbox.folder)
    assert again.load() == []
    assert again.path(kept.blob.xfer) is None
    assert f"{kept.blob.sha256}.broken" in names(outbox)


def test_a_full_disk_is_said_clearly_and_the_outbox_goes_on(outbox: Outbox, tmp_path: Path) -> None:
    source = finished(tmp_path)
    with largest_file(10), pytest.raises(Unavailable, match="make room"):
        outbox.keep(source, offer())
    assert Outbox(outbox.folder).load() == []
    kept = outbox.keep(finished(tmp_path), offer())
    assert Outbox(outbox.folder).load() == [kept]


def test_a_child_that_left_no_file_is_said_clearly(outbox: Outbox, tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        outbox.keep(tmp_path / "training.update", offer())
    assert names(outbox) == []
