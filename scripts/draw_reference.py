"""Draws the pages of docs/reference/ whole: every key of every file, and every command.

    .venv/bin/python scripts/draw_reference.py

Types, bounds and defaults come from the Structs, what a key means from the text below it in the code or else from its line in
docs/examples, commands from the parsers themselves.  Nothing in these pages is written by hand; a test says when they are old.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn
from unittest.mock import patch

import msgspec
import msgspec.inspect as mi
import typer

import agent.__main__
import coordinator.__main__
import fedpipe.__main__
from agent.config import LIVE as AGENT_LIVE
from agent.config import AgentConfig
from coordinator.config import LIVE as COORDINATOR_LIVE
from coordinator.config import CoordinatorConfig
from coordinator.core.spec import JobSpec
from protocol.reloading import Live

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import draw_docs  # noqa: E402 - it lies beside this file

FOLDER: Final = ROOT / "docs" / "reference"
NOTE: Final = "<!-- Drawn by scripts/draw_reference.py; change the code or docs/examples, then run it. -->\n"
SHARED: Final = frozenset({"url", "token_file", "as_json"})
"""Options of every command that asks the coordinator: said once."""

_YOURS = re.compile(r"^yours(, required|, a pin)?[:;,]? *")


# -------------------------------------------------------------------------------------------------------------- files


def agent_config() -> str:
    """The agent's configuration."""
    return _file(
        "agent.toml", "The agent's configuration", "fedpipe-agent check-config --config", AgentConfig, AGENT_LIVE
    )


def coordinator_config() -> str:
    """The coordinator's."""
    check = "fedpipe-coordinator check-config --config"
    return _file("coordinator.toml", "The coordinator's configuration", check, CoordinatorConfig, COORDINATOR_LIVE)


def job_file() -> str:
    """A job file."""
    return _file("job.toml", "The job file", "fedpipe-coordinator check-job", JobSpec, None)


def _file(name: str, title: str, check: str, struct: type[msgspec.Struct], live: Live | None) -> str:
    told = f"A whole one, with every key: [{name}](../examples/{name}). A key that does not exist is refused with its place."
    if live:
        told += (
            "\n\n`systemctl reload` (SIGHUP) reads the file anew. *At once* is in force then; the others wait for a restart, "
            "and the daemon says so. A file with a fault changes nothing."
        )
    tables = "\n".join(_tables(struct, (), _examples(name), live))
    return f"# {title}\n\n{NOTE}\n{told}\n\n    {check} {name}\n\n{tables}"


def _tables(
    struct: type[msgspec.Struct], path: tuple[str, ...], said: dict[tuple[str, ...], str], live: Live | None
) -> Iterator[str]:
    info = mi.type_info(struct)
    assert isinstance(info, mi.StructType)
    head = f"[{'.'.join(path)}]" if path else "At the top"
    yield f"## {head}\n\n{_plain(inspect.getdoc(struct) or '')}\n"
    inner: list[tuple[tuple[str, ...], type[msgspec.Struct]]] = []
    rows, texts = [], _texts(struct)
    for field in info.fields:
        here = (*path, field.name)
        if isinstance(field.type, mi.StructType):
            inner.append((here, field.type.cls))
            continue
        if isinstance(field.type, mi.DictType) and isinstance(field.type.value_type, mi.StructType):
            inner.append(((*here, "NAME" if field.name == "data" else "ID"), field.type.value_type.cls))
            continue
        tables = (path, ("adapter",), ("train",)) if path == ("agents", "ID") else (path,)
        meaning = texts.get(field.name) or next(filter(None, (said.get((*t, field.name)) for t in tables)), "")
        rows.append((f"`{field.name}`", _words(field.type), _default(field), meaning, *_when(".".join(here), live)))
    if rows:
        columns = ("key", "type", "default", "meaning", *(("in force",) if live else ()))
        yield _table(columns, rows)
    for where, kind in inner:
        yield from _tables(kind, where, said, live)


def _when(key: str, live: Live | None) -> tuple[str, ...]:
    if live is None:
        return ()
    return ("at once" if key in live else "restart",)


def _words(kind: mi.Type) -> str:
    match kind:
        case mi.UnionType(types=kinds) if any(isinstance(one, mi.NoneType) for one in kinds):
            return " or ".join(_words(one) for one in kinds if not isinstance(one, mi.NoneType))
        case _:
            return draw_docs.words(kind)


def _default(field: mi.Field) -> str:
    if field.required:
        return "**required**"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return "not set" if value is None else f"`{msgspec.json.encode(value).decode()}`"


def _texts(struct: type[msgspec.Struct]) -> dict[str, str]:
    """What the code says below each field."""
    found: dict[str, str] = {}
    for cls in reversed(struct.__mro__):
        if not issubclass(cls, msgspec.Struct) or cls.__module__.startswith("msgspec"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
                assert isinstance(after.value, ast.Constant)
                found[node.target.id] = _plain(str(after.value.value))
    return found


def _examples(name: str) -> dict[tuple[str, ...], str]:
    """What an example says behind each key; where it is the user who names a table, the first of its kind counts.

    Both daemons have the same [broker]; the coordinator's example says what its keys mean.
    """
    found: dict[tuple[str, ...], str] = {}
    if name == "agent.toml":
        found |= {key: text for key, text in _examples("coordinator.toml").items() if key[0] == "broker"}
    table: tuple[str, ...] = ()
    for line in (ROOT / "docs" / "examples" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = tuple(line[1 : line.index("]")].split("."))
            if table[0] in {"data", "agents"}:
                table = (table[0], "NAME" if table[0] == "data" else "ID")
        elif "=" in line and not line.startswith("#"):
            key, comment = line.partition("=")[0].strip(), line.partition(" # ")[2]
            if text := _YOURS.sub("", comment.strip()):
                found[(*table, key)] = found.get((*table, key)) or _sentence(text)
    return found


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)) + "\n"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


# ----------------------------------------------------------------------------------------------------------- commands


class _Found(Exception):  # noqa: N818 - it carries a value out of a program that would go on to run
    pass


def _parser(main: Callable[[], Any]) -> argparse.ArgumentParser:
    """The parser that a program builds."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise _Found(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main()
        except _Found as found:
            return found.args[0]  # type: ignore[no-any-return]
    raise AssertionError("no parser was asked")


def cli() -> str:
    """All three programs."""
    parts = [
        f"# The commands\n\n{NOTE}",
        "Exit codes are the same for all three: [operations](../operations.md#exit-codes).\n",
        "## fedpipe\n",
        "What an operator says; `--help` says the same. Commands that ask the coordinator also take:\n",
        _options(typer.main.get_command(fedpipe.__main__.app).commands["jobs"].params),  # type: ignore[attr-defined]
        *_clicks(typer.main.get_command(fedpipe.__main__.app), "fedpipe"),
    ]
    for name, main in PROGRAMS.items():
        parser = _parser(main)
        parts += [f"## {name}\n", f"{parser.description}\n", *_subparsers(parser, name)]
    return "\n".join(parts)


def _clicks(group: Any, name: str) -> Iterator[str]:
    for word in group.list_commands(None):
        command = group.commands[word]
        if hasattr(command, "commands"):
            yield from _clicks(command, f"{name} {word}")
            continue
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([name, word, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
        yield f"### {name} {word}\n\n{_plain(command.help)}\n\n    {usage}\n"
        own = [p for p in command.params if p.name not in SHARED]
        if own:
            yield _options(own)


def _options(params: list[Any]) -> str:
    rows = []
    for one in params:
        if one.param_type_name == "argument":
            name, standard = (one.metavar or one.name.upper()).strip("[]"), "**required**" if one.required else ""
        else:
            name = one.opts[0] + ("" if one.is_flag else f" {one.metavar or _value(one)}")
            standard = _shown(one)
        setting = f" Also `{one.envvar}`." if one.envvar else ""
        rows.append((f"`{name}`", f"{_plain(one.help or '')}{setting}", standard))
    return _table(("option", "meaning", "default"), rows)


def _value(option: Any) -> str:
    return "N" if option.min is not None else str(option.name).upper()


def _shown(option: Any) -> str:
    if option.is_flag:
        return ""
    if option.required:
        return "**required**"
    return "" if option.default is None or option.default == "" else f"`{option.default}`"


def _subparsers(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))  # noqa: SLF001
    texts = {choice.dest: choice.help for choice in commands._choices_actions}  # noqa: SLF001
    for word, command in commands.choices.items():
        actions = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]  # noqa: SLF001
        yield f"### {name} {word}\n\n{_sentence(texts[word] or '')}\n"
        rows = [(f"`{_argument(one)}`", _sentence(one.help or ""), _standard(one)) for one in actions]
        yield _table(("option", "meaning", "default"), rows)


def _argument(action: argparse.Action) -> str:
    value = " or ".join(map(str, action.choices)) if action.choices else action.dest.upper()
    if not action.option_strings:
        return value
    return action.option_strings[0] + ("" if action.nargs == 0 else f" {value}")


def _standard(action: argparse.Action) -> str:
    if action.required:
        return "**required**"
    return "" if action.nargs == 0 or not action.default else f"`{action.default}`"


def _sentence(text: str) -> str:
    return _plain(text[:1].upper() + text[1:]) + ("" if text.endswith((".", "?")) or not text else ".")


PROGRAMS: Final[dict[str, Callable[[], Any]]] = {
    "fedpipe-coordinator": coordinator.__main__.main,
    "fedpipe-agent": agent.__main__.main,
}
PAGES: Final[dict[str, Callable[[], str]]] = {
    "agent-config.md": agent_config,
    "coordinator-config.md": coordinator_config,
    "job-file.md": job_file,
    "cli.md": cli,
}


def main() -> None:
    """Draw every page in place."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PAGES.items():
        place, text = FOLDER / name, draw()
        if not place.exists() or place.read_text(encoding="utf-8") != text:
            place.write_text(text, encoding="utf-8")
            print(f"docs/reference/{name}: drawn anew")


if __name__ == "__main__":
    main()
