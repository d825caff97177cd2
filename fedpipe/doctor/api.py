"""The coordinator as an operator or an agent sees it over HTTP: reachable, the same version, at work; and the two clocks."""

from __future__ import annotations

import email.utils
import http.client
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from fedpipe.doctor.findings import Finding, failed, objected, ok, warning
from protocol import SOFTWARE
from protocol.errors import OutsideFault

if TYPE_CHECKING:
    from coordinator.views import FleetView

CHECKS: Final = ("api", "version", "fleet", "clock")
PATIENCE_S: Final = 10.0
SKEWED_S: Final = 30.0
"""Deadlines are the coordinator's, so agents stand this much; certificates are dated back by an hour."""
WRONG_S: Final = 3600.0


def coordinator(url: str, token_file: Path | None, ca_file: Path | None = None) -> Iterator[Finding]:
    """The findings of CHECKS."""
    from fedpipe.client import Coordinator

    with Coordinator(url, token_file, ca_file) as found:
        asked_at = time.time()
        try:
            fleet = found.fleet()
        except OutsideFault as error:
            yield objected("api", error)
            return
        answered_at = time.time()
        yield ok("api", f"{url} answers after {1000 * (answered_at - asked_at):.0f} ms")
        yield _version(found.software())
    yield judged(fleet)
    yield skew(fleet.now - (asked_at + answered_at) / 2)


def _version(software: str) -> Finding:
    if software != SOFTWARE:
        return warning(
            "version", f"the coordinator is {software}, this is {SOFTWARE}", "install the same version on both"
        )
    return ok("version", software)


def judged(fleet: FleetView) -> Finding:
    """Finding fleet: its broker, its disk, who is there."""
    there = [one for one in fleet.agents if one.online]
    text = f"{len(there)} of {len(fleet.agents)} agents are online, {len(fleet.jobs)} jobs"
    if not fleet.broker.connected:
        return objected("fleet", fleet.broker.fault or f"the coordinator has no connection to {fleet.broker.address}")
    if fleet.disk != "ok":
        return objected("fleet", fleet.disk_reason or f"the coordinator's disk is {fleet.disk}")
    if fleet.agents and not there:
        return failed("fleet", text, "on one of them: fedpipe doctor agent")
    if gone := sorted({one.id for one in fleet.agents} - {one.id for one in there}):
        return warning("fleet", f"{text}; missing: {', '.join(gone[:10])}", f"on {gone[0]}: fedpipe doctor agent")
    return ok("fleet", text)


def skew(ahead_s: float) -> Finding:
    """Finding clock, from how far the coordinator's clock is ahead of ours (seconds)."""
    text = f"the coordinator's clock is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this one"
    advice = "see that NTP runs on both: timedatectl"
    if abs(ahead_s) > WRONG_S:
        return failed("clock", text, advice)
    return warning("clock", text, advice) if abs(ahead_s) > SKEWED_S else ok("clock", text)


def desk(url: str, authority: Path) -> Iterator[Finding]:
    """Findings enrolment and clock: where an enrolled agent renews its certificate, and what time it is there."""
    from protocol.enrolment import KEYS

    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=str(authority))
    link = http.client.HTTPSConnection(parts.hostname or "", parts.port or 8443, timeout=PATIENCE_S, context=context)
    try:
        asked_at = time.time()
        link.request("GET", KEYS)
        response = link.getresponse()
        now, told = (asked_at + time.time()) / 2, response.getheader("date", "")
    except (OSError, http.client.HTTPException) as error:
        advice = "open its port to this server: the certificate is renewed there, and ends otherwise"
        yield failed("enrolment", f"{url} does not answer ({error})", advice)
        return
    finally:
        link.close()
    yield ok("enrolment", f"{url} answers: the certificate can be renewed")
    if told:
        # The header has whole seconds, cut off.
        yield skew(email.utils.parsedate_to_datetime(told).timestamp() + 0.5 - now)
