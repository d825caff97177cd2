"""The systemd units as systemd itself judges them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe.broker import MALLOC

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
EXPOSURE = "20"
"""In tenths: systemd calls everything below 2.0 OK."""

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")


@pytest.fixture(params=UNITS, ids=lambda unit: unit.stem)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit with its programs where this checkout has them."""
    text = request.param.read_text().replace("/opt/fedpipe/bin/", f"{Path(sys.executable).parent}/")
    path: Path = tmp_path / request.param.name
    path.write_text(text)
    return path


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


def test_there_is_a_unit_for_each_daemon() -> None:
    assert [unit.stem for unit in UNITS] == ["fedpipe-agent", "fedpipe-coordinator"]


def test_systemd_understands_every_line(unit: Path) -> None:
    found = analyze("verify", unit)
    about = [line for line in found.stderr.splitlines() if "fedpipe" in line]
    assert (found.returncode, about) == (0, [])


def test_systemd_understands_those_that_reload_the_broker(tmp_path: Path) -> None:
    units = [shutil.copy(unit, tmp_path) for unit in sorted((DEPLOY / "mosquitto").glob("fedpipe-*"))]
    found = analyze("verify", *units)
    about = [line for line in found.stderr.splitlines() if "fedpipe" in line]
    assert (found.returncode, about, len(units)) == (0, [], 2)


def test_the_broker_is_reloaded_after_every_file_that_is_kept_up_to_date() -> None:
    watched = re.findall(
        "^PathChanged=(.*)$", (DEPLOY / "mosquitto/fedpipe-mosquitto-reload.path").read_text(), re.MULTILINE
    )
    assert watched == [f"/etc/mosquitto/fedpipe/{name}" for name in ("acl", "ca.pem", "crl.pem", "server.pem")]
    assert "ReadWritePaths=-/etc/mosquitto/fedpipe\n" in (DEPLOY / "systemd/fedpipe-coordinator.service").read_text()


def test_mosquitto_keeps_its_pages_under_systemd_as_elsewhere() -> None:
    (line,) = re.findall("^Environment=(.*)$", (DEPLOY / "mosquitto/service.conf").read_text(), re.MULTILINE)
    assert line == " ".join(f"{name}={n_bytes}" for name, n_bytes in MALLOC.items())


def test_little_of_the_machine_is_exposed(unit: Path) -> None:
    found = analyze("security", "--offline=true", f"--threshold={EXPOSURE}", unit)
    assert found.returncode == 0, found.stdout[-300:]


def test_a_unit_that_exposes_more_is_found(unit: Path) -> None:
    unit.write_text(re.sub(r"(?m)^(Protect|Restrict|SystemCall|Capability).*\n", "", unit.read_text()))
    assert analyze("security", "--offline=true", f"--threshold={EXPOSURE}", unit).returncode == 1
