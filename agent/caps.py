"""The caps and hours that this server's owner sets for bulk, in force: what may move, and what is told of it.

Control messages are never held back, so a server outside its hours is there, says so, and keeps what it has until they begin.
"""

from __future__ import annotations

import msgspec

from agent.limits import Limits
from protocol.messages import Report
from protocol.pacing import Pace


class Caps:
    """Pace of both directions under `limits`; `minute` is one of the local day."""

    def __init__(self, limits: Limits, minute: int) -> None:
        self.up, self.down = Pace(), Pace()
        self.renew(limits, minute)

    def renew(self, limits: Limits, minute: int) -> bool:
        """Other limits, or another minute; says whether bulk may flow now and might not before, or the other way round."""
        was_open, self._limits = self.up.is_open, limits
        is_open = limits.may_transfer(minute)
        self.up.renew(limits.up_bytes_per_s, is_open=is_open)
        self.down.renew(limits.down_bytes_per_s, is_open=is_open)
        return is_open != was_open

    @property
    def is_open(self) -> bool:
        """Whether bulk may flow now."""
        return self.up.is_open

    @property
    def reason(self) -> str:
        """Why it may not; empty while it may."""
        return "" if self.is_open else f"updates and models move at {', '.join(self._limits.transfer_hours)} only"

    def capped_up(self, bytes_per_s: float) -> float:
        """What is to be expected of an uplink that carried so much; 0 is not known."""
        return _capped(bytes_per_s, self._limits.up_bytes_per_s)

    def applied(self, report: Report) -> Report:
        """The report with the link as it may be used, which is what the planner has to know."""
        return msgspec.structs.replace(
            report,
            up_bytes_per_s=self.capped_up(report.up_bytes_per_s),
            down_bytes_per_s=_capped(report.down_bytes_per_s, self._limits.down_bytes_per_s),
            notes=([self.reason] if self.reason else []) + report.notes[:15],
        )


def _capped(measured: float, cap: float) -> float:
    """What is to be expected of a link; 0 is not measured, or no cap."""
    return min(measured, cap) if measured and cap else measured or cap
