"""The registration office: who is given a certificate, who is refused, and what everybody else must hear of it.

    token    -> enrol (any number of times, same key: same answer) -> pending | accepted
    operator -> accept | reject | revoke
    agent    -> renew, with the signature of the key that it has

Everything is a function of the registry and the time that is handed in.  Whoever is refused reads why, in words that help a person
who is allowed in and tell nothing to one who is not: an unknown token and a wrong secret get the same answer.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from coordinator.audit import Audit
from coordinator.trust.authority import DAY_S, Authority, requested_key
from coordinator.trust.keyring import Keyring
from coordinator.trust.registry import Certificate, Enrolment, JoinToken, Registry, Standing, Use
from protocol import keys
from protocol.enrolment import Enrol, Enrolled, Renew, Token, new_token, parse_token
from protocol.errors import BadConfig, OutsideFault
from protocol.topics import ID_RULE, is_id

REGISTRY_FILE: Final = "registry.sqlite"
MAX_USES: Final = 100_000
MAX_TTL_S: Final = 365 * DAY_S

_STANDS: Final = frozenset({Standing.PENDING, Standing.ACCEPTED})

logger = logging.getLogger(__name__)


class Refused(OutsideFault):
    """A request that is not granted; `status` is HTTP's."""

    def __init__(self, text: str, status: int = 403) -> None:
        super().__init__(text)
        self.status = status


class Office:
    """One fleet's.  `life_s` is how long an agent's certificate lasts.  Blocks for a commit; any thread may call it.

    Operators' acts are written down by who lets them in; what a token does is written to `audit`, where there is one.
    """

    def __init__(
        self, folder: Path, fleet: str, broker_url: str, life_s: float = 90 * DAY_S, audit: Audit | None = None
    ) -> None:
        self.folder, self.fleet, self._broker_url, self._life_s = folder, fleet, broker_url, life_s
        self._audit = audit
        self.authority, self.keyring = Authority.load(folder), Keyring.load(folder)
        self.registry = Registry(folder / REGISTRY_FILE)

    # -------------------------------------------------------------------------------------------------- for operators

    def make_token(self, agent: str, uses: int, ttl_s: float, *, auto_accept: bool, now: float) -> Token:
        """A new join token.  Raises BadConfig for one that could not be used."""
        if agent and not is_id(agent):
            raise BadConfig(f"agent {agent[:80]!r}: use {ID_RULE}")
        if not 1 <= uses <= (1 if agent else MAX_USES):
            raise BadConfig(
                "a token for one agent has one use" if agent else f"a token has between 1 and {MAX_USES} uses"
            )
        if not 0 < ttl_s <= MAX_TTL_S:
            raise BadConfig("a token lasts for at least a moment and at most a year")
        token = new_token(self.authority.fingerprint)
        with self.registry.change():
            self.registry.add_token(
                JoinToken(token.id, _secret_digest(token.secret), agent, uses, auto_accept, now, now + ttl_s)
            )
        return token

    def enrolments(self) -> list[Enrolment]:
        """All, by name."""
        return self.registry.enrolments()

    def barred(self) -> frozenset[str]:
        """Agents that asked once and are not accepted now: nothing of theirs counts."""
        return frozenset(e.agent for e in self.registry.enrolments() if e.state is not Standing.ACCEPTED)

    def accept(self, agent: str, reason: str, now: float) -> Enrolment:
        """Let a pending agent in; one that is in stays in."""
        with self.registry.change():
            known = self._known(agent)
            if known.state is not Standing.ACCEPTED:
                self._decide(known, Standing.ACCEPTED, reason, now)
                self._issue(agent, known.csr, now)
        return self._known(agent)

    def reject(self, agent: str, reason: str, now: float) -> Enrolment:
        """Send a pending agent away."""
        with self.registry.change():
            self._end(agent, Standing.REJECTED, reason, now)
        return self._known(agent)

    def revoke(self, agent: str, reason: str, now: float) -> Enrolment:
        """Take every certificate of an agent back."""
        with self.registry.change():
            self._end(agent, Standing.REVOKED, reason, now)
        return self._known(agent)

    def revocations(self, now: float) -> bytes:
        """The list for brokers, as PEM."""
        return self.authority.revocations(self.registry.revoked(), now)

    def _end(self, agent: str, to: Standing, reason: str, now: float) -> None:
        known = self._known(agent)
        if known.state is not to:
            self._decide(known, to, reason, now)
            self.registry.revoke_certificates(agent, now)

    def _decide(self, known: Enrolment, to: Standing, reason: str, now: float) -> None:
        allowed = {Standing.ACCEPTED: Standing.PENDING, Standing.REJECTED: Standing.PENDING}
        if known.state is not allowed.get(to, Standing.ACCEPTED):
            raise Refused(f"{known.agent} is {known.state}, so it cannot become {to}: see `fedpipe enrolments`", 409)
        self.registry.decide(known.agent, to, reason[:2000], now)
        logger.info("enrolment", extra={"action": "enrolment", "agent": known.agent, "state": str(to)})

    def _known(self, agent: str) -> Enrolment:
        found = self.registry.enrolment(agent)
        if found is None:
            raise Refused(f"nobody asked to be enrolled as {agent[:80]!r}: `fedpipe enrolments` lists who did", 404)
        return found

    # ---------------------------------------------------------------------------------------------------- for servers

    def enrol(self, asked: Enrol, address: str, now: float) -> Enrolled:
        """Judge a request.  Raises Refused, or BadConfig for a request that is malformed."""
        token, key = parse_token(asked.token), keys.public_digest(requested_key(asked.csr))
        with ExitStack() as written, self.registry.change():  # how it came out is written once it is committed
            known = self.registry.token(token.id)
            expected = known.secret_sha256 if known else "0" * 64
            if not hmac.compare_digest(expected, _secret_digest(token.secret)) or known is None:
                raise Refused("this join token is not valid here: make one with `fedpipe token`")
            agent = known.agent or asked.agent
            if asked.agent not in {"", agent}:
                raise Refused(f"this join token is for {agent} only: leave --agent out, or make another token")
            if not is_id(agent):
                raise BadConfig(f"name the agent with --agent: {ID_RULE}")
            if not self._has_used(known, key, agent, now):
                self._check_free(known, agent, key)
                if self._audit:
                    written.enter_context(self._audit.act(f"token:{known.id}", "enrol", f"{agent} {key}", address))
                self.registry.use(Use(known.id, key, agent, now))
                self._ask(known, agent, key, asked.csr, address, now)
            return self._answer(agent, key)

    def _has_used(self, token: JoinToken, key: str, agent: str, now: float) -> bool:
        """Whether this key came with this token before; the answer is then the same as it was."""
        before = self.registry.used_by(token.id, key)
        if before:
            if before != agent:
                raise Refused(f"this key asked to be {before} before: use another folder for {agent}")
            return True
        if now >= token.expires_at:
            raise Refused("this join token has expired: make another with `fedpipe token`")
        n_uses, users = self.registry.users(token.id)
        if n_uses >= token.uses:
            extra = {"action": "token_replayed", "agent": agent, "used_by": ", ".join(users)}
            logger.warning("a used join token came again", extra=extra)
            raise Refused(f"this join token was used already, by {extra['used_by']}: make another with `fedpipe token`")
        return False

    def _check_free(self, token: JoinToken, agent: str, key: str) -> None:
        known = self.registry.enrolment(agent)
        if known and known.state in _STANDS and known.key != key and not token.agent:
            raise Refused(
                f"there is an agent {agent} already, {known.state}: choose another --agent; "
                f"if it is the same server, make a token for it: `fedpipe token --agent {agent}`",
                409,
            )

    def _ask(self, token: JoinToken, agent: str, key: str, csr: str, address: str, now: float) -> None:
        known = self.registry.enrolment(agent)
        if known and known.state in _STANDS:
            if known.key == key:
                return
            ended = Standing.REJECTED if known.state is Standing.PENDING else Standing.REVOKED
            self._end(agent, ended, "enrolled anew", now)
        self.registry.ask(agent, key, csr, address, now)
        # who was sent away comes back by a token that names it, or by a person's word
        if token.auto_accept and (known is None or token.agent):
            self._decide(self._known(agent), Standing.ACCEPTED, "", now)
            self._issue(agent, csr, now)
        else:
            logger.info("enrolment", extra={"action": "enrolment", "agent": agent, "state": "pending"})

    def _answer(self, agent: str, key: str) -> Enrolled:
        known = self._known(agent)
        if known.key != key or known.state in {Standing.REJECTED, Standing.REVOKED}:
            why = f": {known.reason}" if known.reason and known.key == key else ""
            raise Refused(f"the enrolment of {agent} was {known.state}{why}: ask the coordinator's operator")
        if known.state is Standing.PENDING:
            return Enrolled(agent=agent, state="pending")
        issued = self.registry.certificate_of(agent, key)
        assert issued is not None, f"{agent} is accepted and has no certificate"
        return self._enrolled(issued)

    def renew(self, asked: Renew, now: float) -> Enrolled:
        """A certificate for an agent's next key.  Raises Refused, or BadConfig for a request that is malformed."""
        present = keys.load_certificate(asked.certificate.encode(), "the request")
        key = keys.public_digest(requested_key(asked.csr))
        known = self.registry.certificate(present.serial_number)
        if known is None or not self.authority.is_trusted(present):
            raise Refused("the present certificate is not of this fleet: enrol again with a new token")
        if not keys.is_renewal(present, asked.csr, bytes.fromhex(asked.signature)):
            raise Refused("the request is not signed by the key of the present certificate")
        with self.registry.change():
            state = self._known(known.agent).state
            known = self.registry.certificate(present.serial_number)
            assert known is not None
            if known.revoked_at or state is not Standing.ACCEPTED:
                raise Refused(f"{known.agent} is revoked: ask the coordinator's operator for a new token")
            if now >= known.expires_at:
                raise Refused(f"the present certificate of {known.agent} has expired: enrol again with a new token")
            issued = self.registry.certificate_of(known.agent, key) or self._issue(known.agent, asked.csr, now)
        return self._enrolled(issued)

    def _issue(self, agent: str, csr: str, now: float) -> Certificate:
        key = requested_key(csr)
        made = self.authority.client(key, agent, now, self._life_s)
        ends_at = made.not_valid_after_utc.timestamp()
        issued = Certificate(made.serial_number, agent, keys.public_digest(key), keys.pem(made), now, ends_at, 0.0)
        self.registry.add_certificate(issued)
        logger.info(
            "certificate issued", extra={"action": "certificate", "agent": agent, "serial": f"{issued.serial:x}"}
        )
        return issued

    def _enrolled(self, issued: Certificate) -> Enrolled:
        return Enrolled(
            agent=issued.agent,
            state="accepted",
            fleet=self.fleet,
            broker_url=self._broker_url,
            certificate=issued.pem + self.authority.link,
            authority=self.authority.pem + self.authority.link,
            signing_keys=self.keyring.chain,
        )


def create(folder: Path, fleet: str, now: float) -> Authority:
    """Everything that a new fleet's trust needs, in `folder`.  Raises BadConfig when it is there already."""
    authority = Authority.create(folder, fleet, now)
    Keyring.create(folder)
    return authority


def _secret_digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
