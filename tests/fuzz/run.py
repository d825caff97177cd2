"""`make fuzz`: every target under coverage-guided fuzzing (libFuzzer through atheris), and a table of what came of it.

    python -m tests.fuzz.run [--runs N] [--seconds N] [--only TARGET ...] [--merge]

Each target runs in a process of its own, from its corpus, with limits on memory and on the time of one input.  What is found
on the way stays in build/fuzz/TARGET for the next run; `--merge` rewrites the corpus as the smallest one that reaches as much.
A crash ends its target and leaves its input beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from tests.fuzz.targets import TARGETS, UNGUIDED

ROOT: Final = Path(__file__).resolve().parents[2]
CORPUS: Final = Path(__file__).with_name("corpus")
FOUND: Final = ROOT / "build" / "fuzz"
RESULTS: Final = ROOT / "bench" / "results" / "fuzz.json"
RSS_LIMIT_MB: Final = 768
TIMEOUT_S: Final = 20
MAX_KEPT: Final = 24
"""Inputs per target in the corpus: it is replayed in every run of the tests."""
MAX_BYTES: Final = {"tar": 8192, "codec": 4096, "frame": 2048, "update": 1024, "model": 1024, "transfer": 256}
"""Longest input that is made; scripts of machines are told in 512 bytes."""


def main() -> None:
    """Fuzz the targets one after the other and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=main.__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument(
        "--seconds", type=int, default=0, help="at most this long per target; 0: as long as the runs take"
    )
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--merge", action="store_true", help="rewrite the corpus, minimized, instead of fuzzing")
    asked = parser.parse_args()
    names = asked.only or list(TARGETS)
    if asked.merge:
        for name in names:
            if name not in UNGUIDED:  # its corpus would shrink to next to nothing
                _merge(name)
        return
    print(f"{'target':<10}{'inputs':>10}{'crashes':>9}{'edges':>7}{'peak MiB':>10}{'seconds':>9}")  # noqa: T201
    failed = False
    for name in names:
        row = _fuzz(name, asked.runs, asked.seconds)
        _record(name, row)
        print("{:<10}{inputs:>10}{crashes:>9}{edges:>7}{peak_mib:>10}{seconds:>9}".format(name, **row), flush=True)  # noqa: T201
        failed |= bool(row["crashes"])
    sys.exit(failed)


def _fuzz(name: str, runs: int, seconds: int) -> dict[str, Any]:
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    options = [
        *(f"-runs={runs}", f"-rss_limit_mb={RSS_LIMIT_MB}", f"-timeout={TIMEOUT_S}", "-print_final_stats=1", "-seed=1"),
        *(
            f"-max_len={MAX_BYTES.get(name, 512)}",
            f"-artifact_prefix={found}/",
            *([f"-max_total_time={seconds}"] * (seconds > 0)),
        ),
        *(str(found), str(CORPUS / name)),
    ]
    began_s = time.monotonic()
    said = _child(name, options)
    (found / "log").write_text(said, encoding="utf-8")
    crashed = len(
        re.findall(r"Test unit written to \S*/(?!slow-unit)", said)
    )  # a slow one is told from a hang by TIMEOUT_S
    if crashed:
        print(said[-4000:], file=sys.stderr)  # noqa: T201
    return {
        "inputs": int(_last(r"stat::number_of_executed_units:\s+(\d+)", said) or _last(r"#(\d+)\t", said) or 0),
        "crashes": crashed,
        "edges": int(_last(r"cov: (\d+)", said) or 0),
        "peak_mib": int(_last(r"stat::peak_rss_mb:\s+(\d+)", said) or _last(r"rss: (\d+)Mb", said) or 0),
        "seconds": round(time.monotonic() - began_s),
    }


def _merge(name: str) -> None:
    """The fewest inputs of the corpus and of what was found that reach all edges, up to MAX_KEPT of them, in its place."""
    corpus, smallest = CORPUS / name, FOUND / f"{name}.smallest"
    smallest.mkdir(parents=True, exist_ok=True)
    for path in smallest.iterdir():
        path.unlink()
    _child(name, ["-merge=1", f"-max_len={MAX_BYTES.get(name, 512)}", str(smallest), str(corpus), str(FOUND / name)])
    kept = sorted((path.read_bytes() for path in smallest.iterdir()), key=lambda data: sha256(data).digest())
    assert kept, "nothing was merged"
    for path in [*corpus.iterdir(), *smallest.iterdir()]:
        path.unlink()
    for content in kept[:MAX_KEPT]:
        _keep(corpus, content)


def _keep(folder: Path, content: bytes) -> None:
    (folder / sha256(content).hexdigest()[:12]).write_bytes(content)


def _child(name: str, options: list[str]) -> str:
    command = [sys.executable, "-m", "tests.fuzz.child", name, *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.stdout.decode(errors="replace")


def _last(pattern: str, text: str) -> str:
    found: list[str] = re.findall(pattern, text)
    return found[-1] if found else ""


def _record(name: str, row: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {name: row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
