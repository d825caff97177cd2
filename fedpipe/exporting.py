"""`fedpipe export`: download one version and put it where the operator wants it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from fedpipe.client import Coordinator


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written where."""

    job: str
    version: int
    folder: str
    merged: bool


def export_job(
    coordinator: Coordinator, job: str, version: int | None, out: Path | None, base: Path | None, *, quiet: bool
) -> Exported:
    """Download an adapter to `out` (None: ./JOB-vN), merged into the model in `base` if that is given.

    Raises BadConfig, Unavailable.
    """
    from fedpipe.unpacking import unpack, unpack_merged

    with tempfile.TemporaryDirectory(prefix="fedpipe-") as scratch:
        tar = Path(scratch) / "adapter.tar"
        found = coordinator.adapter(job, version, tar)
        folder = out or Path(f"{job}-v{found}" + ("-merged" if base else ""))
        if base is None:
            unpack(tar, folder)
        elif quiet:
            unpack_merged(tar, base, folder, lambda _done, _total: None)
        else:
            _with_bar(lambda progress: unpack_merged(tar, base, folder, progress))
    return Exported(job=job, version=found, folder=str(folder), merged=base is not None)


def _with_bar(work: Callable[[Callable[[int, int], None]], None]) -> None:
    from rich.progress import Progress

    with Progress(transient=True) as bars:
        bar = bars.add_task("merging", total=None)
        work(lambda done, total: bars.update(bar, completed=done, total=total))
