"""Bytes to and from an object store over HTTP, at URLs that somebody else has signed and that are not believed.

A URL comes from the other side of a broker.  So: HTTPS, or plain HTTP to hosts that the owner has named, and not even to this
machine without that, where things listen that believe whoever reaches them; no user names in it; a redirect is a refusal;
never more bytes than were asked for, never longer than MAX_S.  What came is judged by its checksums and its digest, as what
comes over the bus.

httpx costs 9 MB and is imported at the first request, so a daemon that needs no store does not pay for it.  It takes proxies
and authorities (HTTPS_PROXY, SSL_CERT_FILE) from the environment.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from protocol.errors import OutsideFault

if TYPE_CHECKING:
    import httpx

CONNECT_S: Final = 10.0
IDLE_S: Final = 30.0
"""Without a byte in either direction."""
MAX_S: Final = 900.0
"""One object, of some 4 MiB, on the slowest link that is worth it."""
EXPLANATION_BYTES: Final = 2048
"""Of an error's body, in which S3 says why."""

_CODE: Final = re.compile(rb"<Code>([A-Za-z]{1,60})</Code>")
_ADVICE: Final = {
    "RequestTimeTooSkewed": "set the clock of the coordinator",
    "AccessDenied": "the coordinator's account needs to put, get and delete objects there",
    "NoSuchBucket": "create it, or correct bulk.url",
    "NoSuchKey": "the object is gone: it is asked for over the broker",
    "SignatureDoesNotMatch": "correct the coordinator's secret key or bulk.region",
    "InvalidAccessKeyId": "correct the coordinator's access key",
    "AuthorizationQueryParametersError": "correct bulk.region",
    "PermanentRedirect": "correct bulk.region",
    "ExpiredToken": "renew the coordinator's session token",
}
_OF_ONE: Final = frozenset({"", "AccessDenied", "NoSuchKey"})
"""Codes that may be the fault of one object or one URL, which has ended; every other is the store's or the account's."""


class StoreFault(OutsideFault):
    """A store did not do what it was asked; `is_down`: it would not do it for anybody, so a while later is soon enough."""

    def __init__(self, text: str, *, is_down: bool = False) -> None:
        super().__init__(text)
        self.is_down = is_down


class Carrier:
    """`plain_hosts` may be spoken to without TLS.  Every method raises StoreFault; none tries again."""

    def __init__(self, plain_hosts: Collection[str] = ()) -> None:
        self.plain_hosts = frozenset(plain_hosts)
        self._client: httpx.AsyncClient | None = None

    async def put(self, url: str, body: AsyncIterator[bytes], n_bytes: int) -> None:
        """Store `n_bytes` of `body` there."""
        headers = {"content-length": str(n_bytes)}
        async with self._answer("PUT", url, headers, body):
            pass

    async def get(self, url: str, n_bytes: int, take: Callable[[bytes], None]) -> None:
        """Hand over the first `n_bytes` of what lies there, in blocks; what lies behind them is not read."""
        headers = {"accept-encoding": "identity", "range": f"bytes=0-{n_bytes - 1}"}
        async with self._answer("GET", url, headers) as response:
            async for block in response.aiter_raw():
                take(block[:n_bytes])
                n_bytes -= len(block)
                if n_bytes <= 0:
                    return
        raise StoreFault(f"{_host(url)} sent {n_bytes} bytes too few: it is asked for again")

    async def delete(self, url: str) -> None:
        """Let nothing lie there."""
        async with self._answer("DELETE", url, {}):
            pass

    async def aclose(self) -> None:
        """Let go of all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    @asynccontextmanager
    async def _answer(
        self, method: str, url: str, headers: dict[str, str], body: AsyncIterator[bytes] | None = None
    ) -> AsyncIterator[httpx.Response]:
        check_url(url, self.plain_hosts)
        import httpx

        if self._client is None:
            limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S)
            timeout = httpx.Timeout(IDLE_S, connect=CONNECT_S)
            logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every URL, signature and all
            self._client = httpx.AsyncClient(follow_redirects=False, limits=limits, timeout=timeout)
        try:
            async with asyncio.timeout(MAX_S), self._client.stream(method, url, headers=headers, content=body) as found:
                if not found.is_success:
                    raise await _refusal(found, method)
                yield found
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, TimeoutError, OSError) as error:
            text = f"{_host(url)} cannot be reached ({type(error).__name__}: {str(error)[:200]}): check the way to it"
            raise StoreFault(text, is_down=True) from error


def check_url(url: str, plain_hosts: Collection[str] = ()) -> None:
    """Raises StoreFault for a URL that nobody is to follow."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise StoreFault("this is no URL: correct bulk.url and bulk.endpoint at the coordinator") from None
    if not host or parts.username or parts.password or parts.fragment or not url.isascii() or not url.isprintable():
        raise StoreFault(f"{url[:60]!r} is not followed: correct bulk.endpoint at the coordinator")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in plain_hosts):
        raise StoreFault(
            f"{parts.scheme[:20]}://{host[:100]} is not followed: give the store a certificate, or name it in limits.http_hosts"
        )


def _host(url: str) -> str:
    """All of a URL that may stand in a log: the rest is as good as a password."""
    return f"the object store {(urlsplit(url).hostname or '')[:100]}"


async def _refusal(response: httpx.Response, method: str) -> StoreFault:
    """What an answer says that is none."""
    found = b""
    async for block in response.aiter_raw():
        found += block
        if len(found) >= EXPLANATION_BYTES:
            break
    match = _CODE.search(found[:EXPLANATION_BYTES])
    code = match[1].decode() if match else ""
    advice = _ADVICE.get(code, "look into its log")
    text = f"{_host(str(response.url))} answered {method} with {response.status_code} {code}".rstrip()
    is_down = response.status_code >= 500 or response.status_code == 429 or code not in _OF_ONE
    return StoreFault(f"{text}: {advice}", is_down=is_down)
