from __future__ import annotations

from agent.answers import PATIENCE_S, Answers
from protocol.topics import Topics


def answers() -> Answers:
    return Answers(Topics("lab"), "anna")


def test_a_birth_that_is_answered_is_no_complaint() -> None:
    said = answers()
    assert said.complaint(1e9) == ""
    said.born(0.0)
    said.heard()
    assert "`topic read fed/v1/lab/c/#`" in said.complaint(1e9), "answered by somebody who is not to be seen"
    said.coordinator(online=True)
    assert said.complaint(1e9) == ""
    said.born(0.0)
    said.heard()
    assert said.complaint(1e9) == ""


def test_a_birth_without_an_answer_names_the_topics() -> None:
    said = answers()
    said.born(0.0)
    assert said.complaint(PATIENCE_S - 1) == ""
    assert "`topic read fed/v1/lab/c/#`" in said.complaint(PATIENCE_S)
    said.coordinator(online=True)
    said.born(20.0)  # said again: the first one still waits
    text = said.complaint(PATIENCE_S)
    assert "`topic read fed/v1/lab/a/anna/down/#`" in text
    assert "`topic write fed/v1/lab/a/anna/up/#`" in text


def test_who_is_known_to_be_away_cannot_answer() -> None:
    said = answers()
    said.born(0.0)
    said.coordinator(online=False)
    said.born(1.0)
    assert said.complaint(1e9) == ""
    said.coordinator(online=True)
    said.born(2.0)
    assert said.complaint(1e9)
    said.gone()
    assert said.complaint(1e9) == ""
