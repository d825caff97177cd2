"""Code from other distributions: entry points, and only those that this side's own configuration names.

A name that arrived over the wire picks among what is built in and what the operator allowed; it never becomes an import
path.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from functools import cache
from importlib.metadata import entry_points

from protocol.errors import BadConfig


def load(group: str, name: str, *, allowed: Collection[str], built_in: Collection[str]) -> object:
    """What the entry point `name` of `group` refers to.  Raises BadConfig unless it is allowed here and installed."""
    known = ", ".join(sorted(built_in))
    if name not in allowed:
        raise BadConfig(
            f"{name[:64]!r} is not in {group}: it has {known}; others must be allowed by name in this config"
        )
    return _installed(group, name, tuple(sys.path))


@cache
def _installed(group: str, name: str, _path: tuple[str, ...]) -> object:
    """Looked up once per name and import path: to read what every installed distribution offers takes 20 ms."""
    found = entry_points(group=group, name=name)
    if len(found) != 1:
        raise BadConfig(f"{name!r} is allowed, but {len(found)} installed distributions offer it in {group}: need one")
    try:
        loaded: object = next(iter(found)).load()
    except (ImportError, AttributeError) as error:
        raise BadConfig(f"{name!r} of {group} cannot be loaded: {error}") from error
    return loaded
