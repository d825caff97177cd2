"""The package on a clean Debian with systemd as init: installed, enrolled, trained with, renewed, killed, revoked, misconfigured, purged.

Minutes long and root's business, so only on demand: `make test-install`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from fedpipe import corpus, pretrain

ROOT = Path(__file__).parents[2]
PACKAGES = "systemd,systemd-sysv,dbus,procps,python3,python3-venv,mosquitto"
JOB = """
[job]
name = "j"
[model]
source = "/srv/models/base"
[adapter]
targets = ["all"]
rank = 4
bits = "nf4"
[train]
n_steps = 5
batch = 4
max_tokens = 64
[round]
n_rounds = 2
train_s = 120.0
"""

pytestmark = [
    pytest.mark.skipif("FEDPIPE_INSTALL_TEST" not in os.environ, reason="takes minutes: make test-install"),
    pytest.mark.timeout(2400),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the machine answered, by question."""
    missing = [tool for tool in ("debootstrap", "systemd-nspawn", "dpkg-deb") if shutil.which(tool) is None]
    if missing or os.getuid() != 0:
        pytest.skip(
            f"needs root and {', '.join(missing) or 'nothing else'}: scripts/apt-install debootstrap systemd-container"
        )
    folder = tmp_path_factory.mktemp("install")
    root, wheels = folder / "root", folder / "wheels"
    _do("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root)
    _do(ROOT / "scripts" / "package")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    pip = [ROOT / ".venv/bin/pip", "download", "-q", "-c", ROOT / "constraints.txt", "-d", wheels]
    _do(*pip, "torch")
    _do(*pip, f"fedpipe[agent,coordinator] @ file://{wheel}")
    _furnish(root)
    nspawn = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--private-network"]
    _do(*nspawn, "-D", root, f"--bind-ro={wheels}:/wheels", "-M", "fedpipe-install")
    for log in ("told", "afternoon.log", "journal.log"):
        if (root / "root" / log).exists():
            shutil.copy(root / "root" / log, folder)  # a root is too large to keep
    shutil.rmtree(root)
    return dict(line.split("=", 1) for line in (folder / "told").read_text().splitlines())


def _furnish(root: Path) -> None:
    """A base model and private text where servers have them, the package, and the script that systemd runs at boot."""
    recipe = pretrain.Recipe(hidden=64, intermediate=128, n_layers=2, vocabulary=512, n_steps=20, n_pairs=300)
    base = pretrain.base_model(recipe=recipe, cache=root.parent / "bases")
    shutil.copytree(base, root / "srv/models/base")
    for pairs in corpus.shards(1, limit=400).values():
        (root / "srv/notes").mkdir(parents=True)
        corpus.write_jsonl(pairs, root / "srv/notes/notes.jsonl")
    home, units = root / "root", root / "etc/systemd/system"
    for deb in (ROOT / "dist").glob("*.deb"):
        shutil.copy(deb, home)
    shutil.copy(Path(__file__).parent / "afternoon.sh", home)
    (home / "job.toml").write_text(JOB)
    unit = "[Service]\nType=oneshot\nExecStart=/bin/bash /root/afternoon.sh\nTimeoutStartSec=1800\n"
    (units / "afternoon.service").write_text(unit)
    subprocess.run(["chmod", "-R", "a+rX", root / "srv"], check=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "afternoon.service").symlink_to("../afternoon.service")
    (wants / "mosquitto.service").unlink(missing_ok=True)


def _do(*command: object) -> None:
    found = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{command[0]}: {found.stdout[-1500:]}{found.stderr[-1500:]}"


def test_every_step_of_the_afternoon_succeeds(told: dict[str, str]) -> None:
    setup = ("dpkg", "setup_agent", "setup_coordinator", "ca_init", "broker_config", "reload_path", "coordinator")
    steps = (*setup, "enrol", "check", "starts_without_broker", "online")
    assert {step: told[step] for step in steps} == dict.fromkeys(steps, "0")
    assert told["config_mode"] == "750:root:fedpipe"
    assert "no broker" in told["status_without_broker"]
    assert told["user"].strip() == "fedpipe"
    n_files = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert told["broker"] == f"{n_files} 2", "descriptors, and settings for glibc, by the drop-in for mosquitto"


def test_a_job_is_trained_inside_the_hardened_units(told: dict[str, str]) -> None:
    assert (told["submit"], told["watch"], told["export"]) == ("0", "0", "0")
    (job,) = json.loads(told["job"])
    assert (job["phase"], job["version"]) == ("completed", 2)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(told["adapter"].split())


def test_what_root_prepares_is_the_daemons(told: dict[str, str]) -> None:
    assert (told["foreign"], told["foreign_after"], told["identity"]) == ("", "", "600:fedpipe:fedpipe")


def test_a_certificate_is_renewed_inside_the_running_unit(told: dict[str, str]) -> None:
    assert (told["renewed"], told["renewed_pem"]) == ("0", "600:fedpipe:fedpipe another")
    assert told["online_after_kill"] == "0", "it starts with the new one"


def test_who_is_revoked_ends_for_good_and_comes_back_by_a_token(told: dict[str, str]) -> None:
    assert (told["revoke"], told["revoked"]) == ("0", "77")
    assert (told["enrol_again"], told["online_again"]) == ("0", "0")
    assert (told["audit"], told["audited"]) == ("0", "4"), "two enrolments that a token accepted, each with its outcome"


def test_the_authority_is_rotated_while_the_fleet_stays(told: dict[str, str]) -> None:
    steps = ("rotate", "learned", "retire", "next_submit", "next_watch")
    assert {step: told[step] for step in steps} == dict.fromkeys(steps, "0")


def test_systemd_restarts_what_died_and_leaves_alone_what_is_misconfigured(told: dict[str, str]) -> None:
    assert (told["back_after_kill"], told["stopped"], told["coordinator_stopped"]) == ("0", "success", "success")
    assert told["bad_config"] == "78 failed"
    assert told["traces"] == "0"


def test_purging_leaves_nothing_but_the_state(told: dict[str, str]) -> None:
    assert (told["purge"], told["left"]) == ("0", "")
