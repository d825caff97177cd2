"""Man pages of the three programs and the shells' completions, drawn from the programs themselves: draw_man.py FOLDER.

FOLDER is laid out as /usr/share: man/man1, and each shell's place for completions.  Nothing of it is kept in the repository.
"""

# ruff: noqa: SLF001 - argparse tells of itself nowhere else

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import typer
from typer.completion import get_completion_script

import agent.__main__
import coordinator.__main__
import fedpipe.__main__

SHELLS = {
    "bash": "bash-completion/completions/fedpipe",
    "zsh": "zsh/vendor-completions/_fedpipe",
    "fish": "fish/vendor_completions.d/fedpipe.fish",
}
EXITS = (
    ("0", "done; of doctor: nothing failed"),
    ("1", "a job that failed or was cancelled; of doctor: something failed; of replay: a difference"),
    ("69, 75", "something is not available now: try again"),
    ("77, 78", "not permitted; a configuration that cannot be used: the same again brings the same"),
)


class Command(NamedTuple):
    """One command: how it is called, what it does, and its arguments as (spelling, help)."""

    name: str
    text: str
    arguments: list[tuple[str, str]]


class Page(NamedTuple):
    """One program's page."""

    program: str
    text: str
    commands: list[Command]
    files: tuple[tuple[str, str], ...]


# ------------------------------------------------------------------------------------------------------------- sources


def operators() -> Page:
    """`fedpipe`, from typer."""
    group: Any = typer.main.get_command(fedpipe.__main__.app)
    files = (("FEDPIPE_URL, FEDPIPE_TOKEN_FILE, FEDPIPE_CA_FILE", "environment: where the coordinator's API is"),)
    return Page("fedpipe", group.help, list(_of_group(group, "")), files)


def _of_group(group: Any, before: str) -> Iterator[Command]:
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "commands"):
            yield from _of_group(command, f"{before}{name} ")
        else:
            yield Command(before + name, command.help or "", [_spelled(one) for one in command.params])


def _spelled(parameter: Any) -> tuple[str, str]:
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper(), parameter.help or ""
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
    return ", ".join(parameter.opts) + value, parameter.help or ""


class _Found(Exception):  # noqa: N818 - not an error: how the parser comes out of main()
    pass


def daemon(main: Callable[[], int], *files: tuple[str, str]) -> Page:
    """A daemon's command, from argparse."""

    def caught(parser: argparse.ArgumentParser, *_: object) -> argparse.Namespace:
        raise _Found(parser)

    kept, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, caught  # type: ignore[assignment, method-assign]
    try:
        main()
    except _Found as found:
        (parser,) = found.args
    finally:
        argparse.ArgumentParser.parse_args = kept  # type: ignore[method-assign]
    (choice,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    texts = {action.dest: action.help or "" for action in choice._choices_actions}
    commands = [Command(name, texts.get(name, ""), list(_of_parser(sub))) for name, sub in choice.choices.items()]
    return Page(parser.prog, parser.description, commands, files)


def _of_parser(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
        flag = ", ".join(action.option_strings)
        yield " ".join(filter(None, [flag, "" if flag and action.nargs == 0 else str(value)])), action.help or ""


# --------------------------------------------------------------------------------------------------------------- pages


def roff(page: Page) -> str:
    """The page for man(1), as man(7) has it."""
    lines = [f'.TH {page.program.upper()} 1 "" "fedpipe {version("fedpipe")}" "User Commands"']
    lines += [".SH NAME", f"{_plain(page.program)} \\- {_plain(_lower(page.text))}"]
    lines += [".SH SYNOPSIS", f".B {_plain(page.program)}", "COMMAND [OPTION]..."]
    lines += [".SH DESCRIPTION", _plain(page.text), ".SH COMMANDS"]
    for command in page.commands:
        lines += [f".SS {_plain(command.name)}", _plain(command.text)]
        lines += [
            line
            for spelling, text in command.arguments
            for line in (".TP", f".B {_plain(spelling)}", _plain(text) or "\\&")
        ]
    lines += [".SH EXIT STATUS", *_listed(EXITS)]
    lines += [".SH FILES AND ENVIRONMENT", *_listed(page.files)]
    others = [program for program in ("fedpipe", "fedpipe-agent", "fedpipe-coordinator") if program != page.program]
    lines += [".SH SEE ALSO", ", ".join(f"\\fB{_plain(one)}\\fP(1)" for one in others), "and /usr/share/doc/fedpipe"]
    return "\n".join(lines) + "\n"


def _listed(pairs: tuple[tuple[str, str], ...]) -> list[str]:
    return [line for name, text in pairs for line in (".TP", f".B {_plain(name)}", _plain(text))]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


def _plain(text: str) -> str:
    """Text that roff takes for nothing else."""
    text = re.sub(r"\s+", " ", text).strip().replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return f"\\&{text}" if text[:1] in {".", "'"} else text


def main() -> None:
    """Write everything below the folder that is named."""
    folder = Path(sys.argv[1])
    pages = [
        operators(),
        daemon(
            agent.__main__.main,
            ("/etc/fedpipe/agent.toml", "its configuration"),
            ("/var/lib/fedpipe-agent", "its state"),
        ),
        daemon(
            coordinator.__main__.main,
            ("/etc/fedpipe/coordinator.toml", "its configuration"),
            ("/var/lib/fedpipe-coordinator", "its state: back it up"),
        ),
    ]
    for page in pages:
        _write(folder / "man" / "man1" / f"{page.program}.1", roff(page))
    for shell, place in SHELLS.items():
        script = get_completion_script(prog_name="fedpipe", complete_var="_FEDPIPE_COMPLETE", shell=shell)
        _write(folder / place, script.strip() + "\n")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
