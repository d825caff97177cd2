"""The afternoon of docs/howto/fleet.md: what the page says is done, in its order, on a real broker with TLS, seen in a real browser."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from cryptography import x509
from peft import PeftModel
from playwright.async_api import Page, async_playwright, expect
from transformers import AutoModelForCausalLM, AutoTokenizer

from coordinator.core.state import ENDED, Phase
from coordinator.feed import AnyNews, ShareMoved
from coordinator.past import comparable
from coordinator.trust.authority import Authority
from coordinator.views import JobView
from fedpipe.client import Coordinator
from protocol import keys
from protocol.bus import BrokerConfig, Disconnected, mqtt_bus
from protocol.errors import Unavailable
from tests.e2e.machines import ROOT, Machines, blocks
from tests.e2e.test_federation import plain_loss

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PAGE = ROOT / "docs" / "howto" / "fleet.md"
LIMIT_S = 120.0
FIRST, STOLEN, THIRD = SERVERS = ("hospital-a", "hospital-b", "hospital-c")
CERTIFICATE_S = 105.0
"""Renewed 35 s after it was issued; what is left bears a renewal that fails while the coordinator is away."""
TUNED: dict[str, dict[str, Any]] = {
    "coordinator.toml": {
        "heartbeat_s": 5.0,
        "broker": {"reconnect_max_s": 2.0},
        "trust": {"certificate_days": CERTIFICATE_S / 86_400},
    },
    "agent.toml": {
        "device": "cpu",
        "heartbeat_s": 5.0,
        "progress_s": 0.5,
        "broker": {"reconnect_max_s": 2.0},
        "child": {"threads": 1},
    },
    "job.toml": {
        "job": {"seed": 3},
        "adapter": {"targets": ["q_proj", "v_proj"], "rank": 4, "bits": "none"},
        "train": {"n_steps": 40, "batch": 8, "learning_rate": 3e-3, "max_tokens": 64},
        "round": {"train_s": 40.0, "grace_s": 20.0},
        "evaluate": {"held_out_ratio": 0.15, "max_samples": 16},
        "agents": {STOLEN: {"n_steps": 1000}},
    },
}
HERE = {"service", "user", "memory", "gpu"}
"""What the doctor may find of the machine that runs the test."""


class Afternoon(Machines):
    """The machines, and the ways to look at what they do."""

    def client(self) -> Coordinator:
        return Coordinator(self.url, self.place("operator", "api.token"), self.place("operator", "ca.pem"))

    async def look(self) -> JobView | None:
        try:
            with self.client() as client:
                return await asyncio.to_thread(client.job, "letters")
        except Unavailable:
            return None

    async def until(self, what: Callable[[JobView], bool]) -> JobView:
        async with asyncio.timeout(LIMIT_S):
            while not (job := await self.look()) or not what(job):
                assert not job or job.phase not in ENDED, f"the job ended first: {job.text}; {self.cluster.notes}"
                await asyncio.sleep(0.1)
            return job

    async def so(self, what: Callable[[], object], why: str) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                while not what():  # noqa: ASYNC110 - other processes bring it about
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pytest.fail(f"it never came about that {why}; {self.cluster.notes}")

    def log(self, name: str) -> str:
        return self.cluster.members[name].log.read_text()

    def identity(self, server: str) -> Path:
        return self.place(server, "/var/lib/fedpipe-agent/identity")


class Listener(threading.Thread):
    """Whoever listens at /v1/events, until the coordinator ends the stream."""

    def __init__(self, client: Coordinator) -> None:
        super().__init__(name="listener", daemon=True)
        self.heard: list[AnyNews] = []
        self._client = client

    def run(self) -> None:
        try:
            for item in self._client.events():
                self.heard.append(item)
        except Unavailable:
            return

    def states(self, agent: str) -> list[tuple[str, str]]:
        return [
            (one.state, one.reason) for one in list(self.heard) if isinstance(one, ShareMoved) and one.agent == agent
        ]


@pytest.fixture
async def afternoon(tmp_path: Path, base: Path, texts: dict[str, Path]) -> AsyncIterator[Afternoon]:
    found = Afternoon(tmp_path / "a", PAGE, TUNED)
    for server, text in zip(SERVERS, sorted(texts.values()), strict=True):
        shutil.copytree(base, found.place(server, "/srv/models/llama-7b"))
        (notes := found.place(server, "/srv/notes")).mkdir()
        shutil.copy(text, notes)
    found.place("operator", "fedpipe_0.1.0_all.deb").touch()
    found.place("operator", "hosts").write_text(f"{STOLEN}\n{THIRD}\n")
    await found.open()
    try:
        yield found
    finally:
        await found.close()


@asynccontextmanager
async def browser(wrong: list[str]) -> AsyncIterator[Page]:
    """A page in Chromium; what its console calls an error goes to `wrong`."""
    place = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if place is None:
        pytest.fail("no Chromium here: run scripts/apt-install chromium")
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=place)
        # The authority is ours alone: a person imports it, curl and the commands of the page verify it.
        page = await chromium.new_page(ignore_https_errors=True, viewport={"width": 1280, "height": 1600})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda said: wrong.append(f"{said.text} {said.location['url']}") if said.type == "error" else None,
        )
        yield page
        await chromium.close()


def checked(report: str) -> None:
    """Nothing failed in a doctor's report, and nothing of ours is in doubt."""
    found = dict(re.findall(r"^([a-z-]+) +(ok|warning|failed|skipped)\b", report, re.MULTILINE))
    assert len(found) >= 5, report
    assert {check for check, status in found.items() if status in {"warning", "failed"}} <= HERE, report


async def test_an_afternoon_as_the_page_has_it(afternoon: Afternoon, tmp_path: Path) -> None:
    here = afternoon
    await here.follow("1")
    checked(await here.follow("2"))
    checked(await here.follow("3"))
    await first_server(here)
    await other_servers(here)

    wrong: list[str] = []
    async with browser(wrong) as page:
        await log_in(here, page)
        wrong.clear()  # the browser calls the question for the token an error
        listener = Listener(here.client())
        listener.start()
        watching = await submitted(here)
        await page.goto(f"{here.url}/#/jobs/letters")
        await here.so(lambda: ("TRAINING", "") in listener.states(STOLEN), f"{STOLEN} trains")
        for server in SERVERS:
            await expect(page.get_by_role("group", name="Timeline")).to_contain_text(server)
        await stolen_server(here)
        await here.so(lambda: ("FAILED", "revoked: stolen") in listener.states(STOLEN), "its share ends")
        await expect(page.get_by_role("img", name=re.compile("Held-out loss, mean over agents: "))).to_be_visible()
        assert wrong == []

        await dying_coordinator(here)
        await renewed_certificate(here)
        job = await here.until(lambda job: job.phase in ENDED)
        assert "completed" in await watching
        await expect(page.locator("main")).to_contain_text("completed")
        await page.screenshot(path=tmp_path / "afternoon.png", full_page=True)
        assert [one for one in wrong if "net::ERR_" not in one] == [], "but that nobody answered"

    check_job(job)
    await the_model(here, job)
    await who_did_what(here)
    assert here.left == [], "the page says more than was done"
    log = "".join(here.log(server) for server in SERVERS)
    assert "forged" not in log
    assert "unsigned" not in log


async def first_server(here: Afternoon) -> None:
    """It enrols with a token of its own, waits to be accepted, and is found to be well."""
    ask, enrol, accept, tail, copy, begin = here.take("4")
    token = (await here.do(ask)).strip()
    enrolling = asyncio.create_task(here.do(enrol, TOKEN=token))
    await here.so(lambda: "state=pending" in here.log("fedpipe-coordinator"), f"{FIRST} waits")
    assert not enrolling.done(), "whoever has no token that says so waits for a person's word"
    await here.do(accept)
    await enrolling
    again = here.type(STOLEN, f"fedpipe enrol https://hub.example.org:8443 --agent {FIRST} --token {token}")
    with pytest.raises(AssertionError, match="token"):
        await again
    await here.do(tail)
    await here.do(copy)
    checked(await here.do(begin))


async def other_servers(here: Afternoon) -> None:
    """They enrol in one go, and come when their daemons are up."""
    enrol, ask = here.take("5")
    await here.do(enrol)
    with here.client() as client:
        await here.so(lambda: {one.id for one in client.agents() if one.online} == set(SERVERS), "all are there")
    agents = await here.do(ask)
    assert all(server in agents for server in SERVERS)


async def log_in(here: Afternoon, page: Page) -> None:
    await page.goto(here.url)
    await page.get_by_label("Token").fill(here.place("operator", "api.token").read_text().strip())
    await page.get_by_role("button", name="Log in").click()
    for server in SERVERS:
        await expect(page.get_by_role("link", name=server, exact=True)).to_be_visible()


async def submitted(here: Afternoon) -> asyncio.Task[str]:
    """The job is handed in; the task is whoever watches it to its end."""
    job_file, commands = here.take("6")
    await here.do(job_file)
    submit, watch = commands.text.split("fedpipe watch")
    await here.type("operator", submit)
    return asyncio.create_task(here.type("operator", f"fedpipe watch{watch}"))


async def stolen_server(here: Afternoon) -> None:
    """It is revoked in the middle of its training: nobody hears it any more, and its certificate opens nothing."""
    await here.follow("7")
    with here.client() as client:
        (gone,) = (agent for agent in client.agents() if agent.id == STOLEN)
    assert (gone.online, gone.reason) == (False, "revoked: stolen")
    place = here.identity(STOLEN)
    stolen = BrokerConfig(
        url=f"mqtts://127.0.0.1:{here.broker_port}", ca_file=str(place / "ca.pem"), cert_file=str(place / "agent.pem")
    )

    async def refused() -> bool:
        async with mqtt_bus(stolen, STOLEN, lambda: None) as bus:
            match await bus.next():
                case Disconnected(reason):
                    return "revoked" in reason
        return False

    async with asyncio.timeout(LIMIT_S):
        while not await refused():  # noqa: ASYNC110 - the broker reads its files anew
            await asyncio.sleep(0.1)


async def renewed_certificate(here: Afternoon) -> None:
    """An agent renews its certificate at work, and comes back with the new one where those before it are refused."""
    await here.so(lambda: "action=renewed" in here.log(FIRST), "a certificate is renewed")
    issued = re.findall(rf"action=certificate agent={FIRST} serial=(\w+)", here.log("fedpipe-coordinator"))
    held = (here.identity(FIRST) / "agent.pem").read_bytes()
    older = {int(serial, 16) for serial in issued} - {keys.load_certificate(held, FIRST).serial_number}
    assert older
    crl, now = here.place("hub", "/etc/mosquitto/fedpipe/crl.pem"), time.time()
    revoked = {entry.serial_number for entry in x509.load_pem_x509_crl(crl.read_bytes())}
    authority = Authority.load(here.place("hub", "/var/lib/fedpipe-coordinator/trust"))
    keys.write_public(crl, authority.revocations(dict.fromkeys(revoked | older, now), now))
    n_connects = here.log(FIRST).count("action=bus_up")
    await here.type("hub", "systemctl restart mosquitto")
    await here.so(lambda: here.log(FIRST).count("action=bus_up") > n_connects, f"{FIRST} comes back")
    await here.so(lambda: "our certificate is revoked" in here.log(STOLEN), f"{STOLEN} is told and ends")


async def dying_coordinator(here: Afternoon) -> None:
    """It is restarted as one does, and then dies, each time in the middle of a round."""
    restart, kill = here.take("8")
    job = await here.until(lambda job: job.current is not None and job.current.purpose == "train")
    await here.do(restart)
    await here.until(lambda later: later.round > job.round and later.phase not in ENDED)
    await here.do(kill)
    await here.so(lambda: here.cluster.members["fedpipe-coordinator"].n_starts == 3, "it is started again")


def check_job(job: JobView) -> None:
    assert job.phase is Phase.COMPLETED, job.text
    n_rounds = tomllib.loads(next(b.text for b in blocks(PAGE) if b.file == "job.toml"))["round"]["n_rounds"]
    rounds = [record for record in job.history if record.outcome == "aggregated"]
    assert [record.round for record in rounds] == list(range(1, n_rounds + 1))
    lost = rounds[0].shares[STOLEN]
    assert (lost.state, lost.reason) == ("FAILED", "revoked: stolen")
    for record in rounds[1:]:
        assert {agent: share.state for agent, share in record.shares.items()} == {FIRST: "DONE", THIRD: "DONE"}
    measured = comparable(
        job.evaluations
    )  # who was measuring when the coordinator died measured nothing of that version
    before, after = measured[0], measured[job.version]
    assert fmean(before[a].loss - after[a].loss for a in after) > 0.02


async def the_model(here: Afternoon, job: JobView) -> None:
    """It is taken out, and is in plain transformers and peft as good as the fleet has said."""
    await here.follow("9")
    models, evaluate = here.place(FIRST, "/srv/models/llama-7b"), here.tuned["job.toml"]["evaluate"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models), here.place("operator", "adapter")
    ).eval()
    measured = plain_loss(
        model,
        AutoTokenizer.from_pretrained(models),
        here.place(FIRST, "/srv/notes"),
        seed=here.tuned["job.toml"]["job"]["seed"],
        ratio=evaluate["held_out_ratio"],
        n=evaluate["max_samples"],
        max_tokens=here.tuned["job.toml"]["train"]["max_tokens"],
    )
    assert measured == pytest.approx(job.evaluations[job.version][FIRST].loss, rel=1e-3)


async def who_did_what(here: Afternoon) -> None:
    """The log is whole and says who; both daemons' figures say what happened."""
    log, figures = here.take("10")
    text = await here.do(log)
    assert "is whole" in text
    for did, what in (("accept", FIRST), ("submit", "letters"), ("revoke", STOLEN), ("export", "letters")):
        assert re.search(rf"token:api\.token +127\.0\.0\.1 +{did} +{what} +20\d", text), text
    text = await here.do(figures)
    coordinator, agent = map(figures_of, text.split("# HELP fedpipe_agent_info"))
    assert coordinator['fedpipe_jobs_ended_total{phase="completed"}'] == 1
    assert coordinator['fedpipe_rounds_total{outcome="aggregated",purpose="train"}'] >= 1
    assert coordinator['fedpipe_agents{state="offline"}'] == coordinator["fedpipe_agents_barred"] == 1
    assert agent["fedpipe_bus_connects_total"] >= 2, "at the start, and with another certificate"
    assert agent["fedpipe_training_step_seconds_count"] >= here.tuned["job.toml"]["train"]["n_steps"]
    assert agent['fedpipe_certificate_expiry_timestamp_seconds{certificate="agent"}'] > time.time()


def figures_of(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(fedpipe_\S+) (\S+)$", text, re.MULTILINE)}
