"""The coordinator's account at a store: what its URLs allow, where they lead, and what the doctor says of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from botocore.config import Config
from botocore.session import get_session

from coordinator.bucket import Bucket, BulkConfig, prove
from coordinator.config import CoordinatorConfig
from fedpipe.doctor import roles
from fedpipe.doctor.findings import Status, examine
from protocol.http_store import Carrier, StoreFault


def test_a_url_is_good_for_one_verb_one_object_and_so_many_bytes(bucket: Callable[..., Bucket]) -> None:
    url = urlsplit(bucket(expiry_s=900.0, region="eu-west-1").url("PUT", "up/a1/x.1024/0-4", 4144))
    said = {key: values[0] for key, values in parse_qs(url.query).items()}
    assert url.path == "/bulk/lab/up/a1/x.1024/0-4"
    assert (said["X-Amz-Expires"], said["X-Amz-SignedHeaders"]) == ("900", "content-length;host")
    assert said["X-Amz-Credential"].split("/")[2:4] == ["eu-west-1", "s3"]
    assert "secret" not in url.query


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (BulkConfig(url="s3://lab", region="eu-central-1"), "https://lab.s3.eu-central-1.amazonaws.com/x"),
        (BulkConfig(url="s3://my.lab/a/b/"), "https://s3.us-east-1.amazonaws.com/my.lab/a/b/x"),
        (BulkConfig(url="s3://lab/a", endpoint="https://minio.lab:9000/"), "https://minio.lab:9000/lab/a/x"),
    ],
)
def test_where_an_object_lies(config: BulkConfig, place: str) -> None:
    assert Bucket(config).url("GET", "x").partition("?")[0] == place


@pytest.mark.parametrize("place", [{"region": "eu-west-1"}, {"endpoint": "http://127.0.0.1:9000"}])
@pytest.mark.parametrize("name", ["lab", "my.lab"])
def test_a_signature_is_that_of_the_official_client(
    place: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an account, places and tokens that the server of these tests does not have."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    style = "virtual" if "region" in place and name == "lab" else "path"
    official = get_session().create_client(
        "s3",
        region_name=place.get("region", "us-east-1"),
        endpoint_url=place.get("endpoint"),
        config=Config(signature_version="s3v4", s3={"addressing_style": style}),
    )
    ours = Bucket(BulkConfig(url=f"s3://{name}/a", **place))  # type: ignore[arg-type]
    for verb, operation, more in (("PUT", "put_object", {"ContentLength": 4144}), ("GET", "get_object", {})):
        asked = {"Bucket": name, "Key": "a/up/a1/0-32", **more}
        found = wanted = urlsplit("")
        dates = ["", "-"]
        while dates[0] != dates[1]:  # both in the same second
            found = urlsplit(ours.url(verb, "up/a1/0-32", 4144))  # type: ignore[arg-type]
            wanted = urlsplit(official.generate_presigned_url(operation, Params=asked, ExpiresIn=3600))
            dates = [parse_qs(url.query)["X-Amz-Date"][0] for url in (found, wanted)]
        assert (found.netloc, found.path) == (wanted.netloc, wanted.path)
        assert parse_qs(found.query) == parse_qs(wanted.query)


@pytest.mark.parametrize(
    "url", ["s3://", "s3://a", "https://bucket/x", "s3://Bucket", "s3://bucket/a b", "s3://b\\x/y"]
)
def test_what_is_no_place(url: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"url": url}, BulkConfig)


def test_without_credentials_it_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreFault, match="set AWS_ACCESS_KEY_ID"):
        Bucket(BulkConfig(url="s3://bucket")).url("GET", "x")


async def test_the_account_is_proved(bucket: Callable[..., Bucket], s3: Any) -> None:
    await prove(bucket(), "proof")
    assert s3.names() == []


@pytest.mark.parametrize(
    ("wrong", "region", "next_step"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "", "correct the coordinator's secret key or bulk.region"),
        ({}, "eu-west-1", "correct bulk.region"),
    ],
)
async def test_who_is_not_let_in_is_told_what_to_correct(
    bucket: Callable[..., Bucket], wrong: dict[str, str], region: str, next_step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreFault, match=next_step) as fault:
        await prove(bucket(region=region), "proof")
    assert fault.value.is_down


@pytest.fixture
async def carrier() -> AsyncIterator[Carrier]:
    made = Carrier({"127.0.0.1"})
    yield made
    await made.aclose()


async def four(data: bytes = b"four") -> AsyncIterator[bytes]:
    yield data


async def test_the_store_lets_a_url_be_used_for_what_it_was_signed_for_and_no_longer(
    bucket: Callable[..., Bucket], s3: Any, carrier: Carrier
) -> None:
    put = bucket().url("PUT", "a", 4)
    await carrier.put(put, four(), 4)
    found = bytearray()
    await carrier.get(bucket().url("GET", "a"), 4, found.extend)
    assert found == b"four"
    ended = bucket(expiry_s=1).url("PUT", "a", 4)
    for forged in (
        carrier.put(put, four(b"fours"), 5),
        carrier.put(put.replace("/lab/a?", "/lab/b?"), four(), 4),
        carrier.put(put.replace("X-Amz-Expires=3600", "X-Amz-Expires=7200"), four(), 4),
        carrier.get(put, 4, found.extend),
        carrier.delete(put),
        carrier.delete(put.partition("?")[0]),
    ):
        with pytest.raises(StoreFault, match=r"answered \w+ with 40[03]"):
            await forged
    assert s3.names() == ["lab/a"]
    await asyncio.sleep(2.5)
    with pytest.raises(StoreFault, match="403 AccessDenied") as fault:
        await carrier.put(ended, four(), 4)
    assert not fault.value.is_down, "a URL ends, the store goes on"


def looked(config: CoordinatorConfig, tmp_path: Path) -> Any:
    series = [one for one in roles.coordinator(config, tmp_path, roles.How()) if one.checks == ("bulk",)]
    (found,) = examine(series)
    return found


def test_the_doctor_looks_at_it(s3: Any, tmp_path: Path) -> None:
    bulk = {"url": "s3://bulk/lab", "endpoint": s3.endpoint}

    def doctor(**changed: Any) -> Any:
        return looked(CoordinatorConfig(state_dir=str(tmp_path), bulk=BulkConfig(**changed)), tmp_path)

    assert doctor().status is Status.SKIPPED
    assert doctor(**bulk).status is Status.OK
    wrong = doctor(**bulk | {"url": "s3://nobody"})
    assert (wrong.status, wrong.next_step) == (Status.FAILED, "create it, or correct bulk.url")
    dead = doctor(**bulk | {"endpoint": "http://127.0.0.1:1"})
    assert (dead.status, dead.next_step) == (Status.FAILED, "check the way to it")
