"""Real text without a download: what the Python packages on this machine say about themselves.

Every documented function is a small exercise that somebody wrote for people, not for us: from the signature, say in one
sentence what it does.

    class Adam:                                                   prompt: source text, up to the opening quotes
        def step(self, closure=None):
            \"\"\"Perform a single optimization step.               completion: the docstring's first sentence

Each package speaks a dialect (tensors, tokens, integrals), so one package per agent is a federation as it is found in life:
same task, different words, and nobody may show the text to the others.  The standard library is the public text that the
base model of the demo is made from (fedpipe/pretrain.py).

Packages are found and parsed, never imported: reading costs about 0.2 s of CPU per megabyte of source and runs none of it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from protocol.errors import BadConfig

STDLIB: Final = "stdlib"
"""Name under which `mine` reads the standard library."""

PREFERRED: Final = ("torch", "transformers", "sympy")
"""The first three agents: every installation of the demo has them, and their dialects are far apart."""

OURS: Final = frozenset({"agent", "coordinator", "protocol", "fedpipe"})
SKIPPED_FOLDERS: Final = frozenset(
    {"test", "tests", "_vendor", "vendored", "site-packages", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
)
MIN_SOURCE_BYTES: Final = 1_000_000
MIN_PAIRS: Final = 400
MAX_PROMPT_CHARS: Final = 200
MIN_COMPLETION_CHARS, MAX_COMPLETION_CHARS = 20, 120
MIN_WORDS: Final = 4

Progress = Callable[[int, int], None]
Function = ast.FunctionDef | ast.AsyncFunctionDef

_MARKUP = re.compile(
    r"\[(?P<link>[^\]]*)\]\([^)]*\)"  # Markdown
    r"|(?<!\w)\[(?P<tilde>~?)(?P<name>[A-Za-z_][\w.]*)\]"  # transformers' references
    r"|(?::[\w:.+-]+:)?``?(?P<short>~?)\.?(?P<code>[^`<]*?)\s*(?:<[^`]*>)?``?"  # reStructuredText
    r"|\*{1,2}(?P<strong>[\w.]+)\*{1,2}"
)
_SENTENCE = re.compile(r"(?<=[a-z0-9)\"'])(?<!\bi\.e)(?<!\be\.g)(?<!\betc)(?<!\bvs)\.(?=\s|$)")
_NOISE = re.compile(
    r">>>|\.\. |https?:|@|\||---|todo|fixme|xxx|^\w+ \([^)]*\)\s?:|, optional|^\W"
    r"|^(see|alias|same as|deprecated|copied|test)\b|^(args|arguments|parameters|params|returns?|yields|notes?|examples?)\s?[:-]",
    re.IGNORECASE,
)


class Pair(NamedTuple):
    """One exercise: source text up to the docstring's opening quotes, and the docstring's first sentence."""

    prompt: str
    completion: str


def mine(package: str, limit: int | None = None, progress: Progress | None = None, *, seed: int = 0) -> list[Pair]:
    """Return up to `limit` pairs of an installed package, or of the standard library (`STDLIB`).

    No prompt and no completion occurs twice, letter case aside.  Files are read in an order drawn from `seed`, so a limit
    takes a fair sample and not the first folders; the same sources, limit and seed give the same pairs.  `progress` hears
    (files read, files).  Raises BadConfig when the package is not installed as Python source.
    """
    root = _folder(package)
    files = [f for f in sorted(root.rglob("*.py")) if SKIPPED_FOLDERS.isdisjoint(f.relative_to(root).parts[:-1])]
    random.Random(f"{package} {seed}").shuffle(files)
    pairs: list[Pair] = []
    seen: set[str] = set()
    for i, file in enumerate(files):
        for pair in _pairs(file):
            keys = {pair.prompt.casefold(), pair.completion.casefold()}
            if seen.isdisjoint(keys):
                seen |= keys
                pairs.append(pair)
        if progress is not None:
            progress(i + 1, len(files))
        if limit is not None and len(pairs) >= limit:
            break
    return pairs[:limit]


def packages() -> list[str]:
    """Return the installed packages that can feed an agent: the preferred ones, then by size of their Python source.

    Sizes are read from the installers' records, so this opens no source file (about 0.3 s).
    """
    size: Counter[str] = Counter()
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.suffix == ".py" and len(file.parts) > 1 and SKIPPED_FOLDERS.isdisjoint(file.parts):
                size[file.parts[0]] += file.size or 0
    large = {p for p, n in size.items() if n >= MIN_SOURCE_BYTES and p.isidentifier() and p not in OURS}
    return sorted(large, key=lambda p: (PREFERRED.index(p) if p in PREFERRED else len(PREFERRED), -size[p], p))


def shards(n: int, *, limit: int = 3000, seed: int = 0, progress: Progress | None = None) -> dict[str, list[Pair]]:
    """Return the private texts of `n` agents by agent id, one package each, at most `limit` pairs each.

    No completion is held by two agents.  With more agents than packages the packages are dealt out, card by card, to
    several agents.  `progress` hears (packages read, packages wanted).  Raises BadConfig when nothing usable is installed.
    """
    found: dict[str, list[Pair]] = {}
    seen: set[str] = set()
    candidates = packages()
    n_each = limit * -(-n // max(1, len(candidates)))
    for package in candidates:
        if len(found) == n:
            break
        pairs = [p for p in mine(package, n_each, seed=seed) if p.completion.casefold() not in seen]
        if len(pairs) >= MIN_PAIRS:
            found[package] = pairs
            seen |= {p.completion.casefold() for p in pairs}
            if progress is not None:
                progress(len(found), n)
    if not found:
        raise BadConfig("no installed package holds enough documented source: install the extra fedpipe[demo]")
    return {agent: pairs[:limit] for agent, pairs in _deal(found, n)}


def write_jsonl(pairs: Iterable[Pair], path: Path) -> None:
    """Write one {"prompt", "completion"} object per line, the shape that agents read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(pair._asdict(), ensure_ascii=False) for pair in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _deal(found: dict[str, list[Pair]], n: int) -> Iterator[tuple[str, list[Pair]]]:
    """Deal each package's pairs to its agents: `torch`, `torch-2`, ... where there are fewer packages than agents."""
    names = list(found)
    for i in range(n):
        name, hand = names[i % len(names)], i // len(names)
        n_hands = len(range(i % len(names), n, len(names)))
        agent = name.lower().replace("_", "-").strip("-")
        yield (f"{agent}-{hand + 1}" if hand else agent), found[name][hand::n_hands]


def _folder(package: str) -> Path:
    if package == STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BadConfig(f"{package!r} is not an installed Python package: install it or name another one")
    return Path(next(iter(spec.submodule_search_locations)))


def _pairs(file: Path) -> Iterator[Pair]:
    """Yield the usable pairs of one source file, in source order; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    for node, owner in _documented(tree.body, ""):
        completion = _sentence(ast.get_docstring(node, clean=False) or "", node.name)
        prompt = _prompt(node, owner) if completion else ""
        if prompt:
            yield Pair(prompt, completion)


def _documented(body: list[ast.stmt], owner: str) -> Iterator[tuple[ast.ClassDef | Function, str]]:
    """Yield the classes, functions and methods of a body, not those inside functions, each with its class's name."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node, ""
            yield from _documented(node.body, node.name)
        elif isinstance(node, Function):
            yield node, owner
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _documented(node.body, owner)


def _prompt(node: ast.ClassDef | Function, owner: str) -> str:
    """Return the signature as source text up to the docstring's opening quotes, or '' when it is too long."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    else:
        head = _signature(node, "def" if isinstance(node, ast.FunctionDef) else "async def")
    indent = "    " if owner else ""
    text = f'class {owner}:\n{indent}{head}\n{indent}    """' if owner else f'{head}\n    """'
    return text if len(text) <= MAX_PROMPT_CHARS else ""


def _signature(node: Function, keyword: str) -> str:
    """Return the whole signature, or without annotations and defaults where it would be long."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"
    if len(whole) <= MAX_PROMPT_CHARS // 2:
        return whole
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args)]
    names += [f"*{a.vararg.arg}"] if a.vararg else ["*"] if a.kwonlyargs else []
    names += [x.arg for x in a.kwonlyargs] + ([f"**{a.kwarg.arg}"] if a.kwarg else [])
    return f"{keyword} {node.name}({', '.join(names)}):"


def _sentence(docstring: str, name: str) -> str:
    """Return the first sentence of a docstring without markup, or '' when it says nothing worth learning."""
    paragraphs = [" ".join(p.split()) for p in inspect.cleandoc(docstring).split("\n\n")]
    if len(paragraphs) > 1 and re.match(rf"[\w.]*{re.escape(name)}\s*\(", paragraphs[0]):
        del paragraphs[0]  # numpy repeats the signature there
    first = (paragraphs[0] if paragraphs else "").replace("[`", "`").replace("`]", "`")
    text = _MARKUP.sub(_plain, first)
    text = _SENTENCE.split(text, maxsplit=1)[0].strip().rstrip(".:") + "."
    fits = MIN_COMPLETION_CHARS <= len(text) <= MAX_COMPLETION_CHARS and len(text.split()) >= MIN_WORDS
    letters = sum(c.isalpha() or c == " " for c in text) / max(1, len(text))
    return text if fits and text.isascii() and letters > 0.8 and not _NOISE.search(text) else ""


def _plain(found: re.Match[str]) -> str:
    """Return what a reader sees of a piece of markup; `~a.b.C` is shown as C."""
    part = found.groupdict()
    text = part["link"] or part["name"] or part["code"] or part["strong"] or ""
    return text.rpartition(".")[2] if part["tilde"] or part["short"] else text
