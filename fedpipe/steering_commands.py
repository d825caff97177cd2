"""The commands that steer a job under way: pause, resume, rollback, cancel."""

from __future__ import annotations

from typing import Annotated

import typer

from fedpipe.asking import DEFAULT_URL, JobName, Json, TokenFile, Url, coordinator_at, print_answer

app = typer.Typer()

Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; it is kept with the job and in the audit log.")]


@app.command()
def pause(
    job: JobName,
    now: Annotated[bool, typer.Option("--now", help="Stop the round under way; what was trained is kept.")] = False,
    reason: Reason = "",
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Begin no further round of a job until it is resumed."""
    with coordinator_at(url, token_file) as coordinator:
        paused = coordinator.pause(job, reason, now=now)
    print_answer(paused, f"{paused.name}: {paused.text}", as_json=as_json)


@app.command()
def resume(job: JobName, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Let a paused job go on where it was."""
    with coordinator_at(url, token_file) as coordinator:
        going = coordinator.resume(job)
    print_answer(going, f"{going.name}: {going.text}", as_json=as_json)


@app.command()
def rollback(
    job: JobName,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=0, help="The version to go back to.")],
    reason: Reason = "",
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Make a new version of an earlier one: the job goes on from it, an ended one hands it out."""
    with coordinator_at(url, token_file) as coordinator:
        back = coordinator.roll_back(job, version, reason)
    print_answer(
        back, f"{back.name}: version {back.version} is version {version} once more; {back.text}", as_json=as_json
    )


@app.command()
def cancel(job: JobName, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """End a job; its finished versions stay."""
    with coordinator_at(url, token_file) as coordinator:
        ended = coordinator.cancel(job)
    print_answer(ended, f"{ended.name}: {ended.text}", as_json=as_json)
