"""Takes secrets out of text that leaves this machine: what is known to be one literally, and what looks like one.

Known are the contents of the files that a configuration names for passwords and tokens, the password in its url, and what stands
in the environment under a telling name: these go wherever they stand.  Whatever else stands behind a telling name, and the user in
a url, goes from there: rather a line too much.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import unquote

GONE: Final = "[redacted]"
SHORTEST: Final = 6
"""A shorter word (true, mqtt) would be taken out of half the text; behind its own name it goes all the same."""

_NAME: Final = (
    r"[\w.-]*(?:password|passwd|passphrase|secret|token|username|credential|api[_-]?key|private[_-]?key)[\w-]*"
)
_VALUE: Final = r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[^\s,}\]]+'
_TELLING: Final = re.compile(_NAME, re.IGNORECASE)
_NAMED: Final = re.compile(rf"(?P<name>{_NAME})(?P<is>[\"']?\s*[=:]\s*)(?P<value>{_VALUE})", re.IGNORECASE)
_HARMLESS: Final = re.compile(r"(_file|_dir|tokens|token_accuracy)$|tokeniz", re.IGNORECASE)
"""Names of places, and of what a model reads."""
_FILE: Final = re.compile(rf"(?:{_NAME}_file)[\"']?\s*=\s*(\"[^\"\n]*\"|'[^'\n]*')", re.IGNORECASE)
_URL_USER: Final = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^/\s\"'<>]+)@", re.IGNORECASE)
_SHAPES: Final = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
    re.compile(r"\bfp1\.[\w.-]+"),
    re.compile(r"\b(?:hf|ghp|glpat|sk)[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"(?<=bearer )\s*[\w.~+/=-]+", re.IGNORECASE),
    re.compile(r"(?<=basic )\s*[A-Za-z0-9+/=]{8,}", re.IGNORECASE),
)


def known_secrets(configurations: Iterable[str], environment: Mapping[str, str] = os.environ) -> set[str]:
    """What must appear nowhere, from the texts of configuration files; files that cannot be read hold nothing for us."""
    found = {value for name, value in environment.items() if _TELLING.search(name) and not _HARMLESS.search(name)}
    for text in configurations:
        for named in _NAMED.finditer(text):
            if not _HARMLESS.search(named["name"]) and "username" not in named["name"].lower():
                found.add(named["value"].strip("\"'"))
        for url in _URL_USER.finditer(text):
            _, _, password = url["user"].partition(":")
            found |= {password, unquote(password)}
        for place in _FILE.findall(text):
            found |= _content(Path(place.strip("\"'")))
    found |= {word.replace("\\", "\\\\").replace('"', '\\"') for word in found}  # as they stand in JSON and TOML
    return {word for word in found if len(word) >= SHORTEST}


def _content(file: Path) -> set[str]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {text.strip(), *(line.strip() for line in text.splitlines())}


def redact(text: str, known: Iterable[str] = ()) -> str:
    """The text without secrets."""
    for word in sorted(known, key=len, reverse=True):
        text = text.replace(word, GONE)
    for shape in _SHAPES:
        text = shape.sub(GONE, text)
    text = _URL_USER.sub(rf"\g<scheme>{GONE}@", text)
    return _NAMED.sub(_without, text)


def _without(named: re.Match[str]) -> str:
    if _HARMLESS.search(named["name"]):
        return named[0]
    if not named["value"].strip("\"'"):
        return named[0]
    beside = named["value"][0] + named["is"][0]  # a bare value behind a quoted name is JSON, and stays JSON
    quote = next((character for character in beside if character in "\"'"), "")
    return f"{named['name']}{named['is']}{quote}{GONE}{quote}"
