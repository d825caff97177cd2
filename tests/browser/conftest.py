"""A real browser on a real coordinator: headless Chromium, driven over its own protocol."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from coordinator.core import events as ev
from coordinator.core.state import Phase
from coordinator.cost import Price, Prices
from coordinator.submission import parse_job
from coordinator.trust.office import Office, create
from protocol import keys
from protocol.enrolment import Enrol
from protocol.messages import (
    Allowance,
    Blob,
    Energy,
    Evaluated,
    ExecState,
    Gpu,
    Matrix,
    Offer,
    Progress,
    Report,
)
from protocol.updates import write_update

Served = Any
"""The fixture's type; it lives in tests/conftest.py."""

WAIT_MS = 60_000
GB = 10**9


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all tests of a module; it must be gone before a test with an event loop of its own."""
    place = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if place is None:
        pytest.fail("no Chromium here: run scripts/apt-install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=place)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """A function that opens a url in a tab of its own; its arguments are those of a browser context.

    A fault in the page (an error that nobody caught, a refusal by its own policy) fails the test.
    """
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_(url: str, **settings: Any) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings})
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


# ------------------------------------------------------------------------------------------------------- a busy fleet

GPUS = (("NVIDIA GeForce RTX 3090", 24), ("NVIDIA RTX A4000", 16), ("NVIDIA L4", 24), ("", 0))
AGENTS = ("aachen", "berlin", "cork", "delft", "essen", "faro", "graz", "jena")
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
N_LAYERS = 8
JOB = """
[job]
name = "support-answers"
[model]
source = "llama-1b"
[adapter]
update_dtype = "fp32"
model_dtype = "fp32"
[train]
n_steps = 40
batch = 8
[round]
n_rounds = 8
min_agents = 2
train_s = 900.0
late = "drop"
"""


def enrol(folder: Path, *, pending: Sequence[str], accepted: Sequence[str] = (), revoked: Sequence[str] = ()) -> None:
    """A coordinator's folder with an authority and with servers that asked it."""
    now = time.time()
    create(folder / "trust", "main", now)
    office = Office(folder / "trust", "main", "mqtts://hub.example.org:8883")
    for i, agent in enumerate((*pending, *accepted, *revoked)):
        at = now - 86400.0 * 80 * (agent == "berlin") - 300.0 * i  # one whose renewal does not come through
        token = office.make_token(agent, 1, 3600.0, auto_accept=agent not in pending, now=at)
        office.enrol(Enrol(token=str(token), csr=keys.request(keys.new_key(), agent)), f"192.0.2.{i + 10}", at)
    for agent in revoked:
        office.revoke(agent, "its disk was sold", now - 60.0)
    office.registry.close()


def energy_of(agent: str) -> Energy | None:
    """One agent cannot measure, and one has a figure of its owner's."""
    if agent == "delft":
        return None
    return Energy(joules=4200.0 + 300 * AGENTS.index(agent), source="declared" if agent == "cork" else "measured")


class Story:
    """A fleet of eight that has done some rounds of a job, told in time that passes as the story wants."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.random = random.Random(7)
        served.coordinator.presence._limit_s = 1e9  # nobody speaks while the tests look
        served.matrices = tuple(
            Matrix(name=f"model.layers.{layer}.{kind}", d_out=64, d_in=64)
            for layer in range(N_LAYERS)
            for kind in KINDS
        )

    def pass_(self, seconds: float) -> None:
        """Time goes by."""
        self.served.coordinator.clock._offset += seconds

    def gather(self) -> None:
        """All agents come and report; one is kept from training by its owner."""
        for i, agent in enumerate(AGENTS):
            self.served.join(agent)
            name, size = GPUS[i % len(GPUS)]
            free = int(size * GB * self.random.uniform(0.4, 0.95))
            gpu = Gpu(index=0, name=name, total_bytes=size * GB, free_bytes=free, power_w=180.0, temperature_c=61.0)
            allowance = Allowance(
                device=name or "cpu",
                memory_bytes=free or 12 * GB,
                paused="outside the hours 20:00-06:00" if agent == "jena" else "",
            )
            report = Report(
                gpus=[gpu] if name else [],
                driver="570.124",
                n_cpus=16,
                cpu_load_ratio=0.2,
                ram_total_bytes=64 * GB,
                ram_available_bytes=48 * GB,
                disk_free_bytes=900 * GB,
                up_bytes_per_s=self.random.uniform(1e6, 9e6),
                down_bytes_per_s=self.random.uniform(5e6, 4e7),
                bits=["none", "nf4"],
                allowance=allowance,
            )
            self.served.post(ev.AgentReported(agent=agent, report=report))

    def submit(self, text: str = JOB) -> None:
        """The job is in; ranks and matrices differ from agent to agent."""
        lines = [text]
        for i, agent in enumerate(AGENTS):
            targets = [
                f"layers.{n}.{kind}" for n in range(N_LAYERS) for kind in KINDS if (n + i) % 4 or "q_proj" in kind
            ]
            lines.append(
                f"[agents.{agent}]\nrank = {2 ** (1 + i % 5)}\nbits = '{'nf4' if i % 2 else 'none'}'\ntargets = {targets}\n"
            )
        spec = parse_job("\n".join(lines), "story", [])
        self.served.post(ev.JobSubmitted(spec=spec))

    def survey(self) -> None:
        """All who may train answer; one has no data."""
        self.pass_(4)
        self.served.move("graz", ExecState.FAILED, "support-answers", reason="no data set 'default' here")
        self.served.survey(*[a for a in AGENTS if a not in {"graz", "jena"}], job="support-answers")

    def round(self, number: int) -> None:
        """A round in which each agent takes its time; cork breaks off in the second."""
        served, name = self.served, "support-answers"
        agents = sorted(served.job(name).round.shares)
        self.pass_(1.5)
        for agent in agents:
            self.pass_(self.random.uniform(0.2, 1.2))
            self._train(agent, number)
        self.pass_(17)
        for agent in agents:
            self.pass_(self.random.uniform(0.5, 4))
            if (agent, number) == ("cork", 2):
                served.move(agent, ExecState.FAILED, name, reason="out_of_memory: 15.9 GB were not enough for batch 8")
                continue
            offer = self._offer(agent, number)
            served.move(agent, ExecState.UPLOADING, name)
            self.pass_(self.random.uniform(0.8, 3))
            served.post(ev.UpdateOffered(agent=agent, offer=offer))
            served.until(
                lambda state, agent=agent: (
                    (r := state.jobs[name].round) is None
                    or r.number != number
                    or r.shares[agent].state is ExecState.DONE
                )
            )
        served.until(
            lambda state: state.jobs[name].round_number == number and state.jobs[name].phase is Phase.COLLECTING
        )

    def _train(self, agent: str, number: int) -> None:
        loss = 2.9 * 0.86 ** (number - 1) + 0.35 + 0.06 * AGENTS.index(agent)
        found = Evaluated(version=number - 1, n_samples=64, n_tokens=9000, loss=loss)
        self.served.move(agent, ExecState.TRAINING, "support-answers", evaluated=found)

    def _offer(self, agent: str, number: int) -> Offer:
        served, name = self.served, "support-answers"
        share = served.job(name).round.shares[agent]
        path = served.folder / f"{agent}.update"
        factors = {m: f for m, f in served.factors(agent).items() if m in share.choice.ranks}
        factors = {
            m: type(f)(a=f.a[: share.choice.ranks[m]], b=f.b[:, : share.choice.ranks[m]]) for m, f in factors.items()
        }
        size = write_update(path, factors, job=name, round=number, attempt=0, dtype="fp32")
        return Offer(
            job=name,
            round=number,
            attempt=0,
            kind="lora",
            blob=Blob(sha256=served.coordinator.blobs.put_file(path), size=size),
            samples=320,
            loss=3.1 * 0.85**number + 0.3,
            train_s=20.0,
            steps=40,
            peak_bytes=9 * GB,
            bytes_down=size // 2,
            energy=energy_of(agent),
        )

    def half_a_round(self, number: int) -> None:
        """A round under way: most train, one uploads, one is away."""
        served, name = self.served, "support-answers"
        self.pass_(1.5)
        agents = sorted(served.job(name).round.shares)
        for agent in agents[1:]:
            self.pass_(0.7)
            self._train(agent, number)
        self.pass_(9)
        for i, agent in enumerate(agents[1:]):
            body = Progress(
                job=name, round=number, phase="training", step=11 + 4 * i, n_steps=40, samples=88 + 32 * i, loss=1.3
            )
            served.publish(agent, "progress", body)
        served.post(ev.AgentLeft(agent=agents[-1], session=agents[-1][0] * 16, reason="the connection was lost"))


@pytest.fixture(scope="module")
def busy(served_kind: type[Served], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A served coordinator whose fleet has done four rounds and is in the middle of the fifth, for all tests that only look."""
    folder = tmp_path_factory.mktemp("busy")
    enrol(folder, pending=["heide", "ilmenau"], accepted=AGENTS, revoked=["kassel"])
    prices = Prices(currency="EUR", per_kwh=0.32, agents={"delft": Price(per_hour=1.1)})
    served = served_kind(folder, prices=prices)
    story = Story(served)
    story.gather()
    story.submit()
    story.survey()
    for number in range(1, 5):
        story.round(number)
    story.half_a_round(5)
    yield served
    served.close()
