from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from coordinator.bucket import Bucket, BulkConfig
from tests.bulk.s3 import KEY_ID, S3, SECRET


@pytest.fixture(scope="session")
def running_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = S3(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3(running_s3: S3) -> Iterator[S3]:
    """A real S3 server with an empty bucket "bulk"."""
    yield running_s3
    running_s3.empty()


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every tool of AWS finds it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bucket(s3: S3) -> Callable[..., Bucket]:
    """The coordinator's account there."""

    def made(**changes: object) -> Bucket:
        return Bucket(BulkConfig(url="s3://bulk/lab", endpoint=s3.endpoint, **changes))  # type: ignore[arg-type]

    return made
