"""The commands about the audit log: whether it is whole, and what stands in it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpipe.asking import Json, print_answer, print_json
from protocol.errors import BadConfig

if TYPE_CHECKING:
    from rich.table import Table

    from coordinator.audit import Entry

app = typer.Typer(no_args_is_help=True, help="Who did what on this coordinator.")

File = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The log; without it that of --config.")]
Config = Annotated[Path, typer.Option(metavar="FILE", help="The coordinator's configuration.")]
DEFAULT_CONFIG = Path("/etc/fedpipe/coordinator.toml")


def _place(file: Path | None, config: Path) -> Path:
    from coordinator.config import CoordinatorConfig
    from protocol.daemon import load_toml

    return file or Path(load_toml(config, CoordinatorConfig).state_dir) / "audit.log"


@app.command()
def verify(
    file: File = None,
    head: Annotated[
        str, typer.Option(metavar="N:DIGEST", help="The last line as it was told once, by /v1/health or the log.")
    ] = "",
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Check that no line was changed, taken out, moved or cut off; exit code 78 names the first that was."""
    from coordinator.audit import head_file, lines_of, parse_head
    from coordinator.audit import verify as whole

    path = _place(file, config)
    known, beside = parse_head(head) if head else None, head_file(path)
    try:
        found = whole(lines_of(path), known)
        if beside.exists():
            whole(lines_of(path), parse_head(beside.read_text(encoding="ascii")))
    except (BadConfig, OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: {error}: compare it with a copy, and with the daemon's log (action=audit)") from None
    text = f"{path} is whole: {found.n} lines, head {found}"
    print_answer({"file": str(path), "lines": found.n, "head": str(found)}, text, as_json=as_json)


@app.command()
def show(file: File = None, config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Show who did what, oldest first; whether the log is whole is for `verify` to say."""
    from coordinator.audit import read

    path = _place(file, config)
    if as_json:
        for entry in read(path):
            print_json(entry)
        return
    entries = list(read(path))
    print_answer(entries, _table(entries) if entries else f"{path} holds nothing yet", as_json=False)


def _table(entries: list[Entry]) -> Table:
    from rich.table import Table

    from coordinator.figures import plain

    ends = {entry.of: entry for entry in entries if entry.of}
    table = Table("line", "when", "who", "from", "did", "what", "outcome", box=None, pad_edge=False)
    for entry in (entry for entry in entries if not entry.of):
        end = ends.get(entry.n)
        day = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
        what, outcome = (end.what, end.outcome) if end else (entry.what, entry.outcome or "broken off")
        told = (entry.actor, entry.address, entry.action, what, outcome)
        table.add_row(str(entry.n), day, *map(plain, told))
    return table
