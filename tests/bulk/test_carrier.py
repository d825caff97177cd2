"""The HTTP side of bulk by a store: which URLs are followed, and what an answer may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from protocol.http_store import Carrier, StoreFault, check_url

HOSTILE_URLS = (
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data",
    "http://store.example/bulk/x",
    "http://127.0.0.1.store.example/x",
    "https://user:password@store.example/x",
    "http://localhost@store.example/x",
    "ftp://lan.example/x",
    "http://127.0.0.1:9000/x",
    "http://[::1]/x",
    "https:///x",
    "http://lan.example:99999999/x",
    "https://[::1/x",
    "//127.0.0.1/x",
    "https://store.example/\nHost: x",
    "https://store.example/\u20ac",
    "x",
)


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_a_url_of_somebody_else_is_not_followed(url: str) -> None:
    with pytest.raises(StoreFault, match=r"not followed|no URL"):
        check_url(url, {"lan.example"})


@pytest.mark.parametrize("url", ["https://store.example/x?y=z", "http://lan.example/x", "http://lan.example:9000/x"])
def test_what_is_followed(url: str) -> None:
    check_url(url, {"lan.example"})


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that says this to whoever asks, and no more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x?signature=secret"


async def got(url: str, n_bytes: int) -> bytes:
    found, carrier = bytearray(), Carrier({"127.0.0.1"})
    try:
        await carrier.get(url, n_bytes, found.extend)
    finally:
        await carrier.aclose()
    return bytes(found)


async def test_no_more_is_read_than_was_asked_for() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(200_000)) as url:
        assert await got(url, 10) == bytes(10)


async def test_packed_bytes_are_not_unpacked() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nabcde") as url:
        assert await got(url, 5) == b"abcde"


@pytest.mark.parametrize(
    ("answer", "text", "is_down"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/y\r\nContent-Length: 0\r\n\r\n", "302", False),
        (b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n", "503", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123456789", "too few", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n123456789", "cannot be reached", True),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot be reached", True),
        (
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 48\r\n\r\n<Error><Code>RequestTimeTooSkewed</Code></Error>",
            "403 RequestTimeTooSkewed: set the clock",
            True,
        ),
    ],
)
async def test_an_answer_that_is_none(answer: bytes, text: str, *, is_down: bool) -> None:
    async with answering(answer) as url:
        with pytest.raises(StoreFault, match=text) as raised:
            await got(url, 10)
    assert raised.value.is_down is is_down
    assert "secret" not in str(raised.value)
