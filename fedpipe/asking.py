"""What every command that asks a coordinator has in common: its options, the client, and how an answer is printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.figures import plain

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fedpipe.client import Coordinator

DEFAULT_URL = "http://127.0.0.1:8470"

Url = Annotated[str, typer.Option("--url", envvar="FEDPIPE_URL", metavar="URL", help="Where the coordinator's API is.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", envvar="FEDPIPE_TOKEN_FILE", metavar="FILE", help="File with the API's token."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
Version = Annotated[int | None, typer.Option(min=0, help="Which version; without it the newest.")]
Json = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]


def coordinator_at(url: str, token_file: Path | None) -> Coordinator:
    """The client."""
    from fedpipe.client import Coordinator

    return Coordinator(url, token_file)


def console() -> Console:
    """Where tables and pictures go."""
    from rich.console import Console

    return Console()


def print_json(value: object) -> None:
    """One line for programs."""
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def print_answer(value: object, table: RenderableType, *, as_json: bool) -> None:
    """An answer for whoever asked: a program or a person."""
    if as_json:
        print_json(value)
    elif isinstance(table, str):
        print("\n".join(plain(line) for line in table.split("\n")))
    else:
        console().print(table)
