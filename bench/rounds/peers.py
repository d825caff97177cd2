"""Flower and NVFlare in the form in which one would deploy them, each in its own virtual environment.

    flower    flower-superlink and one flower-supernode per client, an app that echoes, their own FedAvg (flower_app/)
    nvflare   nvflare poc: one server and n clients as processes of their own, mutual TLS as it is provisioned (nvflare_job/)

Both apps write down when each round begins.  Their environments are made once, in $FEDPIPE_BENCH_CACHE or
~/.cache/fedpipe-bench: their versions of protobuf conflict with each other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
import psutil
import tomli_w

from bench.rounds import watching
from bench.rounds.fleet import Payload, certificates
from fedpipe.broker import free_port
from protocol.errors import Unavailable

FLOWER: Final = "flwr==1.42.0"
NVFLARE: Final = "nvflare==2.9.0"
HERE: Final = Path(__file__).parent
LIMIT_S: Final = 900.0


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a peer: seconds of each round, processor seconds of a round over all its processes, peak RSS by process."""

    name: str
    has_tls: bool
    n_clients: int
    n_tensors: int
    rounds_s: list[float]
    cpu_s: float
    peak_bytes: dict[str, int]


def environment(requirement: str) -> Path:
    """The folder with the programs of a virtual environment that has this package; made at the first call (minutes)."""
    cache = Path(os.environ.get("FEDPIPE_BENCH_CACHE") or Path.home() / ".cache" / "fedpipe-bench")
    name = requirement.partition("==")[0]
    folder, stamp = cache / name, cache / f"{name}.requirement"
    if stamp.exists() and stamp.read_text() == requirement:
        return folder / "bin"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, requirement, "numpy"], check=False).returncode:
        _without_lower_bounds(pip, requirement, folder)
    stamp.write_text(requirement)
    return folder / "bin"


def _without_lower_bounds(pip: Sequence[str], requirement: str, folder: Path) -> None:
    """Where an index lags behind what the package asks of certifi, whose version changes nothing that is measured here."""
    subprocess.run([*pip, "--no-deps", requirement], check=True)
    name = requirement.partition("==")[0]
    (found,) = (d for d in distributions(path=[str(next(folder.glob("lib/*/site-packages")))]) if d.name == name)
    needs = [need for need in found.requires or () if "extra ==" not in need]
    needs = ["certifi" if re.match(r"certifi\b", need) else need for need in needs]
    if subprocess.run([*pip, "numpy", *needs], check=False).returncode:
        raise Unavailable(f"{requirement} cannot be installed here: leave it out with --only")


@contextmanager
def started(
    command: Sequence[str], log: Path, variables: Mapping[str, str], cwd: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with all that it starts, in a session of its own; ended behind the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | variables, cwd=cwd, start_new_session=True
        )
    try:
        yield process
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, how)
                process.wait(timeout=5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def flower(folder: Path, payload: Payload, *, n_clients: int, n_rounds: int, has_tls: bool) -> Peer:
    """SuperLink and SuperNodes."""
    programs, app, log = environment(FLOWER), folder / "app", folder / "marks"
    shutil.copytree(HERE / "flower_app", app)
    port, home = free_port(), folder / "home"
    home.mkdir(parents=True)
    ways: dict[str, list[str]] = {"link": ["--insecure"], "node": ["--insecure"]}
    link: dict[str, object] = {"address": f"127.0.0.1:{port}", "insecure": True}
    if has_tls:
        keys = folder / "keys"
        certificates(keys)
        ways["link"] = ["--ssl-certfile", f"{keys}/server.pem", "--ssl-keyfile", f"{keys}/server.key"]
        ways["link"] += ["--ssl-ca-certfile", f"{keys}/ca.pem"]
        ways["node"] = ["--root-certificates", f"{keys}/ca.pem"]
        link = {"address": f"127.0.0.1:{port}", "root-certificates": f"{keys}/ca.pem"}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "bench", "bench": link}}))
    variables = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    asked: dict[str, int] = {
        "n-rounds": n_rounds,
        "n-clients": n_clients,
        "n-tensors": payload.n_tensors,
        "n-bytes": payload.n_bytes,
    }
    settings = " ".join(f"{key}={value}" for key, value in asked.items()) + f' log="{log}"'
    (folder / "start.sh").write_text(_flower_script(programs, ways, port, n_clients, folder))

    def submit() -> None:
        command = [str(programs / "flwr"), "run", str(app), "bench", "--run-config", settings]
        subprocess.run(command, check=True, env=os.environ | variables, stdout=subprocess.DEVNULL, timeout=120)

    with started(["bash", str(folder / "start.sh")], folder / "log", variables, folder) as process:
        nodes = "SuperNodes have registered"
        _until(lambda: _text(folder / "log").count("Activated node") >= n_clients, nodes, folder)
        kinds = {"ServerApp": "flwr-serverapp", "ClientApp": "flwr-clientapp", "SuperNode": "flower-supernode"}
        kinds["SuperLink"] = "flower-superlink"
        running = partial(watching.family, process.pid)
        return _run("flower", running, kinds, submit, log, folder, n_clients, payload, has_tls=has_tls)


def _flower_script(programs: Path, ways: Mapping[str, Sequence[str]], port: int, n_clients: int, folder: Path) -> str:
    lines = [
        f"{programs}/flower-superlink {' '.join(ways['link'])} --port {port} --disable-runtime-dependency-installation &"
    ]
    lines.append(f"until (echo > /dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.2; done")
    for number in range(n_clients):
        own = free_port()
        lines.append(
            f"{programs}/flower-supernode {' '.join(ways['node'])} --superlink 127.0.0.1:{port} --port {own} "
            f"--node-config 'partition-id={number} num-partitions={n_clients}' > {folder}/node-{number}.log 2>&1 &"
        )
    return "\n".join([*lines, "wait"]) + "\n"


def nvflare(folder: Path, payload: Payload, *, n_clients: int, n_rounds: int, has_tls: bool = True) -> Peer:
    """The proof-of-concept deployment, which is a provisioned project with all participants on one machine."""
    assert has_tls, "nvflare poc is provisioned with mutual TLS"
    programs, work, log, task = environment(NVFLARE), folder / "poc", folder / "marks", folder / "job"
    shutil.copytree(HERE / "nvflare_job", task)
    arguments: dict[str, int | str] = {"num_clients": n_clients, "num_rounds": n_rounds, "n_tensors": payload.n_tensors}
    arguments |= {"n_bytes": payload.n_bytes, "log": str(log)}
    workflow = {"id": "fedavg", "path": "noop.Marking", "args": arguments}
    server = {"format_version": 2, "workflows": [workflow], "components": []}
    (task / "app" / "config" / "config_fed_server.json").write_text(json.dumps(server))
    home = folder / "home"
    home.mkdir(parents=True)
    variables = {
        "NVFLARE_POC_WORKSPACE": str(work),
        "HOME": str(home),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    program = str(programs / "nvflare")

    def call(*arguments: str) -> None:
        with (folder / "calls").open("ab") as out:
            subprocess.run(
                [program, *arguments], check=True, env=os.environ | variables, timeout=240, stdout=out, stderr=out
            )

    call("poc", "prepare", "-n", str(n_clients), "--force")
    (folder / "start.sh").write_text(f"{program} poc start --timeout 180\nwait\nsleep 100000\n")
    try:
        with started(["bash", str(folder / "start.sh")], folder / "log", variables, folder):
            _until(lambda: "ready" in _text(folder / "log").lower(), "the NVFlare system is ready", folder)
            kinds = {
                "server job": "runner_process",
                "client job": "worker_process",
                "server": "server_train",
                "client": "client_train",
            }
            return _run(
                "nvflare",
                partial(watching.mentioning, str(work)),
                kinds,
                lambda: call("job", "submit", "-j", str(task)),
                log,
                folder,
                n_clients,
                payload,
                has_tls=True,
            )
    finally:
        subprocess.run(
            [program, "poc", "stop"], check=False, env=os.environ | variables, timeout=120, capture_output=True
        )


def _run(
    name: str,
    running: Callable[[], list[psutil.Process]],
    kinds: Mapping[str, str],
    submit: Callable[[], None],
    log: Path,
    folder: Path,
    n_clients: int,
    payload: Payload,
    *,
    has_tls: bool,
) -> Peer:
    with watching.sampled(running, kinds) as peak:
        submit()
        _until(lambda: len(_text(log).split()) > 1, f"{name} begins its second round", folder)
        used = watching.cpu_of(running())
        _until(lambda: "end" in _text(log), f"{name} has done its rounds", folder)
        spent = watching.cpu_of(running()) - used
    marks = [float(word) for word in _text(log).split() if word != "end"]
    seconds = [after - before for before, after in pairwise(marks)]
    return Peer(
        name=name,
        has_tls=has_tls,
        n_clients=n_clients,
        n_tensors=payload.n_tensors,
        rounds_s=seconds,
        cpu_s=spent / max(1, len(seconds) - 1),
        peak_bytes=dict(peak),
    )


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _until(what: Callable[[], bool], why: str, folder: Path) -> None:
    end = time.monotonic() + LIMIT_S
    while not what():
        if time.monotonic() > end:
            raise Unavailable(f"it never came about that {why}: its logs are in {folder}")
        time.sleep(0.1)
