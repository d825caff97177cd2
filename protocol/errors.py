"""Whose fault is it?  Two families, after h11: the outside's (reject, count, go on) and ours (crash, restart, replay)."""

from __future__ import annotations


class OutsideFault(Exception):  # noqa: N818 - the family's name says whose fault, not that it is an error
    """Something that came from outside is not usable; the message says what and what to do next."""


class BadMessage(OutsideFault):
    """Bytes from the bus that are not a valid message of this protocol.  `kind` is the word under which it is counted."""

    def __init__(self, text: str, kind: str = "bad_message") -> None:
        super().__init__(text)
        self.kind = kind


class BadUpdate(OutsideFault):
    """An uploaded update that does not fit its plan: wrong shape, name, type, size or a value that is not finite."""


class BadConfig(OutsideFault):
    """A configuration, job file or data set that cannot be used; exit code 78 (EX_CONFIG)."""


class Unavailable(OutsideFault):
    """Something needed is not there now (broker, disk, model); exit code 69 (EX_UNAVAILABLE)."""


class NotAllowed(OutsideFault):
    """Our credentials are refused for good; exit code 77 (EX_NOPERM), after which nobody starts us again."""


class IllegalMove(RuntimeError):  # noqa: N818 - named after what happened
    """A transition that the MOVES table does not hold: our own bug, raised with the story that led to it."""
