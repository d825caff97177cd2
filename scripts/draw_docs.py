"""Draws those parts of docs/ that repeat the code.

    .venv/bin/python scripts/draw_docs.py

A drawn part stands between `<!-- drawn: NAME -->` and `<!-- end -->`.  All of it comes from the code and bench/results, except the last
cells of a table's rows, which people write: they are carried over row by row, and a new row has a "?" there.  The tests refuse
a "?" and a page that is not as it would be drawn, so a field, a topic or a log word can neither come nor go unnoticed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Final, NamedTuple

import msgspec
import msgspec.inspect as mi

from protocol import daemon, manifest, messages, models, topics, updates

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = (
    "docs/architecture.md",
    "docs/protocol.md",
    "docs/operations.md",
    "docs/reliability.md",
    "docs/benchmarks.md",
)
PACKAGES: Final = ("protocol", "agent", "coordinator", "fedpipe")
UNKNOWN: Final = "?"
LEVELS: Final = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}

_PART = re.compile(r"(?<=<!-- drawn: )(\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
_PATTERNS: Final = {
    r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?\Z": "id",
    r"^[0-9a-f]{64}\Z": "sha256",
    r"^([0-9a-f]{64})?\Z": "sha256 or empty",
    r"^[0-9a-f]{32}\Z": "32 hex digits",
    r"^[0-9a-f]{16}\Z": "16 hex digits",
}


class Table(NamedTuple):
    """A table, with what stands above it.  `rows` are the cells from the code; `head` names also the `n_kept` written ones."""

    above: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    n_kept: int = 1


# -------------------------------------------------------------------------------------------------------------- pages


def drawn(page: str) -> str:
    """The page as it would be drawn now.  Raises KeyError for a part that nobody draws."""
    return _PART.sub(lambda part: f"{part[1]} -->\n{_part(part[1], part[0])}", page)


def _part(name: str, old: str) -> str:
    kept = _written_cells(old)
    return "\n".join(_text(table, kept) for table in PARTS[name]()) + "\n"


def _text(table: Table, kept: dict[tuple[str, str], tuple[str, ...]]) -> str:
    title = table.above.partition("\n")[0]
    lines = [table.above, ""] if table.above else []
    lines += [_line(table.head), _line(("---",) * len(table.head))]
    for row in table.rows:
        written = kept.get((title, row[0]), ())[len(row) :]
        lines.append(_line((*row, *(written or (UNKNOWN,) * table.n_kept))))
    return "\n".join([*lines, ""])


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _written_cells(old: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """All cells of every row, by the title above its table and the row's first cell."""
    found, title = {}, ""
    for line in old.splitlines():
        if line.startswith("#"):
            title = line
        elif line.startswith("| "):
            cells = tuple(cell.strip() for cell in line.strip("|").split(" | "))
            found[title, cells[0]] = cells
    return found


# ------------------------------------------------------------------------------------------------------------ protocol


def _topics() -> Iterator[Table]:
    rows, fleet = [], topics.Topics("fleet")
    for name, method in vars(topics.Topics).items():
        if name.startswith("_") or not inspect.isfunction(method) or method.__annotations__.get("return") != "str":
            continue
        given = typing.get_type_hints(method)
        leaves = typing.get_args(given.get("leaf", typing.Literal[""]))
        for leaf in leaves:
            values = {p: leaf if p == "leaf" else f"{{{p}}}" for p in inspect.signature(method).parameters}
            topic = method(fleet, **{p: value for p, value in values.items() if p != "self"})
            rows.append((f"`{topic.replace('/fleet/', '/{fleet}/')}`", f"`{name}`"))
    head = ("topic", "builder", "from", "carries", "QoS", "retained", "what for")
    yield Table("", head, rows, n_kept=5)


def _messages() -> Iterator[Table]:
    for message in typing.get_args(messages.Body):
        yield _struct(message, f"### `{message.__struct_config__.tag}`: {message.__name__}")


def _values() -> Iterator[Table]:
    yield _struct(messages.Envelope, "### Envelope")
    for value in vars(messages).values():
        if isinstance(value, type) and issubclass(value, messages.Value) and value is not messages.Value:
            yield _struct(value, f"### {value.__name__}")


def _headers() -> Iterator[Table]:
    for header in (updates.LoraHeader, models.ModelHeader, manifest.Entry):
        yield _struct(header, f"### {header.__name__}")


def _struct(struct: type[msgspec.Struct], title: str) -> Table:
    told = inspect.getdoc(struct) or ""
    info = mi.type_info(struct)
    assert isinstance(info, mi.StructType)
    rows = [(f"`{field.name}`", words(field.type), _default(field)) for field in info.fields]
    return Table(f"{title}\n\n{told}", ("field", "type", "default", "meaning"), rows)


def words(kind: mi.Type) -> str:
    """A type with its bounds, for people."""
    match kind:
        case mi.IntType():
            return f"int{_bounds(kind)}"
        case mi.FloatType():
            return f"float{_bounds(kind)}"
        case mi.BoolType():
            return "bool"
        case mi.StrType(pattern=str(pattern)):
            return _PATTERNS[pattern]
        case mi.StrType():
            return f"text{_length(kind)}"
        case mi.BytesType():
            return f"bytes{_length(kind)}"
        case mi.ListType(item_type=item):
            return f"list{_length(kind)}: {words(item)}"
        case mi.TupleType(item_types=items):
            return f"[{', '.join(words(item) for item in items)}]"
        case mi.DictType(key_type=key, value_type=value):
            return f"map{_length(kind)}: {words(key)} → {words(value)}"
        case mi.LiteralType(values=values):
            return " or ".join(f'"{value}"' for value in sorted(map(str, values)))
        case mi.UnionType(types=kinds) if len(kinds) == len(typing.get_args(messages.Body)):
            return "one of the messages"
        case mi.UnionType(types=kinds):
            return " or ".join(words(one) for one in kinds)
        case mi.NoneType():
            return "nil"
        case mi.RawType():  # of a header, whose table of contents is read by itself
            return words(mi.type_info(manifest.Entries))
        case mi.StructType(cls=cls) | mi.EnumType(cls=cls):
            return f"[{cls.__name__}](#{'execution-states' if cls is messages.ExecState else cls.__name__.lower()})"
    raise TypeError(kind)


def _bounds(kind: mi.IntType | mi.FloatType) -> str:
    low = None if kind.ge is None else f"from {number(kind.ge)}"
    low = low if kind.gt is None else f"above {number(kind.gt)}"
    high = None if kind.le is None else f"to {number(kind.le)}"
    high = high if kind.lt is None else f"below {number(kind.lt)}"
    return "".join(f" {bound}" for bound in (low, high) if bound)


def _length(kind: mi.StrType | mi.BytesType | mi.ListType | mi.DictType) -> str:
    low, high = kind.min_length, kind.max_length
    if high is None:
        return ""
    return f" of {low} to {number(high)}" if low else f" of at most {number(high)}"


def number(value: float) -> str:
    """A number, large powers of two and ten as such."""
    whole = int(value)
    if whole != value:
        return f"{value:g}"
    if whole >= 2**14 and whole & (whole - 1) == 0:
        return f"2^{whole.bit_length() - 1}"
    if whole >= 10**4 and str(whole).strip("0") == "1":
        return f"10^{len(str(whole)) - 1}"
    return str(whole)


def _default(field: mi.Field) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{field.default_factory()}`"
    return "nil" if field.default is None else f"`{msgspec.json.encode(field.default).decode()}`"


def _states() -> Iterator[Table]:
    rows = [(f"`{s}`", "end" if s in messages.TERMINAL else "under way") for s in messages.ExecState]
    yield Table("", ("state", "kind", "said by", "meaning"), rows, n_kept=2)


def _limits() -> Iterator[Table]:
    rows = []
    for path in sorted((ROOT / "protocol").glob("*.py")):
        module = importlib.import_module(f"protocol.{path.stem}")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.AnnAssign | ast.Assign):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                name = target.id if isinstance(target, ast.Name) else ""
                if name.startswith("MAX_"):
                    rows.append((f"`{path.stem}.{name}`", number(getattr(module, name))))
    yield Table("", ("limit", "value", "what happens beyond it"), rows)


# -------------------------------------------------------------------------------------------------- the rest of the code


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def _map() -> Iterator[Table]:
    found: dict[str, list[tuple[str, ...]]] = {}
    for path, tree in _sources():
        folder, _, name = path.rpartition("/")
        idea = " ".join((ast.get_docstring(tree) or UNKNOWN).split("\n\n")[0].split())
        first = re.split(r"(?<=[.?!]) ", idea)[0]
        found.setdefault(folder, []).append((f"`{name}`", first.replace("|", "/")))
    for folder, rows in found.items():
        yield Table(f"### {folder}/", ("file", "what lives there"), rows, n_kept=0)


def _actions() -> Iterator[Table]:
    said: dict[str, tuple[set[str], set[str]]] = {}
    for path, tree in _sources():
        for word, level in _logged(tree):
            who, levels = said.setdefault(word, (set(), set()))
            who |= {"agent", "coordinator"} if path.startswith("protocol/") else {path.partition("/")[0]}
            levels.add(level)
    rows = [
        (f"`{word}`", ", ".join(sorted(levels)), ", ".join(sorted(who))) for word, (who, levels) in sorted(said.items())
    ]
    yield Table("", ("action", "level", "who", "meaning, and what to do"), rows)


def _logged(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(action word, level) of every call of a logger."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        named: dict[str, str] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                for word in _words(node.value, {}):
                    named[node.targets[0].id] = word
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
                for extra in (keyword.value for keyword in node.keywords if keyword.arg == "extra"):
                    yield from ((word, LEVELS[node.func.attr]) for word in _words(extra, named))


def _words(value: ast.expr, named: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(value):
        if isinstance(node, ast.Name) and node.id in named:
            yield named[node.id]
        elif isinstance(node, ast.Dict):
            for key, word in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "action" and isinstance(word, ast.Constant):
                    yield str(word.value)


def _exits() -> Iterator[Table]:
    codes = sorted((code, name) for name, code in vars(daemon).items() if name.startswith("EX_"))
    yield Table("", ("code", "name", "when"), [(str(code), f"`{name}`") for code, name in codes])


def _results(name: str) -> dict[str, typing.Any]:
    found: dict[str, typing.Any] = json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))
    return found


def _fuzz() -> Iterator[Table]:
    found = _results("fuzz.json")
    numbers = ("inputs", "crashes", "edges", "peak_mib", "seconds")
    rows = [(f"`{target}`", *(f"{row[name]:,}" for name in numbers)) for target, row in found.items()]
    yield Table("", ("target", "inputs", "crashes", "edges", "peak MiB", "s", "what it is"), rows)


def _rounds() -> Iterator[Table]:
    """What a round costs that trains nothing: bare bytes, fedpipe, and its peers."""
    found, rows = _results("rounds.json"), []
    for name, part in found.items():
        if "rounds_s" not in part:
            continue
        cpu, phases, peaks = part.get("cpu_s", ""), part.get("phases", {}), part.get("peak_bytes", {})
        spent = sum(cpu.values()) if isinstance(cpu, dict) else cpu
        cells = (f"{phases[key]:.2f}" if key in phases else "" for key in ("down", "up", "fold"))
        peak = ", ".join(f"{who} {n / 2**20:.0f}" for who, n in peaks.items())
        above = f"{part['peak_over_payload']:.1f}" if "peak_over_payload" in part else ""
        shown = f"{fmean(part['rounds_s']):.2f}", *cells, f"{spent:.2f}" if spent else ""
        rows.append((f"`{name}`", *shown, peak, above, f"{part['load']:.1f}"))
    head = ("", "round, s", "down", "up", "fold", "CPU s")
    yield Table(
        "", (*head, "peak resident, MiB", "coordinator's peak over idle, payloads", "load before"), rows, n_kept=0
    )


def _rounds_summary() -> Iterator[Table]:
    told = {key: value for key, value in _results("rounds.json")["summary"].items() if value is not None}
    yield Table("", ("figure", "seen", "goal"), [(f"`{key}`", f"{value:.2f}") for key, value in told.items()])


def _by_number(found: dict[str, typing.Any]) -> list[tuple[str, typing.Any]]:
    return sorted(found.items(), key=lambda item: int(item[0]))


def _scale_rounds(part: str) -> Iterator[Table]:
    """Rounds of a growing fleet: seconds, processor seconds of each part, memory."""
    rows = []
    for n, run in _by_number(_results("scale.json")[part]):
        cpu, peak = run["cpu_s"], run["peak_bytes"]
        seconds = (f"{run['round_s']:.1f}", *(f"{run['phases'][name]:.1f}" for name in ("down", "up", "fold")))
        spent = (f"{cpu['coordinator']:.2f}", f"{cpu['broker']:.2f}", f"{cpu['agent']:.2f}")
        rows.append(
            (
                n,
                *seconds,
                *spent,
                f"{run['peak_over_payload']:.1f}",
                f"{peak['broker'] / 2**20:.0f}",
                f"{run['load']:g}",
            )
        )
    head = ("agents", "round, s", "down", "up", "fold", "CPU s: coordinator", "broker", "agents")
    yield Table("", (*head, "coordinator's peak over idle, payloads", "broker's peak, MiB", "load"), rows, n_kept=0)


def _scale_control() -> Iterator[Table]:
    """The control plane, one column for each size of the fleet."""
    runs = _by_number(_results("scale.json")["control"])
    spent = {
        f"{who}'s cores, {doing}": lambda run, who=who, doing=doing: f"{run[doing]['cores'][who]:.3f}"
        for doing in ("idle", "training")
        for who in ("coordinator", "broker")
    }
    mib = {
        f"{who}'s peak, MiB": lambda run, who=who: f"{run['peak_bytes'][who] / 2**20:.0f}"
        for who in ("coordinator", "broker")
    }
    told: dict[str, Callable[[typing.Any], str]] = {
        "all are known to the coordinator, s": lambda run: f"{run['joined_s']:.1f}",
        "all are surveyed and asked to train, s": lambda run: f"{run['survey_s']:.1f}",
        "plan to ACCEPTED, median and last, s": lambda run: " and ".join(f"{s:.2f}" for s in run["accepted_s"]),
        "all are free again after a cancel, s": lambda run: f"{run['cancelled_s']:.1f}",
        "messages a second, idle": lambda run: f"{run['idle']['messages_per_s']['received']:.0f}",
        "messages a second, training": lambda run: f"{run['training']['messages_per_s']['received']:.0f}",
        **spent,
        **mib,
        "GET /v1/fleet, full and brief, s": lambda run: " and ".join(
            f"{run['view_s'][k]:.2f}" for k in ("full", "brief")
        ),
        "after a kill -9 of the coordinator, s": lambda run: f"{run['back_s']['coordinator']:.0f}",
        "after a kill -9 of the broker, s": lambda run: f"{run['back_s']['broker']:.0f}",
        "messages that the broker dropped": lambda run: str(run["n_dropped"]),
        "load of the machine before": lambda run: f"{run['load']:g}",
    }
    rows = [(what, *(tell(run) for _, run in runs)) for what, tell in told.items()]
    yield Table("", ("", *(f"{int(n):,} agents" for n, _ in runs)), rows, n_kept=0)


def _scale_exponents() -> Iterator[Table]:
    found = _results("scale.json")["exponents"]
    rows = [(name, ", ".join(f"{line} {value:.2f}" for line, value in lines.items())) for name, lines in found.items()]
    yield Table("", ("what grows", "exponent of the processor time", "what it says"), rows)


PARTS: Final[dict[str, Callable[[], Iterator[Table]]]] = {
    "topics": _topics,
    "messages": _messages,
    "values": _values,
    "headers": _headers,
    "states": _states,
    "limits": _limits,
    "map": _map,
    "actions": _actions,
    "exits": _exits,
    "fuzz": _fuzz,
    "rounds": _rounds,
    "rounds_summary": _rounds_summary,
    "scale_rounds": partial(_scale_rounds, "agents"),
    "scale_heavy": partial(_scale_rounds, "heavy"),
    "scale_control": _scale_control,
    "scale_exponents": _scale_exponents,
}


def main() -> None:
    """Redraw every page in place and say what is left to write."""
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = drawn(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{name}: drawn anew")
        for line in after.splitlines():
            if f" {UNKNOWN} |" in line:
                print(textwrap.shorten(f"{name}: not written yet: {line}", 120))


if __name__ == "__main__":
    main()
