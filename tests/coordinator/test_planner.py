"""The planner on devices that are only described: what fits, what is preferred, what is refused, and with which words."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec
from coordinator.core.state import Member
from coordinator.planner import automatic
from coordinator.planner.automatic import Planned
from coordinator.planner.cost import fit
from coordinator.planner.devices import Device, Devices, ModelShape, described, plan_devices
from coordinator.planner.servers import Ask, Mode, server, setting
from protocol.errors import BadConfig
from protocol.messages import Allowance, Report

GIB = 2**30
SHAPE = ModelShape(
    hidden_size=1024, num_hidden_layers=8, intermediate_size=2816, num_attention_heads=8, vocab_size=8000
)
SMALL = Device(name="small", memory_gib=3.0, tflops=1.0, examples=2000)


def ask(*devices: Device, **tables: Any) -> Ask:
    spec = msgspec.convert({"job": {"name": "j"}, "model": {"source": "toy"}, **tables}, JobSpec)
    return described(Devices(model=SHAPE, device=list(devices or (SMALL,))), spec)


def planned(*devices: Device, **tables: Any) -> Planned:
    question = ask(*devices, **tables)
    return automatic.plan(question, list(question.members))


def choice(device: Device = SMALL, **tables: Any) -> Choice:
    return planned(device, **tables).choices[device.name]


def but(device: Device = SMALL, **fields: Any) -> Device:
    return msgspec.structs.replace(device, **fields)


def with_member(question: Ask, agent: str, **fields: Any) -> Ask:
    member = Member(surveyed=question.members[agent].surveyed, calibrated=question.members[agent].calibrated)
    for name, value in fields.items():
        setattr(member, name, value)
    return question._replace(members={**question.members, agent: member})


# ------------------------------------------------------------------------------------------------------- what it holds


@settings(max_examples=12)
@given(
    memory=st.floats(0.9, 24.0),
    tflops=st.floats(0.05, 50.0),
    up=st.floats(0.2, 1000.0),
    examples=st.integers(1, 50_000),
    bits=st.sampled_from([["nf4"], ["none"], ["nf4", "int8", "none"]]),
)
def test_whatever_the_device_a_choice_fits_and_the_cost_model_agrees(
    memory: float, tflops: float, up: float, examples: int, bits: list[Any]
) -> None:
    device = Device(
        name="d", memory_gib=memory, tflops=tflops, up_mbit_per_s=up, examples=examples, bits=bits, mean_tokens=100.0
    )
    question = ask(device)
    found = automatic.plan(question, ["d"])
    assert found.choices.keys() ^ found.left_out.keys() == {"d"}
    if not found.choices:
        assert "not enough" in found.left_out["d"]
        return
    chosen, rules = found.choices["d"], question.spec.plan
    assert chosen.predicted
    assert found.train_s
    one = server(question, "d")
    depth = min(int(name.split(".")[2]) for name in chosen.ranks)
    skips = [s for s in (0, 2, 4, 6) if s <= depth]
    predictions = [
        one.cost.predict(
            setting(
                question,
                one,
                Mode(chosen.bits, chosen.batch, chosen.accumulation, chosen.checkpointing, s),
                chosen.ranks,
            )
        )
        for s in skips
    ]
    assert any(
        p == pytest.approx((chosen.predicted.step_s, chosen.predicted.peak_bytes), rel=1e-6) for p in predictions
    )
    assert chosen.predicted.peak_bytes <= memory * GIB * rules.memory_ratio * (1 + 1e-6)
    busy_s = chosen.predicted.down_s + chosen.predicted.train_s + chosen.predicted.up_s
    assert busy_s <= (found.train_s - question.overhead_s) * rules.time_ratio * (1 + 1e-6)
    assert chosen.n_samples <= examples * rules.max_epochs + chosen.batch * chosen.accumulation
    assert set(chosen.ranks.values()) <= set(rules.ranks)
    assert chosen.bits in bits
    assert 0 < chosen.importance <= 1 + 1e-9


def test_the_same_question_has_the_same_answer() -> None:
    devices = [SMALL, but(name="large", memory_gib=20.0, tflops=20.0)]
    assert planned(*devices) == planned(*devices)


def test_equal_servers_get_equal_choices() -> None:
    found = planned(but(count=4)).choices
    assert len(found) == 4
    assert len({msgspec.json.encode(chosen) for chosen in found.values()}) == 1


@pytest.mark.parametrize("what", ["memory_gib", "tflops", "up_mbit_per_s"])
def test_more_of_anything_never_brings_less_progress(what: str) -> None:
    rules = {"round": {"train_s": 60.0}, "plan": {"thrift": 0.0}}
    found = [
        chosen.predicted.progress
        for factor in (0.25, 0.6, 1.7, 4.0)
        if (chosen := planned(but(**{what: getattr(SMALL, what) * factor}), **rules).choices.get("small"))
        and chosen.predicted
    ]
    assert len(found) >= 2
    # Modes within 5 % of each other are alike, so a little may be given up for more bits.
    assert all(later >= 0.95 * earlier for earlier, later in itertools.pairwise(found)), found
    assert found[-1] > found[0]


# ------------------------------------------------------------------------------------------------------ what it prefers


def test_a_server_that_fits_only_four_bits_gets_four() -> None:
    roomy, tight = choice(but(memory_gib=20.0)), choice(but(memory_gib=0.7, mean_tokens=64.0))
    assert (roomy.bits, tight.bits) == ("none", "nf4")


def test_a_slow_server_is_given_fewer_steps_of_the_same_round() -> None:
    found = planned(but(name="fast", tflops=8.0), but(name="slow", tflops=1.0)).choices
    fast, slow = found["fast"], found["slow"]
    assert fast.n_samples > 3 * slow.n_samples
    assert fast.predicted
    assert slow.predicted
    assert slow.predicted.train_s < 1.5 * fast.predicted.train_s or fast.limit == "data"


def test_a_slow_link_is_sent_fewer_bytes() -> None:
    rules: dict[str, Any] = {"round": {"train_s": 60.0}}
    wide, narrow = choice(but(up_mbit_per_s=1000.0), **rules), choice(but(up_mbit_per_s=0.5), **rules)
    assert wide.predicted
    assert narrow.predicted
    assert narrow.predicted.up_bytes < 0.5 * wide.predicted.up_bytes


def test_the_link_decides_between_exact_and_small() -> None:
    rules: dict[str, Any] = {"round": {"train_s": 60.0}}
    sent = [choice(but(up_mbit_per_s=mbit), **rules).update_dtype for mbit in (100_000.0, 1000.0, 0.5)]
    assert sent == ["bf16", "int8", "nf4"]


def test_a_pinned_type_holds_but_for_those_who_cannot_send_it() -> None:
    question = ask(but(name="old"), but(name="new"), adapter={"update_dtype": "nf4", "rank": 4})
    old = msgspec.structs.replace(question.reports["old"], update_dtypes=[])
    found = automatic.plan(question._replace(reports={**question.reports, "old": old}), ["old", "new"])
    assert {agent: chosen.update_dtype for agent, chosen in found.choices.items()} == {"old": "bf16", "new": "nf4"}


def test_an_unmeasured_link_gets_int8() -> None:
    question = ask(but(name="d"))
    report = msgspec.structs.replace(question.reports["d"], up_bytes_per_s=0.0)
    found = automatic.plan(question._replace(reports={"d": report}), ["d"])
    assert found.choices["d"].update_dtype == "int8"


def test_bytes_that_buy_nothing_are_not_sent() -> None:
    rules: dict[str, Any] = {"round": {"train_s": 60.0}}
    lavish, thrifty = choice(**rules, plan={"thrift": 0.0}), choice(**rules, plan={"thrift": 0.05})
    assert lavish.predicted
    assert thrifty.predicted
    assert thrifty.predicted.up_bytes < 0.7 * lavish.predicted.up_bytes
    assert thrifty.predicted.progress > 0.88 * lavish.predicted.progress


def test_the_width_that_is_loaded_stays_when_another_is_no_better() -> None:
    question = ask(but(memory_gib=20.0), round={"train_s": 60.0})
    measured = question.members["small"].calibrated
    assert measured
    nf4_as_fast = [
        msgspec.structs.replace(p, step_s=p.step_s / 1.15) if p.bits == "nf4" else p for p in measured.points
    ]
    calibrated = msgspec.structs.replace(measured, points=nf4_as_fast)
    question = with_member(question, "small", calibrated=calibrated)
    assert automatic.plan(question, ["small"]).choices["small"].bits == "none"
    loaded = question._replace(bits_now={"small": "nf4"})
    assert automatic.plan(loaded, ["small"]).choices["small"].bits == "nf4"


def test_a_width_that_hurts_the_loss_is_avoided() -> None:
    question = ask(but(memory_gib=20.0, bits=["nf4", "int8"]), round={"train_s": 60.0})
    for losses, best in (({"nf4": 4.0, "int8": 4.4}, "nf4"), ({"nf4": 4.4, "int8": 4.0}, "int8")):
        calibrated = msgspec.structs.replace(question.members["small"].calibrated, losses=losses)  # type: ignore[type-var]
        measured = with_member(question, "small", calibrated=calibrated)
        assert automatic.plan(measured, ["small"]).choices["small"].bits == best


def test_what_was_learned_changes_the_plan() -> None:
    question = ask(but(memory_gib=2.0), round={"train_s": 60.0})
    before = automatic.plan(question, ["small"]).choices["small"]
    slower = automatic.plan(with_member(question, "small", time_factor=4.0), ["small"]).choices["small"]
    assert slower.n_samples < before.n_samples
    assert before.predicted
    oom = with_member(question, "small", oom_bytes=before.predicted.peak_bytes)
    after = automatic.plan(oom, ["small"]).choices["small"]
    assert after.predicted
    assert after.predicted.peak_bytes < 0.9 * before.predicted.peak_bytes
    lower = with_member(question, "small", oom_bytes=400 * 2**20)
    assert "not enough memory" in automatic.plan(lower, ["small"]).left_out["small"]


# ---------------------------------------------------------------------------------------------------- pins and refusals


def test_pins_hold_exactly() -> None:
    pins: dict[str, Any] = {
        "adapter": {"targets": ["q_proj", "down_proj"], "rank": 6, "bits": "int8"},
        "train": {"batch": 3, "accumulation": 2, "checkpointing": True},
    }
    found = choice(**pins)
    assert {name.rsplit(".", 1)[1] for name in found.ranks} == {"q_proj", "down_proj"}
    assert (len(found.ranks), set(found.ranks.values())) == (16, {6})
    assert (found.bits, found.batch, found.accumulation, found.checkpointing) == ("int8", 3, 2, True)
    assert choice(**pins, agents={"small": {"rank": 2, "n_steps": 7}}).n_steps == 7


def test_the_agents_own_bounds_hold() -> None:
    question = ask()
    report = question.reports["small"]
    bound = Allowance(memory_bytes=8 * GIB, max_rank=4, max_batch=2)
    bounded = question._replace(reports={"small": msgspec.structs.replace(report, allowance=bound, bits=["int8"])})
    found = automatic.plan(bounded, ["small"]).choices["small"]
    assert max(found.ranks.values()) <= 4
    assert (found.batch <= 2, found.bits) == (True, "int8")


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (
            {"adapter": {"bits": "none"}, "train": {"batch": 32}},
            r"not enough memory: none with batch 32 .* GiB are missing",
        ),
        ({"round": {"train_s": 20.0}, "train": {"n_steps": 100_000}}, r"not enough time: 100000 steps of"),
        ({"adapter": {"targets": ["nonsense"]}}, r"target 'nonsense' names no matrix of the base; it has"),
    ],
)
def test_a_pin_that_cannot_be_kept_is_refused_with_the_numbers(tables: dict[str, Any], words: str) -> None:
    found = planned(but(memory_gib=1.2), **tables)
    assert not found.choices
    assert re.search(words, found.left_out["small"]), found.left_out


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"adapter": {"rank": 16}}, "rank 16 is pinned, the agent allows 8: lower the pin or raise limits.max_rank"),
        ({"train": {"batch": 4}}, "batch 4 is pinned, the agent allows 2: lower the pin or raise limits.max_batch"),
        ({"adapter": {"bits": "none"}}, "none is pinned, the agent allows nf4: change the pin or limits.bits"),
    ],
)
@pytest.mark.parametrize("is_decided", [False, True], ids=["planned", "pinned"])
def test_nothing_beyond_the_agents_bounds_is_planned(tables: dict[str, Any], words: str, is_decided: bool) -> None:
    if is_decided:
        everything: dict[str, dict[str, Any]] = {
            "adapter": {"targets": ["all"], "rank": 8, "bits": "nf4"},
            "train": {"n_steps": 5, "batch": 2, "accumulation": 1, "checkpointing": False},
            "round": {"train_s": 60.0},
        }
        tables = {name: table | tables.get(name, {}) for name, table in everything.items()}
    question = bounded(ask(**tables), max_rank=8, max_batch=2)
    assert question.spec.is_pinned("small") == is_decided
    found = automatic.plan(question, ["small"])
    assert not found.choices
    assert words in found.left_out["small"]


def test_ranks_that_all_lie_above_the_agents_bound_are_refused() -> None:
    found = automatic.plan(bounded(ask(plan={"ranks": [16, 32]}), max_rank=8), ["small"])
    assert "plan.ranks begin at 16, the agent allows 8: add a lower rank" in found.left_out["small"]


def test_an_agent_that_allows_less_than_every_batch_of_the_plan_gets_what_it_allows() -> None:
    found = automatic.plan(bounded(ask(plan={"batches": [4, 8]}), max_batch=3), ["small"]).choices["small"]
    assert found.batch == 3


def bounded(question: Ask, **limits: Any) -> Ask:
    allowance = Allowance(memory_bytes=8 * GIB, **limits)
    report = msgspec.structs.replace(question.reports["small"], allowance=allowance, bits=["nf4"])
    return question._replace(reports={"small": report})


def test_one_that_cannot_take_part_does_not_keep_the_others() -> None:
    found = planned(SMALL, but(name="tiny", memory_gib=0.3))
    assert found.choices.keys() == {"small"}
    assert "GiB are missing" in found.left_out["tiny"]


def broken(question: Ask, agent: str, **fields: Any) -> Ask:
    calibrated = msgspec.structs.replace(question.members[agent].calibrated, **fields)  # type: ignore[type-var]
    return with_member(question, agent, calibrated=calibrated)


def test_unusable_measurements_mean_defaults_and_a_note() -> None:
    question = broken(ask(but(count=2)), "small-1", scores=b"\0" * 8)
    found = automatic.plan(question, ["small-1", "small-2"])
    assert found.choices["small-1"].predicted is None
    assert found.choices["small-2"].predicted
    assert "small-1 takes part with defaults: scores have 8 bytes" in found.notes[0]


@settings(max_examples=20)
@given(data=st.data())
def test_no_measurements_an_agent_can_send_stop_the_plan_of_the_others(data: st.DataObject) -> None:
    question = ask(but(count=2))
    member = question.members["small-1"]
    assert member.calibrated
    assert member.surveyed
    price, size = st.sampled_from([1e-300, 1e-3, 1e6]), st.sampled_from([0, 1, 2**31, 2**50])
    points = [
        msgspec.structs.replace(point, step_s=data.draw(price), peak_bytes=data.draw(size))
        for point in member.calibrated.points[: data.draw(st.integers(0, 3))]
    ]
    shapes = [
        msgspec.structs.replace(shape, mean_tokens=float(data.draw(size)), max_tokens=data.draw(size))
        for shape in member.calibrated.shapes[: data.draw(st.integers(0, 2))]
    ]
    found = automatic.plan(broken(question, "small-1", points=points, shapes=shapes), ["small-1", "small-2"])
    assert found.choices["small-2"].predicted
    assert "small-1" in {**found.choices, **found.left_out}


def test_a_survey_that_lacks_matrices_of_the_base_means_defaults() -> None:
    question = ask(but(count=2))
    surveyed = question.members["small-1"].surveyed
    assert surveyed
    fewer = msgspec.structs.replace(surveyed, matrices=surveyed.matrices[1:])
    found = automatic.plan(with_member(question, "small-1", surveyed=fewer), ["small-1", "small-2"])
    assert "the survey lacks 1 matrices of the base" in found.notes[0]
    assert found.choices["small-2"].predicted


def test_no_measurements_at_all_still_make_a_plan() -> None:
    question = with_member(ask(), "small", calibrated=None, uncalibrated="no bitsandbytes here")
    found = automatic.plan(question, ["small"])
    assert found.choices["small"].why == "by default: no bitsandbytes here"


def test_a_report_without_allowance_uses_what_is_free() -> None:
    question = ask()
    bare = question._replace(reports={"small": Report(ram_available_bytes=3 * GIB, bits=["nf4"])})
    found = automatic.plan(bare, ["small"]).choices["small"]
    assert found.predicted
    assert found.predicted.limit_bytes == int(2.7 * GIB)


# --------------------------------------------------------------------------------------------------------------- words


def test_what_if_says_what_more_would_bring() -> None:
    tight = choice(but(memory_gib=0.7, tflops=20.0, examples=50_000), round={"train_s": 60.0})
    assert list(tight.what_if) == ["1 GiB more memory", "1.5 times the round"]
    assert all(factor >= 1 - 1e-9 for factor in tight.what_if.values())
    assert tight.what_if["1 GiB more memory"] > 1.01
    assert "GiB" in tight.why


def test_the_limit_is_named() -> None:
    assert choice(but(examples=16, tflops=50.0)).limit == "data"
    assert choice(but(tflops=0.2), round={"train_s": 30.0}).limit == "time"
    assert choice(adapter={"rank": 4}, train={"n_steps": 5}).limit == "pins"


# ---------------------------------------------------------------------------------------------------------- a large fleet


def test_a_hundred_servers_of_ten_kinds_are_planned_together() -> None:
    devices = [but(name=f"d{i}", count=10, memory_gib=2.0 + i / 2, tflops=0.5 + i / 4) for i in range(10)]
    found = planned(*devices, plan={"batches": [4, 16]})
    assert len(found.choices) == 100


# ------------------------------------------------------------------------------------------------------------- the file


def test_the_example_file_is_planned() -> None:
    job = plan_devices(Path(__file__).parents[2] / "docs" / "examples" / "devices.toml")
    assert job.plan
    assert {name.split("-")[0] for name in job.plan.choices} == {"hospital", "factory", "branch"}
    assert job.plan.choices["branch-1"].bits == "nf4"
    surveyed, calibrated = job.members["branch-1"].surveyed, job.members["branch-1"].calibrated
    assert surveyed
    assert calibrated
    model = fit(surveyed, calibrated)
    point = calibrated.points[0]
    assert point.bits in model.bits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[device]]\n", "memory_gib|name|model"),
        ("[model]\nhidden_size = 10\n", "model"),
        ("not toml", "TOML"),
    ],
)
def test_a_bad_file_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(BadConfig, match=words):
        plan_devices(path)


def test_devices_of_which_none_fits_are_refused_with_reasons(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    table = msgspec.to_builtins(Devices(model=SHAPE, device=[but(memory_gib=0.2)]))
    table["model"].pop("num_key_value_heads")
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(BadConfig, match="GiB are missing"):
        plan_devices(path)
