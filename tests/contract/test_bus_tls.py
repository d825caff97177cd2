"""Certificates: what works, and what the operator reads when it does not."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.bus import BrokerConfig, Connected, Disconnected, Happening, Received, mqtt_bus, parse_url
from protocol.errors import BadConfig

PATIENCE_S = 30.0


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, server.pem and client.pem with their keys, and stranger.pem, an authority that nobody asked."""
    folder = tmp_path_factory.mktemp("keys")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        openssl(folder, "req", "-x509", *curve, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl(folder, "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return folder


@pytest.fixture
def secured(start_mosquitto: Any, keys: Path) -> Any:
    """A mosquitto that asks every client for a certificate."""
    return start_mosquitto(
        f"cafile {keys}/ca.pem", f"certfile {keys}/server.pem", f"keyfile {keys}/server.key", "require_certificate true"
    )


async def first(config: BrokerConfig) -> Happening:
    async with mqtt_bus(config, "client", lambda: None) as bus, asyncio.timeout(PATIENCE_S):
        return await bus.next()


def at(broker: Any, scheme: str = "mqtts", **fields: Any) -> BrokerConfig:
    return BrokerConfig(url=f"{scheme}://127.0.0.1:{broker.port}", **fields)


async def test_mutual_tls_carries_chunks(secured: Any, keys: Path) -> None:
    config = at(secured, ca_file=f"{keys}/ca.pem", cert_file=f"{keys}/client.pem", key_file=f"{keys}/client.key")
    chunks = [bytes([i]) * 262_144 for i in range(16)]
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
        bus = mqtt_bus(config, "client", lambda: None)
        await bus.subscribe("t")
        await stack.enter_async_context(bus)
        assert isinstance(await bus.next(), Connected)
        for chunk in chunks:
            await bus.publish("t", chunk, qos=0)
        assert [await bus.next() for _ in chunks] == [Received("t", chunk, retained=False) for chunk in chunks]


async def test_a_chunk_is_whole_when_its_last_record_comes_in_pieces(secured: Any, keys: Path) -> None:
    """Of a record that is not whole TLS holds a part already, which the socket then cannot bring any more."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pause_s: float) -> None:
        while piece := await reader.read(3000):
            writer.write(piece)
            await asyncio.sleep(pause_s)
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", secured.port)
        with contextlib.suppress(OSError):
            await asyncio.gather(relay(reader, broker_writer, 0.0), relay(broker_reader, writer, 0.001))

    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
        server = await stack.enter_async_context(await asyncio.start_server(between, "127.0.0.1", 0))
        files = {"ca_file": f"{keys}/ca.pem", "cert_file": f"{keys}/client.pem", "key_file": f"{keys}/client.key"}
        url = f"mqtts://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        bus = mqtt_bus(BrokerConfig(url=url, keepalive_s=3600, **files), "client", lambda: None)
        await bus.subscribe("t")
        await stack.enter_async_context(bus)
        assert isinstance(await bus.next(), Connected)
        for size in (262_144, 100_000, 65_000):
            await bus.publish("t", bytes(size), qos=0)
            assert await bus.next() == Received("t", bytes(size), retained=False)


async def test_each_obstacle_says_what_to_do(secured: Any, mosquitto_broker: Any, keys: Path) -> None:
    cases = {
        "broker.ca_file": at(secured, ca_file=f"{keys}/stranger.pem"),
        "broker.cert_file": at(secured, ca_file=f"{keys}/ca.pem"),
        "mqtts://": at(secured, scheme="mqtt"),
        "mqtt://": at(mosquitto_broker, ca_file=f"{keys}/ca.pem"),
        "DNS": BrokerConfig(url="mqtt://no-such-host.invalid"),
    }
    for advice, config in cases.items():
        happening = await first(config)
        assert isinstance(happening, Disconnected)
        assert advice in happening.reason


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "http://here"},
        {"url": "mqtt://"},
        {"url": "mqtt://here:99999"},
        {"url": "mqtt://here/topic"},
        {"url": "mqtt://" + "x" * 100},
        {"password_file": "/nowhere/password"},
        {"url": "mqtts://here", "ca_file": "/nowhere/ca.pem"},
        {"url": "mqtt://here", "ca_file": "/etc/hostname"},
    ],
)
def test_what_can_never_connect_is_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        mqtt_bus(BrokerConfig(**fields), "client", lambda: None)


def test_urls() -> None:
    assert str(parse_url("mqtt://broker.example")) == "broker.example:1883"
    secret = parse_url("mqtts://me:a%40b@[::1]:8884/")
    assert (secret.host, secret.port, secret.tls, secret.username, secret.password) == ("::1", 8884, True, "me", "a@b")
    assert "a@b" not in repr(secret) + str(secret)
    with pytest.raises(BadConfig) as refused:
        parse_url("mqtt://me:hush@host/topic")
    assert "hush" not in str(refused.value)


def test_unknown_and_impossible_fields_are_errors() -> None:
    for toml in (b"hots = 'x'", b"chunk_bytes = 1", b"protocol = '4'"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.toml.decode(toml, type=BrokerConfig)
