"""The corpus's beginnings, made from real messages and real files: `python -m tests.fuzz.seeds`.

What the fuzzer finds from there joins them (`python -m tests.fuzz.run --merge`).
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from protocol.adapters import Adapter, Factors
from protocol.frames import encode_frame
from protocol.messages import (
    VERSION,
    Base,
    Blob,
    Body,
    Calibrated,
    Calibration,
    Cancel,
    CoordinatorState,
    Done,
    Envelope,
    Evaluated,
    Evaluation,
    ExecState,
    Execution,
    Grant,
    JobCard,
    Level,
    Matrix,
    Offer,
    Placed,
    Plan,
    Point,
    Presence,
    Progress,
    Rebirth,
    Refuse,
    Report,
    Shape,
    Surveyed,
    Training,
    Wire,
)
from protocol.models import write_model
from protocol.updates import write_update
from tests.fuzz.files import CARD, SHAPES
from tests.fuzz.run import CORPUS, _keep
from tests.fuzz.targets import TARGETS

BASE: Final = Base(source="toy", sha256="b" * 64)
BLOB: Final = Blob(sha256="a" * 64, size=5000, chunk=1024, levels=[Level(rank=1, size=99, sha256="c" * 64)])
WHICH: Final[dict[str, Any]] = {"job": "x", "round": 1, "attempt": 0}
WORDS: Final[list[Body]] = [
    Presence(session="1" * 16, online=True, methods=["qlora"]),
    msgspec.convert({"t": "report", "gpus": [{"index": 0, "name": "x", "total_bytes": 9, "free_bytes": 1}]}, Report),
    Progress(job="x", round=1, phase="training", step=3, n_steps=9, loss=1.5),
    Execution(
        **WHICH,
        serial=2,
        state=ExecState.DONE,
        surveyed=Surveyed(base_sha256="b" * 64, matrices=[Matrix(name="q", d_out=8, d_in=8)], n_train=9, n_eval=1),
        calibrated=Calibrated(
            device="cpu",
            probe_rank=1,
            scores=b"\0\0\x80?",
            shapes=[Shape(batch=1, mean_tokens=9.0, max_tokens=10)],
            points=[Point(bits="nf4", batch=1, n_tokens=9.0, rank=1, step_s=0.1, peak_bytes=9)],
            losses={"nf4": 2.0},
        ),
        evaluated=Evaluated(version=1, n_samples=1, n_tokens=9, loss=1.0, metrics={"exact": 0.5}),
    ),
    Offer(**WHICH, kind="lora", blob=BLOB, samples=4, loss=1.0),
    Grant(xfer="a" * 32, ranges=[(0, 8), (12, 1)]),
    Grant(xfer="a" * 32, ranges=[(0, 8)], by_store=True, urls=["https://store.example/x"]),
    Placed(xfer="a" * 32, ranges=[(0, 8)], urls=["https://store.example/x"]),
    Done(xfer="a" * 32),
    Refuse(xfer="a" * 32, reason="superseded", retry_after_s=3.0),
    Plan(
        **WHICH,
        purpose="train",
        method="qlora",
        base=BASE,
        model=BLOB,
        ranks={"q": 4},
        train=Training(n_steps=3),
        evaluate=Evaluation(metrics=["loss"]),
        calibration=Calibration(),
        issued_at=1.0,
        stop_after_s=9.0,
        ttl_s=9.0,
    ),
    Cancel(**WHICH, reason="x"),
    Rebirth(),
    CoordinatorState(session="1" * 16, online=True),
    JobCard(job="x", method="qlora", base=BASE, data="default", phase="waiting", round=0, n_rounds=2),
]
STORIES: Final = {
    "forged": 16,
    "arrival": 16,
    "frame": 2,
    "bitmap": 4,
    "tensor": 8,
    "transfer": 12,
    "session": 12,
    "round": 12,
}
"""Scripts have no real form: so many of random bytes."""


def main() -> None:
    """Write the beginnings of every target's corpus."""
    for name in TARGETS:
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
    for number, body in enumerate(WORDS):  # without a checksum, which no mutation would pass
        _keep(
            CORPUS / "codec", msgspec.msgpack.encode(Envelope(v=VERSION, ts=1.75e9, ses="1" * 16, seq=number, b=body))
        )
    for size in (1, 100, 1024):
        _keep(CORPUS / "frame", encode_frame(size, b"x" * size))
    _files()
    draw = random.Random(1)
    for name, n in STORIES.items():
        for _ in range(n):
            _keep(CORPUS / name, draw.randbytes(draw.choice([20, 100, 300])))


def _files() -> None:
    rng = np.random.default_rng(1)
    dtypes: list[Wire] = ["fp32", "fp16", "bf16"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "file"
        for rank, dtype in enumerate(dtypes):
            adapter: Adapter = {
                name: Factors(
                    rng.normal(size=(min(rank, 1 + (name == "a")), d_in)).astype(np.float32),
                    rng.normal(size=(d_out, min(rank, 1 + (name == "a")))).astype(np.float32),
                )
                for name, (d_out, d_in) in SHAPES.items()
            }
            write_update(path, adapter, **WHICH, dtype=dtype, scores={"a": [1.0, 0.5]} if rank else {})
            _keep(CORPUS / "update", b"\0" + path.read_bytes())  # 0: the file itself
            write_model(path, adapter, version=1, dtype=dtype)
            _keep(CORPUS / "model", b"\0" + path.read_bytes())
    _tars()


def _tars() -> None:
    import io
    import tarfile

    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=style) as archive:
            for name, content in (("fedpipe.json", CARD), ("adapter_model.safetensors", b"x" * 40)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        _keep(CORPUS / "tar", b"\0" + out.getvalue()[:3072])


if __name__ == "__main__":
    main()
