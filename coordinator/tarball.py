"""One version of an adapter as a tar of its PEFT folder, for the way to an operator's machine.

The members are plain files without a folder, in order of name, owned by nobody and dated by their version: the same version
gives the same bytes.  The file has no name on disk, so nothing is left behind whatever happens to the transfer.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path
from typing import IO

from coordinator.core.state import JobState
from coordinator.exporting import export_version
from coordinator.past import Past
from coordinator.store import Version
from protocol.blobs import Blobs


def adapter_tar(job: JobState, version: Version, past: Past, blobs: Blobs, scratch: Path, software: str) -> IO[bytes]:
    """An open, nameless file that holds the tar, at its start.  Blocking; takes twice the adapter's size in `scratch`.

    Raises BadConfig for an adapter that is empty, OSError when the disk refuses or the version's file is gone.
    """
    with tempfile.TemporaryDirectory(prefix="export-", dir=scratch) as temporary:
        folder = Path(temporary) / "adapter"
        export_version(job, version, past, blobs, folder, software)
        file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - the caller closes it
        try:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for path in sorted(folder.iterdir()):
                    info = tarfile.TarInfo(path.name)
                    info.size, info.mtime = path.stat().st_size, int(version.at)
                    with path.open("rb") as content:
                        tar.addfile(info, content)
        except BaseException:
            file.close()
            raise
    file.seek(0)
    return file
