"""What ended rounds amount to, however often and wherever the fold is taken up again."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.spec import JobSpec
from coordinator.core.state import JobState, Phase, Purpose, Rollback, RoundRecord, ShareRecord
from coordinator.past import Past, evaluations, extended
from coordinator.versions import lineage
from coordinator.views import JobView, MemberView, with_history
from protocol.messages import Evaluated

AGENTS = ("a", "b", "c")


def measured(version: int, loss: float) -> Evaluated:
    return Evaluated(version=version, n_samples=3, n_tokens=99, loss=loss)


def record(
    number: int, version: int, *, attempt: int = 0, outcome: str = "aggregated", **shares: ShareRecord
) -> RoundRecord:
    return RoundRecord(
        round=number,
        attempt=attempt,
        purpose="train",
        version=version,
        outcome=outcome,
        opened_at=10.0 * number + attempt,
        wall_s=1.0,
        loss=None,
        shares=shares,
    )


@st.composite
def histories(draw: st.DrawFn) -> list[RoundRecord]:
    """Rounds of some attempts; what an attempt leaves finished is in the records of the next one too."""
    found: list[RoundRecord] = []
    for number in range(1, draw(st.integers(1, 5)) + 1):
        left: Mapping[str, ShareRecord] = {}
        n_attempts = draw(st.integers(1, 3))
        for attempt in range(n_attempts):
            shares = {
                agent: left.get(agent)
                or ShareRecord(
                    state=draw(st.sampled_from(["DONE", "FAILED"])),
                    samples=draw(st.integers(0, 9)),
                    train_s=draw(st.integers(0, 9)),
                    assigned_at=10.0 * number + attempt,
                    evaluated=measured(number - 1, draw(st.integers(1, 9))) if draw(st.booleans()) else None,
                )
                for agent in draw(st.sets(st.sampled_from(AGENTS), min_size=1)) | left.keys()
            }
            outcome = "aggregated" if attempt == n_attempts - 1 else "quorum: too few"
            found.append(record(number, number - 1, attempt=attempt, outcome=outcome, **shares))
            left = {agent: share for agent, share in shares.items() if share.state == "DONE"}
    return found


@given(histories(), st.data())
def test_in_pieces_as_at_once(records: list[RoundRecord], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(records)))
    before = extended(Past(), records[:at])
    kept = repr(before)
    whole = extended(Past(), records)
    assert extended(before, records[at:]) == whole
    assert repr(before) == kept, "who still holds the earlier one sees no change"


@given(histories())
def test_it_says_what_the_records_say(records: list[RoundRecord]) -> None:
    past = extended(Past(), records)
    assert past.n_rounds == len(records)
    assert past.losses == {v: {a: e.loss for a, e in by.items()} for v, by in evaluations(records).items()}
    shares = {(r.round, agent, s.assigned_at): s for r in records for agent, s in r.shares.items()}
    for agent in AGENTS:
        mine = [share for (_, who, _), share in shares.items() if who == agent]
        spent = past.spent.get(agent)
        assert (spent.n_shares if spent else 0) == len(mine)
        assert (spent.samples if spent else 0) == sum(share.samples for share in mine)
        assert (spent.n_failed if spent else 0) == sum(share.state == "FAILED" for share in mine)
    for version, fold in past.folds.items():
        (of,) = (r for r in records if r.outcome == "aggregated" and r.version + 1 == version)
        done = {agent: share for agent, share in of.shares.items() if share.state == "DONE"}
        assert (fold.round, fold.start, set(fold.agents)) == (of.round, of.version, done.keys())
        assert fold.samples == sum(share.samples for share in done.values())


def test_of_two_measurements_of_one_version_the_later_counts() -> None:
    first = ShareRecord(state="FAILED", evaluated=measured(0, 4.0), assigned_at=1.0)
    again = ShareRecord(state="DONE", evaluated=measured(0, 3.0), assigned_at=2.0)
    other = ShareRecord(state="DONE", evaluated=measured(0, 2.0), assigned_at=1.0)
    past = extended(
        Past(), [record(1, 0, outcome="quorum", a=first, b=other), record(1, 0, attempt=1, a=again, b=other)]
    )
    assert past.loss(0) == 2.5
    assert past.loss(1) is None


def test_lineage_leaves_out_what_a_rollback_left_behind() -> None:
    def share(version: int, loss: float, samples: int = 8) -> ShareRecord:
        return ShareRecord(state="DONE", samples=samples, evaluated=measured(version, loss))

    lost = ShareRecord(state="TIMED_OUT", samples=99)
    spec = msgspec.convert({"job": {"name": "j"}, "model": {"source": "toy"}}, JobSpec)
    job = JobState(spec=spec, submitted_at=0.0)
    # 0 -> 1 -> 2 -> 3; version 4 is version 1 once more; 4 -> 5
    job.rollbacks.append(Rollback(version=4, of=1, by="operator", at=1.0))
    records = [
        record(1, 0, a=share(0, 4.0), b=lost),
        record(2, 1, a=share(1, 3.0), b=share(1, 2.0)),
        record(3, 2, a=share(2, 9.0)),
        record(4, 4, a=share(4, 2.5), b=share(4, 1.5)),
        record(5, 5, outcome="quorum", a=share(5, 1.0)),
    ]
    past = extended(Past(), records)
    made, left = lineage(job, past, 5)
    assert [(e.round, e.agents, e.samples) for e in made] == [(1, ["a"], 8), (4, ["a", "b"], 16)]
    assert [e.loss for e in made] == [pytest.approx(2.5), pytest.approx(1.0)]
    assert left == job.rollbacks
    assert [e.round for e in lineage(job, past, 3)[0]] == [1, 2, 3]
    assert lineage(job, Past(), 0) == ([], [])


def test_a_history_is_put_where_it_belongs_whatever_things_are_called() -> None:
    view = JobView(
        now=1.0,
        name="j",
        phase=Phase.COMPLETED,
        reason='"history":[',
        text="history",
        method="qlora",
        base="toy",
        base_sha256="",
        data="default",
        round=2,
        n_rounds=2,
        attempt=0,
        version=2,
        since=0.0,
        submitted_at=0.0,
        members={"history": MemberView()},
    )
    records = [record(number, number - 1, history=ShareRecord(state="DONE")) for number in (1, 2)]
    for told in ([], records[:1], records):
        whole = msgspec.json.decode(b"".join(with_history(view, told)), type=JobView)
        assert whole == msgspec.structs.replace(view, history=told)


def test_under_training_counts_the_last_attempt_of_each_round_of_training() -> None:
    def a_round(number: int, attempt: int, processed: int, purpose: Purpose = "train") -> RoundRecord:
        shares = {
            "a": ShareRecord(state="DONE", samples=processed, planned_samples=100),
            "b": ShareRecord(state="DONE", samples=5),
        }
        said = {"version": 0, "outcome": "", "opened_at": 0.0, "wall_s": 1.0, "loss": None}
        return RoundRecord(round=number, attempt=attempt, purpose=purpose, shares=shares, **said)  # type: ignore[arg-type]

    records = [a_round(1, 0, 10), a_round(1, 1, 80), a_round(2, 0, 100), a_round(3, 0, 0, "evaluate")]
    assert extended(Past(), records).samples == {1: (80, 100), 2: (100, 100)}
    assert extended(extended(Past(), records[:1]), records[1:]) == extended(Past(), records)
