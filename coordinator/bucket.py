"""The coordinator's account at an S3 store: it makes URLs that are good for one object, one verb and `bulk.expiry_s`.

Presigned URLs with AWS Signature Version 4, in the query (docs.aws.amazon.com/AmazonS3, "Authenticating Requests: Using Query
Parameters"), so agents need no account and no library.  A PUT is good for exactly so many bytes.  botocore finds the credentials
where every tool of AWS finds them (environment, ~/.aws, the machine's role) and signs; all requests are Carrier's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Meta

from protocol.errors import BadConfig
from protocol.http_store import Carrier, StoreFault
from protocol.store_way import Verb

if TYPE_CHECKING:
    from botocore.credentials import Credentials, ReadOnlyCredentials

LOOK_S: Final = 60.0
"""Credentials of a role end by themselves, and are fetched anew some minutes before."""
_PLACE: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._/-]{0,200})?")
_ENDPOINT: Final = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,200}/?")


class BulkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Models and updates by an object store, for brokers that are too narrow for them.  Agents need no setting for it."""

    url: str = ""
    """Where, as "s3://bucket/prefix"; empty: all bulk goes over the broker."""
    endpoint: str = ""
    """Of an S3 that is not AWS's, as agents reach it; plain HTTP only where each agent's limits.http_hosts allows it."""
    region: Annotated[str, Meta(max_length=64)] = ""
    """Empty: as AWS_REGION or ~/.aws/config say, else us-east-1."""
    expiry_s: Annotated[float, Meta(ge=900, le=604_800)] = 3600.0
    """How long a URL is good for; it is asked for again when it was too short."""
    min_bytes: Annotated[int, Meta(ge=0, le=2**40)] = 2**20
    """Smaller models and updates go over the broker all the same."""

    def __post_init__(self) -> None:
        if self.url and not _PLACE.fullmatch(self.url):
            raise ValueError(f'bulk.url "{self.url[:80]}" is no place: write it as "s3://bucket/prefix"')
        if self.endpoint and not _ENDPOINT.fullmatch(self.endpoint):
            raise ValueError(
                f'bulk.endpoint "{self.endpoint[:80]}" is none: write it as "https://minio.example.org:9000"'
            )


class Bucket:
    """A place in a store.  Raises BadConfig where botocore is not installed."""

    def __init__(self, config: BulkConfig) -> None:
        try:
            from botocore.session import get_session
        except ImportError:
            raise BadConfig("bulk.url needs botocore, which is not installed: pip install 'fedpipe[s3]'") from None
        place = urlsplit(config.url)
        self._session = get_session()
        self._region = config.region or self._session.get_config_variable("region") or "us-east-1"
        self._root = _root(config.endpoint.rstrip("/"), place.netloc, self._region)
        self._prefix, self._expiry_s = place.path.strip("/"), int(config.expiry_s)
        self._credentials: Credentials | None = None
        self._signing: ReadOnlyCredentials | None = None
        parts = urlsplit(self._root)
        self.plain_hosts = {parts.hostname or ""} if parts.scheme == "http" else set()
        """It may be spoken to in plain HTTP by us, who configured it."""
        with suppress(StoreFault):
            self.renew()

    def renew(self) -> None:
        """Have credentials that are good for a while.  May ask the network; call it in a thread.  Raises StoreFault."""
        from botocore.exceptions import BotoCoreError

        try:
            self._credentials = self._credentials or self._session.get_credentials()
            found = self._credentials.get_frozen_credentials() if self._credentials else None
        except BotoCoreError as error:
            raise StoreFault(f"no credentials for the object store ({error}): see AWS_PROFILE, ~/.aws") from None
        if not found:
            raise StoreFault("no credentials for the object store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        self._signing = found

    async def keep(self) -> None:
        """Have them renewed in time, until cancelled; without any, signing says so."""
        while True:
            try:
                await asyncio.to_thread(self.renew)
            except StoreFault:
                self._signing = None
            await asyncio.sleep(LOOK_S)

    def url(self, verb: Verb, name: str, n_bytes: int = 0) -> str:
        """Where to do `verb` with the object `name`; a PUT of exactly `n_bytes`.  50 µs, no request.  Raises StoreFault."""
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest

        if self._signing is None:
            raise StoreFault("no credentials for the object store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        key = quote(f"{self._prefix}/{name}" if self._prefix else name, safe="/-_.~")
        headers = {"content-length": str(n_bytes)} if verb == "PUT" else {}
        request = AWSRequest(method=verb, url=f"{self._root}/{key}", headers=headers)
        S3SigV4QueryAuth(self._signing, "s3", self._region, expires=self._expiry_s).add_auth(request)
        return str(request.url)


def _root(endpoint: str, bucket: str, region: str) -> str:
    """What stands before an object's name.  A bucket with a dot has no certificate of its own."""
    if endpoint:
        return f"{endpoint}/{bucket}"
    domain = f"s3.{region}.amazonaws.com"
    return f"https://{domain}/{bucket}" if "." in bucket else f"https://{bucket}.{domain}"


async def prove(bucket: Bucket, name: str) -> None:
    """Put an object, get it and delete it.  Raises StoreFault with what to do about the first of these that fails."""
    await asyncio.to_thread(bucket.renew)
    carrier, data = Carrier(bucket.plain_hosts), b"fedpipe looks whether it may put, get and delete here\n"

    async def body() -> AsyncIterator[bytes]:
        yield data

    found = bytearray()
    try:
        await carrier.put(bucket.url("PUT", name, len(data)), body(), len(data))
        await carrier.get(bucket.url("GET", name), len(data), found.extend)
        await carrier.delete(bucket.url("DELETE", name))
    finally:
        await carrier.aclose()
    if found != data:
        raise StoreFault("the object store gave back something else than was put there: correct bulk.endpoint")
