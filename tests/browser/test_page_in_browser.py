"""The operator's page in a real browser: what it shows is what the API says, live, safely, and for everyone."""

from __future__ import annotations

import asyncio
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from coordinator.core import events as ev
from coordinator.core.state import Phase
from coordinator.figures import duration_text, energy_text, loss_text, size_text
from coordinator.submission import parse_job
from protocol.messages import Allowance, ExecState, Report
from tests.browser.conftest import enrol

Served = Any
"""The fixture's type; it lives in tests/conftest.py."""

Opener = Callable[..., Page]

JOB = """
[job]
name = "j"
[model]
source = "toy"
[round]
n_rounds = 2
min_agents = 2
"""
expect.set_options(timeout=60_000)
HOSTILE = "<img src=x onerror='window.taken=1'><script>window.taken=1</script>"
PLACES = {
    "fleet": "#/",
    "jobs": "#/jobs",
    "job": "#/jobs/support-answers",
    "agent": "#/agents/aachen",
    "enrolments": "#/enrolments",
    "events": "#/events",
}


def submit(served: Served, text: str = JOB) -> None:
    headers = {"content-type": "application/toml"}
    assert httpx.post(f"{served.url}/v1/jobs", content=text, headers=headers, trust_env=False).status_code == 201


def cells(page: Page, label: str) -> list[list[str]]:
    """The texts of a table's body."""
    rows = page.get_by_role("group", name=label, exact=True).locator("tbody tr")
    return [row.locator("th, td").all_inner_texts() for row in rows.all()]


def figure(page: Page, name: str) -> str:
    """One of the figures at the top, with what stands behind it."""
    return page.locator(f".figure:has(dt:text-is('{name}')) dd").inner_text()


# ------------------------------------------------------------------------------------------------------------- numbers


def test_the_numbers_on_the_page_are_those_of_the_api(busy: Served, open_page: Opener) -> None:
    url = busy.url
    view = httpx.get(f"{url}/v1/jobs/support-answers", trust_env=False).json()
    fleet = httpx.get(f"{url}/v1/fleet", trust_env=False).json()
    page = open_page(f"{url}/#/jobs/support-answers")
    page.get_by_role("group", name="Plan of each agent").wait_for()
    losses = {int(v): {a: e["loss"] for a, e in by.items()} for v, by in view["evaluations"].items()}
    means = {v: fmean(by.values()) for v, by in losses.items()}
    both = losses[0].keys() & losses[4].keys()
    assert 0 < len(both) < len(losses[0]), "one has not measured yet"
    first, last = (loss_text(fmean(losses[v][agent] for agent in both)) for v in (0, 4))
    assert figure(page, "Held-out loss").split("\n") == [last, f"from {first} on {len(both)} agents"]
    cost = view["cost"]
    assert size_text(cost["bytes_up"]) in figure(page, "Moved")
    assert (cost["n_failed"], cost["n_shares"]) == (1, 24)
    assert "1 of 24 shares failed" in figure(page, "Agents")
    assert energy_text(cost["joules"]) in figure(page, "Energy")
    assert energy_text(cost["declared_j"]) in figure(page, "Energy")
    assert f"{cost['money']:,.2f} EUR" in figure(page, "Cost so far")
    assert f"{cost['samples']:,} samples" in figure(page, "Training time")
    assert cells(page, "Rounds") == [
        [
            str(record["round"]),
            record["outcome"],
            f"{sum(s['state'] == 'DONE' for s in record['shares'].values())} of {len(record['shares'])}",
            f"{sum(s['samples'] for s in record['shares'].values()):,}",
            loss_text(record["loss"]),
            loss_text(means[record["round"]]),
            size_text(sum(s["bytes_up"] for s in record["shares"].values())),
            size_text(sum(s["bytes_down"] for s in record["shares"].values())),
            duration_text(record["wall_s"]),
        ]
        for record in reversed(view["history"])
    ]
    assert [row[:2] for row in cells(page, "Versions")] == [
        [str(v["version"]), f"{loss_text(v['loss'])} ({v['n_evaluated']})"] for v in reversed(view["versions"])
    ]
    shares = view["current"]["shares"]
    rows = {row[0]: row for row in cells(page, "Agents of the job")}
    for agent, share in shares.items():
        if share["progress"]:
            assert rows[agent][2].strip() == f"{share['progress']['step']}/{share['progress']['n_steps']}"
    assert rows["graz"][-1] == view["members"]["graz"]["excluded"] == "no data set 'default' here"
    assert "out_of_memory" in page.locator("#faults").inner_text()

    page.goto(f"{url}/#/")
    page.get_by_role("group", name="Agents", exact=True).wait_for()
    shown = {row[0]: row for row in cells(page, "Agents")}
    assert sorted(shown) == [agent["id"] for agent in fleet["agents"]]
    for agent in fleet["agents"]:
        if agent["online"]:
            assert shown[agent["id"]][2] == agent["doing"]
    assert shown["faro"][1:3] == ["✕\noffline", "the connection was lost"]
    assert shown["jena"][2] == "paused: outside the hours 20:00-06:00"
    n_online = sum(agent["online"] for agent in fleet["agents"])
    assert figure(page, "Agents online").split() == [str(n_online), "of", str(len(fleet["agents"]))]


def test_a_plan_and_a_round_are_drawn_from_what_was_recorded(busy: Served, open_page: Opener) -> None:
    url = busy.url
    plan = httpx.get(f"{url}/v1/jobs/support-answers/plan", trust_env=False).json()
    record = httpx.get(f"{url}/v1/jobs/support-answers", trust_env=False).json()["history"][1]
    page = open_page(f"{url}/#/jobs/support-answers")
    page.get_by_role("button", name="berlin").click()
    ranks = plan["agents"]["berlin"]["choice"]["ranks"]
    drawn = page.locator("svg.heat .cell + text").all_text_contents()
    assert sorted(drawn) == sorted(str(ranks.get(name, "·")) for name in plan["matrices"])
    told = page.locator("svg.heat title", has_text="layer 1, q").first.text_content()
    assert told == f"layer 1, q: rank {ranks['model.layers.1.self_attn.q_proj']}"

    page.get_by_label("Round", exact=True).select_option(label="round 2: aggregated")
    parts = page.locator("svg.timeline g", has_text="berlin").locator("rect title").all_text_contents()
    share = record["shares"]["berlin"]
    at = [share["assigned_at"], share["entered"]["TRAINING"], share["entered"]["UPLOADING"], share["ended_at"]]
    end = record["opened_at"] + record["wall_s"]
    assert parts == [
        f"{kind} {duration_text(to - since)}"
        for kind, since, to in zip(("receive", "train", "upload", "wait"), at, [*at[1:], end], strict=True)
    ]
    broken = page.locator("svg.timeline g", has_text="cork")
    assert [text.split()[0] for text in broken.locator("rect title").all_text_contents()] == [
        "receive",
        "train",
        "wait",
    ]
    assert broken.locator(".state").text_content() == "failed"


def test_an_adapter_is_downloaded(busy: Served, open_page: Opener) -> None:
    page = open_page(f"{busy.url}/#/jobs/support-answers")
    with page.expect_download() as download:
        page.get_by_label("Download version 3").click()
    assert download.value.suggested_filename == "support-answers-v3.tar"
    with tarfile.open(download.value.path()) as tar:
        assert "adapter_model.safetensors" in tar.getnames()


# ---------------------------------------------------------------------------------------------------------------- live


def test_a_job_runs_through_before_the_readers_eyes(served: Served, open_page: Opener) -> None:
    page = open_page(f"{served.url}/#/jobs")
    refused: list[str] = []
    page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
    expect(page.get_by_text("fedpipe submit job.toml")).to_be_visible()
    submit(served)
    page.get_by_role("link", name="j", exact=True).click()
    expect(page.locator(".head .chip")).to_contain_text("waiting")
    expect(page.locator(".head .soft")).to_have_text("round 1 of 2")
    expect(page.locator("#current")).to_contain_text("No agent is in the job yet")
    expect(page.locator("#plan")).to_contain_text("There is no plan yet")
    served.join("a", "b")
    served.survey("a", "b")
    expect(page.locator("#current h2")).to_have_text("Round 1 now")
    served.move("a", ExecState.TRAINING)
    served.say("a", step=7, loss=4.5)
    expect(page.locator("#current tr[data-key=a]")).to_contain_text("7/50")
    served.run_round("a", "b", loss=3.0)
    expect(page.locator("#versions tbody tr")).to_have_count(1)
    expect(page.get_by_role("img", name="Loss over versions")).to_have_attribute(
        "aria-label", re.compile("3.000 at version 0")
    )
    served.run_round("a", "b", loss=2.0)
    served.finish("a", "b", loss=1.0)
    expect(page.locator(".head .chip")).to_contain_text("completed")
    assert figure(page, "Held-out loss").split("\n") == ["1.000", "from 3.000 on 2 agents"]
    expect(page.get_by_role("button", name="Cancel the job")).to_have_count(0)
    expect(page.locator("#log li")).not_to_have_count(0)
    assert "round closed" in page.locator("#log").inner_text()
    expect(page.get_by_role("group", name="Plan of each agent")).to_be_visible()
    assert [url for url in refused if not url.endswith("/enrolments")] == [], "asked for what is not there yet"
    assert page.evaluate("performance.getEntriesByType('navigation').length") == 1


def test_a_coordinator_that_comes_back_is_found_again(serve: Callable[..., Served], open_page: Opener) -> None:
    first = serve()
    submit(first)
    page = open_page(f"{first.url}/#/jobs")
    expect(page.get_by_role("link", name="j", exact=True)).to_be_visible()
    first.close()
    expect(page.get_by_role("status")).to_contain_text("The coordinator is away")
    expect(page.get_by_role("link", name="j", exact=True)).to_be_visible()
    second = type(first)(first.folder, port=int(first.url.rpartition(":")[2]))
    try:
        expect(page.get_by_role("status")).to_be_empty()
        submit(second, JOB.replace('"j"', '"k"'))
        expect(page.get_by_role("link", name="k", exact=True)).to_be_visible()
    finally:
        page.close()
        second.close()


def test_a_broker_that_is_away_is_said(served: Served, open_page: Opener) -> None:
    page = open_page(f"{served.url}/#/")
    expect(page.locator(".link")).to_have_text("broker connected")
    served.loop.call_soon_threadsafe(served.broker.stop)
    expect(page.get_by_role("status")).to_contain_text("No connection to the broker")
    served.loop.call_soon_threadsafe(served.broker.start)
    expect(page.locator(".link")).to_have_text("broker connected")
    expect(page.get_by_role("status")).to_be_empty()


def test_a_job_is_cancelled_only_after_a_second_word_and_by_keyboard_alone(served: Served, open_page: Opener) -> None:
    submit(served)
    page = open_page(f"{served.url}/#/jobs/j")
    cancel = page.locator(".head").get_by_role("button", name="Cancel the job")
    cancel.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Cancel j?")
    expect(page.get_by_role("button", name="Go on training")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(cancel).to_be_focused()
    assert served.job().phase is Phase.WAITING
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".head .chip")).to_contain_text("cancelled")
    assert served.job().phase is Phase.CANCELLED


def test_a_job_is_paused_stopped_resumed_and_taken_back(served: Served, open_page: Opener) -> None:
    submit(served)
    served.join("a", "b")
    served.survey("a", "b")
    served.run_round("a", "b")
    page = open_page(f"{served.url}/#/jobs/j")
    head, dialog = page.locator(".head"), page.get_by_role("dialog")
    head.get_by_role("button", name="Pause the job").click()
    dialog.get_by_label("Reason").fill("heat")
    dialog.get_by_role("button", name="Pause the job").click()
    expect(head).to_contain_text("round 2 of 2; then paused, by local: heat")
    head.get_by_role("button", name="Stop the round now").click()
    dialog.get_by_role("button", name="Stop the round").click()
    expect(head.locator(".chip")).to_contain_text("paused")
    page.get_by_role("button", name="Go back to version 1").wait_for(state="detached")
    head.get_by_role("button", name="Resume").click()
    expect(head.locator(".chip")).to_contain_text("collecting")
    served.run_round("a", "b")
    page.get_by_role("button", name="Go back to version 1").click()
    dialog.get_by_label("Reason").fill("worse")
    dialog.get_by_role("button", name="Go back").click()
    expect(page.locator("#versions tbody tr").first).to_contain_text("3, which is 1")
    table = page.get_by_role("group", name="Versions", exact=True)
    for width in (1280, 1100, 390):
        page.set_viewport_size({"width": width, "height": 800})
        page.get_by_role("button", name="Go back to version 2").wait_for()
        assert table.evaluate("box => box.scrollWidth <= box.clientWidth"), f"cut off at {width}"
    assert [(r.of, r.by, r.reason) for r in served.job().rollbacks] == [(1, "local", "worse")]


def test_servers_that_ask_are_let_in_sent_away_and_taken_back_after_a_second_word(
    served_kind: type[Served], tmp_path: Path, open_page: Opener
) -> None:
    enrol(tmp_path, pending=["anna", "berta"])
    served = served_kind(tmp_path)
    page = open_page(f"{served.url}/#/enrolments")
    row = page.locator("tr[data-key=anna]")
    expect(page.locator("nav .badge")).to_have_text("2")
    key = httpx.get(f"{served.url}/v1/enrolments", trust_env=False).json()[0]["key"]
    expect(row).to_contain_text(key[:16])
    row.get_by_role("button", name="accept anna").click()
    expect(page.get_by_role("dialog")).to_contain_text(key[:16])
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(row).to_contain_text("pending")
    row.get_by_role("button", name="accept anna").click()
    page.get_by_role("button", name="Let it in").click()
    expect(row).to_contain_text("in 90 d")
    expect(page.locator("nav .badge")).to_have_text("1")
    page.get_by_role("button", name="reject berta").click()
    page.get_by_label("Reason").fill("who are you?")
    page.get_by_role("button", name="Send it away").click()
    expect(page.locator("tr[data-key=berta]")).to_contain_text("who are you?")
    expect(page.locator("nav .badge")).to_have_count(0)
    row.get_by_role("button", name="revoke anna").click()
    page.get_by_label("Reason").fill("sold")
    page.get_by_role("button", name="Take it back").click()
    expect(row).to_contain_text("revoked")
    expect(row.get_by_role("button")).to_have_count(0)
    told = httpx.get(f"{served.url}/v1/enrolments", trust_env=False).json()
    assert [(one["state"], one["reason"]) for one in told] == [("revoked", "sold"), ("rejected", "who are you?")]
    written = (tmp_path / "audit.log").read_text()
    assert [word for word in ("accept", "reject", "revoke") if f'"{word}"' not in written] == []
    page.close()
    served.close()


def test_without_an_authority_enrolments_are_not_in_the_way(served: Served, open_page: Opener) -> None:
    page = open_page(f"{served.url}/#/enrolments")
    expect(page.get_by_text("fedpipe-coordinator ca init")).to_be_visible()
    expect(page.get_by_role("link", name="Enrolments")).to_have_count(0)
    expect(page.get_by_role("status")).to_be_empty()


# --------------------------------------------------------------------------------------------------------- large fleets


def test_thousands_of_agents_are_paged_sorted_and_filtered(served: Served, open_page: Opener) -> None:
    n, names = 3000, [f"edge-{i:04}" for i in range(3000)]

    async def come() -> None:
        for i, name in enumerate(names):
            served.coordinator.tell(ev.AgentJoined(agent=name, session=f"{i:016x}", methods=["qlora"]))
            allowance = Allowance(memory_bytes=(i * 7919 % n + 1) * 10**6, paused="at night" if i % 10 == 0 else "")
            served.coordinator.tell(ev.AgentReported(agent=name, report=Report(n_cpus=4, allowance=allowance)))
        await served.coordinator.post(ev.Tick())

    asyncio.run_coroutine_threadsafe(come(), served.loop).result(60)
    page = open_page(f"{served.url}/#/")
    region = page.get_by_role("group", name="Agents", exact=True)
    expect(region.locator("tbody tr")).to_have_count(100)
    pages = page.get_by_role("navigation", name="Pages: Agents")
    expect(pages).to_contain_text("1–100 of 3,000")
    pages.get_by_role("button", name="Next").click()
    expect(region.locator("tbody tr").first).to_contain_text("edge-0100")
    by_memory = page.get_by_role("button", name="May take")
    by_memory.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(region.locator("th[aria-sort=descending]")).to_contain_text("May take")
    expect(by_memory).to_be_focused()
    top = max(range(n), key=lambda i: i * 7919 % n)
    expect(region.locator("tbody tr").first).to_contain_text(names[top])
    page.get_by_label("Filter").fill("edge-29")
    expect(pages).to_have_count(0)
    expect(region.locator("tbody tr")).to_have_count(100)
    page.get_by_label("State").select_option("paused")
    expect(region.locator("tbody tr")).to_have_count(10)
    page.get_by_label("Filter").fill("nobody")
    expect(page.get_by_text("No agent fits the filter.")).to_be_visible()


# -------------------------------------------------------------------------------------------------------------- safety


def test_text_from_elsewhere_is_only_ever_text(served: Served, open_page: Opener) -> None:
    job = JOB.replace('"toy"', f"'''{HOSTILE}'''")
    spec = parse_job(job, "job", [])
    served.post(ev.JobSubmitted(spec=spec))
    served.join("a", "b")
    served.post(ev.AgentJoined(agent=HOSTILE, session="e" * 16, software=HOSTILE, methods=[HOSTILE]))
    served.post(
        ev.AgentReported(
            agent="a",
            report=Report(driver=HOSTILE, notes=[HOSTILE], allowance=Allowance(device=HOSTILE, paused=HOSTILE)),
        )
    )
    served.move("a", ExecState.FAILED, reason=HOSTILE)
    page = open_page(f"{served.url}/#/")
    for place in (
        "#/",
        "#/jobs",
        "#/jobs/j",
        "#/agents/a",
        f"#/agents/{HOSTILE}",
        f"#/jobs/{HOSTILE}",
        "#/agents/%zz",
        "#/events",
    ):
        page.goto(f"{served.url}/{place}")
        served.post(ev.AgentLeft(agent=HOSTILE, session="e" * 16, reason=HOSTILE))
        served.post(ev.AgentJoined(agent=HOSTILE, session="e" * 16, software=HOSTILE, methods=["qlora"]))
        expect(page.locator("main")).not_to_contain_text("Reading the job")
        assert page.locator("main img, main script").count() == 0
        assert page.evaluate("window.taken") is None, place
    page.goto(f"{served.url}/#/jobs/j")
    expect(page.locator("#faults")).to_contain_text(HOSTILE)
    served.post(ev.JobCancelled(job="j", reason=HOSTILE))
    expect(page.locator(".head")).to_contain_text(HOSTILE)
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (error) { return error.name; } }"
    )
    assert refused == "TypeError"


def test_with_a_token_the_page_asks_for_it_and_keeps_it_in_this_tab(
    serve: Callable[..., Served], open_page: Opener, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("s3cret")
    served = serve(token_file=str(tmp_path / "token"))
    page = open_page(f"{served.url}/#/")
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("This token is not the right one.")).to_be_visible()
    page.get_by_label("Token").fill("s3cret")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".link")).to_contain_text("broker connected")
    served.join("a")
    expect(page.get_by_role("link", name="a", exact=True)).to_be_visible()
    page.reload()
    expect(page.locator(".link")).to_contain_text("broker connected")
    assert page.evaluate("[Object.keys(localStorage), document.cookie]") == [[], ""]
    headers = {"authorization": "Bearer s3cret", "content-type": "application/toml"}
    httpx.post(f"{served.url}/v1/jobs", content=JOB, headers=headers, trust_env=False).raise_for_status()
    served.join("b")
    served.survey("a", "b")
    served.run_round("a", "b")
    page.goto(f"{served.url}/#/jobs/j")
    with page.expect_download() as download:
        page.get_by_label("Download version 1").click()
    with tarfile.open(download.value.path()) as tar:
        assert "adapter_model.safetensors" in tar.getnames()
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()


# ------------------------------------------------------------------------------------------------------------ everyone


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_anyones_way(scheme: Any, busy: Served, open_page: Opener) -> None:
    axe = Axe()
    page = open_page(busy.url, color_scheme=scheme)
    for place in PLACES.values():
        page.goto(f"{busy.url}/{place}")
        page.locator("main h2").first.wait_for()
        expect(page.locator("main")).not_to_contain_text("Reading")
        found = axe.run(page).response["violations"]
        assert found == [], f"{place}: {[(v['id'], [n['html'][:200] for n in v['nodes']][:3]) for v in found]}"
    page.goto(f"{busy.url}/{PLACES['job']}")
    page.locator(".head").get_by_role("button", name="Cancel the job").click()
    found = axe.run(page).response["violations"]
    assert found == [], f"dialog: {[(v['id'], [n['html'][:200] for n in v['nodes']][:3]) for v in found]}"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 29)"
    assert dark == (scheme == "dark")


def test_pictures_for_the_documents(busy: Served, open_page: Opener) -> None:
    """Written to docs/images when FEDPIPE_PICTURES names that folder; else only taken."""
    folder = os.environ.get("FEDPIPE_PICTURES")
    for i, agent in enumerate(busy.coordinator.fleet.state.agents):
        busy.coordinator.presence.heard(agent, busy.coordinator.clock() - i)
    for name, scheme in (("fleet", "light"), ("job", "dark")):
        page = open_page(f"{busy.url}/{PLACES[name]}", color_scheme=scheme, viewport={"width": 1200, "height": 640})
        page.locator("main h2").first.wait_for()
        if name == "job":
            page.get_by_label("Round", exact=True).select_option(label="round 4: aggregated")
        picture = page.screenshot(
            clip={"x": 0, "y": 0, "width": 1200, "height": 640 if name == "fleet" else 1180}, full_page=True
        )
        assert len(picture) < 250_000
        if folder:
            (Path(folder) / f"page-{name}.png").write_bytes(picture)


def test_it_fits_on_a_phone(busy: Served, open_page: Opener) -> None:
    long = "x" * 64
    busy.join(long)
    busy.post(ev.AgentLeft(agent=long, session="x" * 16, reason="y" * 400))
    page = open_page(busy.url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    for place in [*PLACES.values(), f"#/agents/{long}"]:
        page.goto(f"{busy.url}/{place}")
        page.locator("main h1").first.wait_for(state="attached")
        expect(page.locator("main")).not_to_contain_text("Reading")
        assert page.evaluate("document.documentElement.scrollWidth") == 360, place
