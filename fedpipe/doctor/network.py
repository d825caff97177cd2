"""The way to the broker, step by step: its name, its port, its certificate, and our own."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedpipe.doctor.findings import Finding, failed, objected, ok, skipped, warning
from protocol import keys
from protocol.bus import Address, BrokerConfig, mqtt_bus, parse_url
from protocol.mqtt_reasons import obstacle

CHECKS: Final = ("broker", "dns", "tcp", "tls")
PATIENCE_S: Final = 5.0
DAY_S: Final = 86_400.0
SOON_S: Final = 14 * DAY_S

_HOST_MISMATCH: Final = frozenset({62, 64})
"""X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH of OpenSSL's x509_vfy.h; 10 is CERT_HAS_EXPIRED, 9 NOT_YET_VALID."""
_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9


def way(config: BrokerConfig) -> Iterator[Finding]:
    """The findings of CHECKS; the first that fails ends it.  Raises BadConfig for what could never connect."""
    address = parse_url(config.url)
    mqtt_bus(config, "doctor", lambda: None)  # reads every file that is named
    yield ok("broker", f"{'mqtts' if address.tls else 'mqtt'}://{address}")
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield objected("dns", obstacle(error, address))
        return
    places = sorted({str(one[4][0]) for one in found})
    yield ok("dns", f"{address.host} is {', '.join(places)}")
    began_s = time.monotonic()
    try:
        link = socket.create_connection((address.host, address.port), PATIENCE_S)
    except OSError as error:
        yield objected("tcp", obstacle(error, address))
        return
    with link:
        yield ok("tcp", f"{address} answers after {1000 * (time.monotonic() - began_s):.1f} ms")
        if address.tls:
            yield _tls(link, address, config)
        elif all(ipaddress.ip_address(place.partition("%")[0]).is_loopback for place in places):
            yield skipped("tls", "a plain connection, on this machine only")
        else:
            yield warning(
                "tls",
                "the connection is not encrypted: whoever is on the network between can read and change it",
                "write mqtts:// in broker.url; `fedpipe mosquitto-config` makes such a broker",
            )


def _tls(link: socket.socket, address: Address, config: BrokerConfig) -> Finding:
    context = ssl.create_default_context(cafile=config.ca_file or None)
    if config.cert_file:
        context.load_cert_chain(config.cert_file, config.key_file or None)
    try:
        with context.wrap_socket(link, server_hostname=address.host) as secured:
            version, peer = secured.version(), secured.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        return _distrusted(error, address)
    except OSError as error:
        return objected("tls", obstacle(error, address))
    left_s = ssl.cert_time_to_seconds(str(peer["notAfter"])) - time.time()
    text = f"{version}, a trusted certificate for {address.host}, valid for {left_s / DAY_S:.0f} days"
    if left_s < SOON_S:
        return warning("tls", text, "renew the broker's certificate: every agent refuses it from then on")
    return ok("tls", text)


def _distrusted(error: ssl.SSLCertVerificationError, address: Address) -> Finding:
    match error.verify_code:
        case code if code in _HOST_MISMATCH:
            advice = "write in broker.url a name that stands in it, or have it made for this one"
            return failed("tls", f"the certificate of {address} is for another host name", advice)
        case code if code == _EXPIRED:
            return failed("tls", f"the certificate of {address} has expired", "renew it at the broker")
        case code if code == _NOT_YET_VALID:
            return failed(
                "tls", f"the certificate of {address} is not valid yet", "set this machine's clock, or the broker's"
            )
    found = f"the certificate of {address} is not by an authority that is trusted here ({error.verify_message})"
    return failed("tls", found, "set broker.ca_file to the authority that issued it")


def own_certificate(file: str, name: str) -> Iterator[Finding]:
    """Finding certificate: what the broker will see of us; `name` is the common name it must carry, empty for any."""
    if not file:
        yield skipped("certificate", "none is configured")
        return
    certificate = keys.load_certificate(keys.read(Path(file)), file)
    ends, begins, now = certificate.not_valid_after_utc, certificate.not_valid_before_utc, datetime.now(UTC)
    left_s = (ends - now).total_seconds()
    again = "`fedpipe enrol --again` with a new token, and see why it was not renewed (renewal_failed in the log)"
    if left_s <= 0:
        yield failed("certificate", f"{file} has expired on {ends:%Y-%m-%d}", again)
    elif now < begins:
        yield failed("certificate", f"{file} is valid from {begins:%Y-%m-%d %H:%M} UTC on", "set this machine's clock")
    elif name and (carried := keys.common_name(certificate)) != name:
        yield failed(
            "certificate", f"{file} is of {carried!r}, not of {name!r}", "correct broker.cert_file, or enrol again"
        )
    elif left_s < (ends - begins).total_seconds() / 6:
        yield warning("certificate", f"{file} is valid for {left_s / DAY_S:.0f} days more and was not renewed", again)
    else:
        yield ok("certificate", f"{file} is valid for {left_s / DAY_S:.0f} days")
