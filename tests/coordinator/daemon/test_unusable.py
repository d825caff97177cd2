"""What peers send that cannot be used: hostile and late updates, messages that nobody can read, words of another session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.core.state import Phase
from protocol import codec
from protocol.adapters import Factors
from protocol.messages import Blob, ExecState, Execution, Offer, Plan, Rebirth
from protocol.updates import write_update
from tests.coordinator.daemon.peer import CHUNK, MATRICES, PATIENCE_S, blob_of, topics
from tests.coordinator.daemon.stage import PHASES, Stage, job_spec


def rewrite(path: Path, offer: Offer, change: Callable[[bytes], bytes]) -> Offer:
    path.write_bytes(change(path.read_bytes()))
    return msgspec.structs.replace(offer, blob=blob_of(path))


def other_file(plan: Plan, path: Path, offer: Offer, **changes: Any) -> Offer:
    """The update written otherwise than it is offered."""
    ranks, d_in = changes.pop("rank", 4), changes.pop("d_in", 32)
    factors = {
        m.name: Factors(np.ones((ranks, d_in), np.float32), np.ones((m.d_out, ranks), np.float32)) for m in MATRICES
    }
    said = {"job": plan.job, "round": plan.round, "attempt": plan.attempt} | changes
    write_update(path, factors, **said, dtype="fp32")
    return msgspec.structs.replace(offer, blob=blob_of(path))


NAN = np.float32(np.nan).tobytes()
FORGERIES: dict[str, tuple[Callable[[Plan, Path, Offer], Offer], str]] = {
    "wrong shape": (lambda plan, path, offer: other_file(plan, path, offer, d_in=31), "has shape"),
    "rank too high": (lambda plan, path, offer: other_file(plan, path, offer, rank=5), "has rank 5"),
    "not a number": (lambda _, path, offer: rewrite(path, offer, lambda data: data[:-4] + NAN), "not finite"),
    "truncated": (lambda _, path, offer: rewrite(path, offer, lambda data: data[:-9]), "truncated"),
    "no update at all": (lambda _, path, offer: rewrite(path, offer, lambda _: b"\xde\xad" * 2000), "header"),
    "too large": (lambda _, path, offer: rewrite(path, offer, lambda data: data + bytes(10**6)), "the plan allows"),
    "of another round": (lambda plan, path, offer: other_file(plan, path, offer, round=9), "offered as j round 1.0"),
    "of another job": (lambda plan, path, offer: other_file(plan, path, offer, job="k"), "offered as j round"),
    "other bytes than promised": (
        lambda _plan, _path, offer: msgspec.structs.replace(
            offer, blob=msgspec.structs.replace(offer.blob, sha256="a" * 64)
        ),
        "digest",
    ),
    "of another kind": (lambda _p, _f, offer: msgspec.structs.replace(offer, kind="dense"), "'dense'"),
    "trained on nothing": (lambda _p, _f, offer: msgspec.structs.replace(offer, samples=0), "no sample"),
    "trained on too much": (lambda _p, _f, offer: msgspec.structs.replace(offer, samples=17), "17 samples claimed"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_hostile_update_is_declined_and_the_round_goes_on(
    stage: Stage, wanted: list[str], forgery: str
) -> None:
    forge, told = FORGERIES[forgery]
    await stage.start()
    await stage.peer("a", "bb", "mallory")
    mallory = stage.peers["mallory"]
    mallory.forge = lambda plan, path, offer: forge(plan, path, offer) if plan.round == 1 else offer
    await stage.submit(job_spec(3, n_rounds=1, min_agents=2, start_agents=3))
    assert (await stage.ended()).phase is Phase.COMPLETED
    (first, _) = stage.coordinator.store.rounds("j")
    assert {a: s.state for a, s in first.shares.items()} == {"a": "DONE", "bb": "DONE", "mallory": "FAILED"}
    assert first.shares["mallory"].reason.startswith("bad update: ")
    assert told in first.shares["mallory"].reason
    assert [r.reason for r in mallory.refused] == [first.shares["mallory"].reason]
    assert mallory.accepted == []
    assert stage.masters() == wanted[:1], "as if mallory had not been there"
    async with asyncio.timeout(10):  # the adapter and its model; nothing of mallory's
        while len(list(stage.coordinator.blobs)) != 2:  # noqa: ASYNC110 - files have no event
            await asyncio.sleep(0.01)
    assert list(stage.coordinator.blobs.partial.iterdir()) == []


async def test_an_offer_in_the_name_of_a_file_that_others_need_does_not_delete_it(
    stage: Stage, wanted: list[str]
) -> None:
    await stage.start()
    await stage.peer("a", "bb", "mallory")

    def steal(plan: Plan, _path: Path, offer: Offer) -> Offer:
        job = stage.coordinator.fleet.state.jobs["j"]
        known = [s.offer.blob.sha256 for s in job.round.shares.values() if s.offer] if job.round else []
        digest = job.master if plan.round == 2 else next(iter(known), "a" * 64)
        return msgspec.structs.replace(offer, blob=Blob(sha256=digest, size=1, chunk=CHUNK))

    stage.peers["mallory"].forge = steal
    await stage.submit(job_spec(3, min_agents=2, start_agents=3))
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert [r.shares["mallory"].state for r in stage.coordinator.store.rounds("j", 0, 2)] == ["FAILED"] * 2
    assert stage.masters() == wanted, "as if mallory had not been there"


async def test_ever_new_offers_for_one_share_do_not_pile_up(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    bb = stage.peers["bb"]
    bb.deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    plan = bb.plans[-1]
    await bb.__aexit__()  # it has none of these, and would say so
    said = {"job": plan.job, "round": plan.round, "attempt": plan.attempt, "kind": "lora", "samples": 1}
    for number in range(100):
        blob = Blob(sha256=f"{number:064x}", size=9_000, chunk=CHUNK)
        stage.broker.route(topics.up("bb", "offer"), bb.outgoing.encode(Offer(**said, blob=blob)))  # type: ignore[arg-type]
    await stage.until(lambda one: one.traffic.is_fetching("bb", blob))
    assert len(stage.coordinator.exchange.pulling.receiving) == 1
    assert len(list(stage.coordinator.blobs.partial.iterdir())) <= 2, "its data and its log"


async def test_an_update_for_a_round_that_is_not_open_is_declined_and_the_share_stays(
    stage: Stage, wanted: list[str]
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    bb = stage.peers["bb"]
    bb.deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    plan = bb.plans[-1]
    for number in (0, 2, 7):
        blob = Blob(sha256=f"{number}" * 64, size=99)
        bb.say("offer", Offer(job="j", round=number, attempt=0, kind="lora", blob=blob, samples=3))
    await stage.until(lambda one: one.fleet.state.counts.get("superseded_update") == 3)
    assert stage.job().round is not None
    assert stage.job().round.shares["bb"].state is ExecState.OFFERED
    bb._work(plan)
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert len(bb.refused) == 3


async def test_bad_messages_are_counted_and_logged_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    await stage.start()
    await stage.peer("a", "bb")
    bad = {
        topics.up("a", "exec"): [b"\xc1", b"", b"\x93", b"x" * 100],
        topics.up("a", "offer"): [stage.peers["a"].outgoing.encode(Rebirth())],
        topics.up("a", "progress"): [b"\x81\xa1v\x02"],
        f"{topics.root}/a/a/up/nonsense": [b"1"],
        f"{topics.root}/a/a/up/d/{'f' * 32}": [b"no frame"],
        topics.up("bb", "state"): [b"\x80"],
    }
    await stage.until(lambda one: len(one.fleet.state.agents) == 2)
    for topic, payloads in bad.items():
        for payload in payloads:
            stage.broker.route(topic, payload)
    await stage.submit(job_spec())
    assert (await stage.ended()).phase is Phase.COMPLETED
    counts = {"bad_message": 4, "wrong_type": 1, "wrong_version": 1, "bad_topic": 1}
    assert stage.coordinator.intake.gate.counts == counts, (
        "an empty payload clears a topic, and nobody waits for that chunk"
    )
    told = [(vars(r)["topic"], vars(r)["kind"]) for r in caplog.records if vars(r).get("action") == "bad_message"]
    assert told == [
        (topics.up("a", "exec"), "bad_message"),
        (topics.up("a", "offer"), "wrong_type"),
        (topics.up("a", "progress"), "wrong_version"),
        (f"{topics.root}/a/a/up/nonsense", "bad_topic"),
        (topics.up("bb", "state"), "bad_message"),
    ], "once per kind and agent"


async def test_a_word_of_another_session_changes_nothing_and_birth_is_asked_for(
    stage: Stage, wanted: list[str]
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    bb = stage.peers["bb"]
    forged = Execution(job="j", round=1, attempt=0, serial=99, state=ExecState.FAILED, reason="forged")
    stage.broker.route(topics.up("bb", "exec"), codec.encode(forged, session="f" * 16, seq=1, now=1.0))
    async with asyncio.timeout(PATIENCE_S):
        assert await bb.commands.get() == Rebirth()
    assert stage.coordinator.intake.gate.counts == {"stale_session": 1}
    bb._work(bb.plans[-1])
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
