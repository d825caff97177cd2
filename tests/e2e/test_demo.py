"""`fedpipe demo` as a newcomer runs it, on a tiny base, with processes of its fleet killed on the way."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import psutil
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def member(demo: psutil.Process, package: str, agent: str = "") -> psutil.Process | None:
    """The running process of the fleet that was started as `python -m package ... agent...`."""
    for process in demo.children():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if package in line and agent in line[-1]:
            return process
    return None


async def seen(log: Path, words: str) -> None:
    """Wait until a log says so; the test's time limit is the bound."""
    while not log.exists() or words not in log.read_text(errors="replace"):  # noqa: ASYNC110 - a log wakes nobody
        await asyncio.sleep(0.1)


@pytest.mark.parametrize(("broker", "dies"), [("mosquitto", "coordinator"), ("embedded", "broker")])
async def test_the_demo_survives_kills_and_reports_them(
    base: Path, texts: dict[str, Path], tmp_path: Path, broker: str, dies: str
) -> None:
    out, data = tmp_path / "out", next(iter(texts.values())).parent
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedpipe", "demo", "--agents", "3", "--rounds", "2", "--json", "--seed", "5"),
        *("--broker", broker),
        *("--model", str(base), "--data", str(data), "--out", str(out)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    victim = sorted(texts)[1]
    process = psutil.Process(demo.pid)
    await seen(out / "run" / victim / f"{victim}.log", "round=1 state=TRAINING")
    agent = member(process, "agent", f"/{victim}/")
    assert agent is not None
    agent.kill()
    await seen(out / "run" / "coordinator" / "coordinator.log", "outcome=aggregated")
    other = member(process, dies) or member(process, f"fedpipe.{dies}")
    assert other is not None
    other.kill()
    stdout, stderr = await demo.communicate()
    assert demo.returncode == 0, stderr.decode()[-2000:]
    assert json.loads(stdout) == json.loads((out / "report.json").read_text())
    check_report(json.loads(stdout), set(texts), broker, [victim, dies])
    check_files(out, base)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]


def check_report(report: dict[str, object], agents: set[str], broker: str, killed: list[str]) -> None:
    assert {"model", "seed", "broker", "wall_s", "eval", "rounds", "samples", "events", "adapter"} <= report.keys()
    assert (report["seed"], report["broker"]) == (5, broker)
    found = report["eval"]
    assert isinstance(found, dict)
    assert found["final"] < found["base"]
    assert set(found["per_agent"]) == set(found["alone"]) == agents
    rounds = report["rounds"]
    assert isinstance(rounds, list)
    assert [r["round"] for r in rounds if r["outcome"] == "aggregated"] == [1, 2]
    for share in (share for r in rounds for share in r["agents"].values()):
        assert {"state", "samples", "loss", "bytes_up", "bytes_down", "train_s"} <= share.keys()
    events = report["events"]
    assert isinstance(events, list)
    told = " ".join(event["text"] for event in events)
    assert all(f"{name} died (SIGKILL)" in told for name in killed)
    samples = report["samples"]
    assert isinstance(samples, list)
    assert len(samples) == 3


def check_files(out: Path, base: Path) -> None:
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["']https?:""", page), "the page needs nothing from outside"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "demo.svg").read_text().startswith("<svg")
    assert (out / "run" / "coordinator" / "state" / "journal.sqlite").stat().st_size > 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    assert any(parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)
