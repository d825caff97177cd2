"""A fleet that is enrolled by token: TLS, access control and signed plans on a real broker, one agent revoked, one certificate renewed."""

from __future__ import annotations

import asyncio
import getpass
import json
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from coordinator.core.state import ENDED, Phase
from coordinator.views import JobView
from fedpipe.broker import free_port, mosquitto_command
from fedpipe.client import Coordinator
from fedpipe.cluster import Cluster, port_open
from protocol import keys
from protocol.errors import Unavailable

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LIMIT_S = 200.0
CERTIFICATE_S = 75.0
"""Agents renew 25 s after they were enrolled."""


class Enrolled:
    """The processes of a fleet, set up as an operator would, by commands alone."""

    def __init__(self, folder: Path, base: Path, texts: dict[str, Path]) -> None:
        self.folder, self.base, self.texts = folder, base, texts
        self.cluster = Cluster(folder)
        self.broker_port, self.api_port, self.desk_port = free_port(), free_port(), free_port()
        self.broker_dir = folder / "mosquitto"
        self.config = folder / "coordinator" / "coordinator.toml"
        self.url = f"https://127.0.0.1:{self.api_port}"

    async def command(self, *words: object) -> str:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *map(str, words)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"FEDPIPE_URL": self.url, "FEDPIPE_CA_FILE": str(self.broker_dir / "ca.pem")},
            cwd=Path(__file__).parents[2],
        )
        out, errors = await process.communicate()
        assert process.returncode == 0, f"{words}: {errors.decode()}"
        return out.decode()

    async def start(self) -> None:
        settings: dict[str, Any] = {
            "state_dir": str(self.folder / "coordinator" / "state"),
            "heartbeat_s": 5.0,
            "broker": {"url": f"mqtts://127.0.0.1:{self.broker_port}", "reconnect_max_s": 2.0},
            "web": {"port": self.api_port, "tls": "on"},
            "trust": {
                "host": "127.0.0.1",
                "port": self.desk_port,
                "broker_dir": str(self.broker_dir),
                "certificate_days": CERTIFICATE_S / 86_400,
            },
        }
        self.config.parent.mkdir(parents=True)
        self.config.write_text(tomli_w.dumps(settings))
        await self.command("coordinator", "ca", "init", "--config", self.config)
        where = ("--out", self.broker_dir, "--host", "127.0.0.1", "--port", self.broker_port)
        await self.command("fedpipe", "mosquitto-config", *where, "--config", self.config)
        binary, *_ = mosquitto_command(self.broker_port, self.folder)
        conf = self.folder / "broker.conf"
        ours = (self.broker_dir / "mosquitto.conf").read_text()
        conf.write_text(f"user {getpass.getuser()}\nlog_dest stdout\n{ours}")
        await self.cluster.add("broker", [binary, "-c", str(conf)])
        await port_open("127.0.0.1", self.broker_port, 20, "the broker")
        await self.cluster.add_daemon("coordinator", "coordinator", settings)
        await port_open("127.0.0.1", self.desk_port, 30, "the coordinator")

    async def enrol(self, agent: str, token: str) -> None:
        folder = self.folder / agent
        place = ("--config", folder / "agent.toml", "--state-dir", folder / "state")
        await self.command(
            *("fedpipe", "enrol", f"https://127.0.0.1:{self.desk_port}", "--token", token, "--agent", agent), *place
        )

    async def add(self, agent: str) -> None:
        """Start an agent from what `enrol` wrote, with its data and the base model named in it."""
        config = tomllib.loads((self.folder / agent / "agent.toml").read_text())
        config |= {
            "heartbeat_s": 5.0,
            "progress_s": 0.5,
            "data": {"default": {"path": str(self.texts[agent])}},
            "base": {"model_dirs": [str(self.base.parent)]},
            "child": {"threads": 1},
        }
        config["broker"]["reconnect_max_s"] = 2.0
        await self.cluster.add_daemon("agent", agent, config)

    async def until(self, what: Callable[[JobView], bool]) -> JobView:
        async with asyncio.timeout(LIMIT_S):
            while True:
                job = await self.look()
                if job and what(job):
                    return job
                if job and job.phase in ENDED:
                    pytest.fail(f"the job ended first: {job.text}; notes {self.cluster.notes}")
                await asyncio.sleep(0.1)

    async def look(self) -> JobView | None:
        try:
            with Coordinator(self.url) as client:
                return await asyncio.to_thread(client.job, "e2e")
        except Unavailable:
            return None

    async def logged(self, name: str, words: str) -> None:
        async with asyncio.timeout(LIMIT_S):
            while True:
                if words in self.cluster.members[name].log.read_text():
                    return
                await asyncio.sleep(0.1)

    def serial(self, agent: str) -> int:
        data = (self.folder / agent / "state" / "identity" / "agent.pem").read_bytes()
        return keys.load_certificate(data, agent).serial_number


def job_text(base: Path) -> str:
    return tomli_w.dumps(
        {
            "job": {"name": "e2e", "seed": 3},
            "model": {"source": str(base)},
            "adapter": {"targets": ["q_proj", "v_proj"], "rank": 4, "bits": "none"},
            "train": {"n_steps": 40, "batch": 8, "learning_rate": 3e-3, "max_tokens": 64},
            "round": {"n_rounds": 2, "start_agents": 3, "min_agents": 2, "train_s": 40.0, "grace_s": 20.0},
            "evaluate": {"held_out_ratio": 0.15, "max_samples": 16},
        }
    )


def share(job: JobView, agent: str) -> str:
    found = job.current.shares.get(agent) if job.current else None
    return found.state if found else ""


async def test_a_fleet_enrols_trains_loses_a_revoked_agent_and_renews(
    tmp_path: Path, base: Path, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPIPE_CA_FILE", str(tmp_path / "fleet" / "mosquitto" / "ca.pem"))
    first, second, thief = sorted(texts)
    fleet = Enrolled(tmp_path / "fleet", base, texts)
    try:
        await fleet.start()
        many = json.loads(await fleet.command("fedpipe", "token", "--uses", "2", "--auto-accept", "--json"))["token"]
        once = json.loads(await fleet.command("fedpipe", "token", "--json"))["token"]
        waiting = asyncio.create_task(fleet.enrol(thief, once))
        await asyncio.gather(fleet.enrol(first, many), fleet.enrol(second, many))
        serial = fleet.serial(first)
        await fleet.logged("coordinator", "state=pending")
        assert not waiting.done(), "whoever has no token that says so waits for a person's word"
        await fleet.command("fedpipe", "accept", thief)
        await waiting
        for agent in sorted(texts):
            await fleet.add(agent)

        job = tmp_path / "job.toml"
        job.write_text(job_text(base))
        await fleet.command("fedpipe", "submit", job)
        await fleet.until(lambda job: share(job, thief) == "TRAINING")
        await fleet.command("fedpipe", "revoke", thief, "--reason", "stolen")
        broker = fleet.cluster.members["broker"].process
        assert broker is not None
        broker.send_signal(signal.SIGHUP)

        done = await fleet.until(lambda job: job.phase is Phase.COMPLETED)
        rounds = [record for record in done.history if record.outcome == "aggregated"]
        assert [record.round for record in rounds] == [1, 2]
        lost = rounds[0].shares[thief]
        assert (lost.state, lost.reason) == ("FAILED", "revoked: stolen")
        assert {a: s.state for a, s in rounds[1].shares.items()} == {first: "DONE", second: "DONE"}
        await fleet.cluster.down(thief)
        await fleet.cluster.up(thief)
        await fleet.logged(thief, "our certificate is revoked")

        await fleet.logged(first, "action=renewed")
        assert fleet.serial(first) != serial
        text = fleet.cluster.members[first].log.read_text()
        await fleet.logged(first, "action=bus_up")
        assert "forged" not in text
        assert "unsigned" not in text
        agents = {agent["id"]: agent for agent in json.loads(await fleet.command("fedpipe", "agents", "--json"))}
        assert agents[first]["online"]
        assert agents[thief]["reason"] == "revoked: stolen"
    finally:
        await fleet.cluster.stop()
