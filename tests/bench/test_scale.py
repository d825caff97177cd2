"""The benchmark of scale: its arithmetic, the light agents' MQTT, and a small crowd through the whole of the control plane."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest

from bench.scale import control, growth, plots, wire


def test_the_exponent_is_that_of_the_power_law_behind_the_points() -> None:
    assert growth.exponent({x: 3 * x**1.5 for x in (1.0, 10.0, 40.0, 1000.0)}) == pytest.approx(1.5)
    assert growth.exponent({1.0: 7.0, 10.0: 7.0}) == pytest.approx(0.0)
    assert growth.exponent({1.0: 1.0, 2.0: 2.0, 4.0: 16.0}) == pytest.approx(2.0), "the nearest to all, not of the ends"


@pytest.mark.parametrize("n", [0, 100, 127, 128, 16_383, 16_384, 300_000])
def test_a_packet_of_any_length_is_found_again_however_it_is_cut(n: int) -> None:
    whole = wire.publish("a/b", b"x" * n, number=7, retain=True) + wire.PING
    received = bytearray()
    found: list[wire.Packet] = []
    for at in range(0, len(whole), 1 + n // 3):
        received += whole[at : at + 1 + n // 3]
        found += wire.packets(received)
    said, ping = found
    assert (said.kind, said.flags) == (wire.PUBLISH, 3)
    assert wire.published(said) == ("a/b", b"x" * n, 7)
    assert (ping.kind, ping.body) == (0xC0, b"")
    assert not received


def test_properties_of_a_message_are_passed_over() -> None:
    body = b"\x00\x01t" + b"\x05\x02" + struct.pack(">I", 60) + b"payload"  # a message expiry of 60 s
    assert wire.published(wire.Packet(wire.PUBLISH, 0, body)) == ("t", b"payload", 0)


def rounds(agent_s: float) -> dict[str, Any]:
    return {"cpu_s": {"agent": agent_s, "child": agent_s, "coordinator": 1.0, "broker": 0.5}}


def test_pictures_are_drawn_of_what_was_measured_and_in_order(tmp_path: Path) -> None:
    columns = {"8": {"5": {"columns": 124, "cpu_s": 0.1}, "10": {"columns": 248, "cpu_s": 0.2}}}
    found = {"agents": {"100": rounds(10.0), "10": rounds(1.0)}, "columns": columns}
    assert list(plots.pictures(found)["agents"].lines["agents"]) == [10.0, 100.0]
    expected = {"agents": pytest.approx(1), "coordinator": pytest.approx(0), "broker": pytest.approx(0)}
    assert plots.exponents(found) == {"agents": expected, "columns": {"8 components": pytest.approx(1)}}
    assert [path.name for path in plots.draw(found, tmp_path)] == ["scale-agents.svg", "scale-columns.svg"]
    assert "exponent 1.00" in (tmp_path / "scale-agents.svg").read_text()


@pytest.mark.e2e
def test_a_small_crowd_joins_is_surveyed_accepts_and_is_told_to_stop(tmp_path: Path) -> None:
    found = asyncio.run(control.measured(tmp_path, n_agents=20, n_matrices=7, window_s=0.3))
    assert found.n_dropped == 0
    assert 0 <= found.accepted_s[0] <= found.accepted_s[1]
    assert found.peak_bytes.keys() == {"broker", "coordinator", "light"}
    assert found.view_bytes["full"] > found.view_bytes["brief"] > 0
