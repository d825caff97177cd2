"""What a request brings along, checked: a number in its query, bytes or a Struct in its body."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_BODY_BYTES: Final = 2**20

T = TypeVar("T")


def number(request: Request, name: str) -> int | None:
    """A whole number of the query; None where it is not given.  Raises HTTPException for anything else."""
    given = request.query_params.get(name)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= 9):
        raise HTTPException(400, f"{name}={given[:40]!r} is not a number")
    return int(given)


async def struct(request: Request, kind: type[T], max_bytes: int = MAX_BODY_BYTES) -> T:
    """A Struct from a JSON body; an empty one stands for all defaults.  Raises HTTPException."""
    try:
        return msgspec.json.decode(await body(request, max_bytes) or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"not what is expected here: {error}"[:300]) from None


async def body(request: Request, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body.  Raises HTTPException for one of more than `max_bytes`, which is read no further."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > max_bytes:
            raise HTTPException(413, f"a request has at most {max_bytes} bytes")
    return bytes(found)
