"""Dashboard and alerts: every figure they name is one that the daemons tell, and Prometheus' own tool takes and tries them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

import agent.metrics
import coordinator.metrics
from protocol.metrics import PATH

DEPLOY = Path(__file__).parents[2] / "deploy" / "grafana"
NAME = re.compile(r"\b(?:fedpipe|process)_[a-z_0-9]+")

TRIED = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'fedpipe_info{instance="c"}', values: '1x200'}
      - {series: 'fedpipe_agents{state="idle", instance="c"}', values: '50x60 20x140'}
      - {series: 'fedpipe_agents{state="offline", instance="c"}', values: '0x60 30x140'}
      - {series: 'fedpipe_jobs_ended_total{phase="failed", instance="c"}', values: '0x60 1x140'}
      - {series: 'fedpipe_job_round_close_timestamp_seconds{name="j", instance="c"}', values: '1800x200'}
      - {series: 'fedpipe_disk_free_bytes{instance="c"}', values: '9e9x60 1e9x140'}
      - {series: 'fedpipe_certificate_expiry_timestamp_seconds{certificate="agent", instance="a"}', values: '1213200x200'}
      - {series: 'fedpipe_certificate_expiry_timestamp_seconds{certificate="authority", instance="c"}', values: '31539600x200'}
      - {series: 'fedpipe_bus_connected{instance="a"}', values: '1x60 0x140'}
      - {series: 'fedpipe_store_usable{instance="c"}', values: '1x60 0x140'}
      - {series: 'fedpipe_messages_rejected_total{kind="flood", instance="c"}', values: '0x60 0+120x140'}
    alert_rule_test:
"""
FIRED = (
    # alert, minute at which it is not there yet, minute at which it is
    ("FedpipeAgentsLost", 60, 75, "warning"),
    ("FedpipeJobFailed", 60, 62, "warning"),
    ("FedpipeRoundTooLong", 40, 41, "warning"),
    ("FedpipeDiskLow", 60, 70, "warning"),
    ("FedpipeCertificateExpires", 59, 62, "warning"),
    ("FedpipeAuthorityEnds", 59, 62, "warning"),
    ("FedpipeNoBroker", 65, 75, "critical"),
    ("FedpipeNoStore", 67, 69, "warning"),
    ("FedpipeRejectedMessages", 60, 85, "warning"),
)


@pytest.fixture(scope="module")
def promtool() -> str:
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if not found:
        pytest.skip("promtool is not installed: apt-get install prometheus, or name it in PROMTOOL")
    return found


def expressions() -> list[str]:
    board = json.loads((DEPLOY / "dashboard.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    rules = [rule for group in alerts() for rule in group["rules"]]
    return shown + [rule["expr"] for rule in rules]


def alerts() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return groups


def told() -> set[str]:
    """Every figure that a daemon may tell, as it is called in a query."""
    found = {"process_resident_memory_bytes"}
    for module in (coordinator.metrics, agent.metrics):
        source = Path(str(module.__file__)).read_text()
        found |= {
            name + suffix
            for kind, name in re.findall(r'(gauge|counter|histogram)\(\s*"(fedpipe_[a-z_]+)"', source)
            for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
        }
        found |= set(re.findall(r'\("(fedpipe_gpu_[a-z_]+)"', source))
    return found


def test_every_figure_that_is_named_is_told() -> None:
    named = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(named) > 25
    assert named - told() == set()


def test_every_alert_says_what_to_do() -> None:
    rules = [rule for group in alerts() for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
    assert {name for name, *_ in FIRED} <= {rule["alert"] for rule in rules}


def test_the_dashboard_has_room_for_every_panel() -> None:
    panels = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def check(*command: str | Path, **how: Any) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout + done.stderr)


def test_prometheus_takes_every_expression(promtool: str, tmp_path: Path) -> None:
    assert "SUCCESS" in check(promtool, "check", "rules", DEPLOY / "alerts.yml")
    assert "SUCCESS" in check(promtool, "check", "config", "--syntax-only", DEPLOY / "prometheus.yml")
    rules = [{"record": f"x:{i}", "expr": expression} for i, expression in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": rules}]}))
    assert f"{len(rules)} rules found" in check(promtool, "check", "rules", tmp_path / "rules.yml")


def test_alerts_fire_when_they_should_and_not_before(promtool: str, tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    rules = {rule["alert"]: rule for group in alerts() for rule in group["rules"]}
    text = TRIED
    for name, before, after, severity in FIRED:
        text += f"      - {{alertname: {name}, eval_time: {before}m, exp_alerts: []}}\n"
        assert rules[name]["labels"]["severity"] == severity
        silent = subprocess.run(  # a test that expects silence where the alert fires has to fail
            [promtool, "test", "rules", "one.yml"],
            cwd=_written(tmp_path, TRIED + f"      - {{alertname: {name}, eval_time: {after}m, exp_alerts: []}}\n"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert silent.returncode != 0, f"{name} does not fire by minute {after}"
    check(promtool, "test", "rules", "one.yml", cwd=_written(tmp_path, text))


def _written(folder: Path, text: str) -> Path:
    (folder / "one.yml").write_text(text)
    return folder


def test_a_real_scrape_passes_the_linter(promtool: str, served: Any) -> None:
    served.join("anna")
    text = httpx.get(served.url + PATH).text
    assert not check(promtool, "check", "metrics", input=text)
