"""A hostile client: floods every topic that it can reach with a seeded mix of what no honest agent says.

    with Hostile(port, job="e2e", seed=1) as hostile: ...
    hostile.n_sent                                     # by kind

Everything passes the broker's door: malformed bytes, other versions and types, sizes beyond the limits, deep nesting, valid
envelopes with forged contents (offers of terabytes, credit for what was never offered, words about shares of other rounds,
attempts and sessions), chunks of foreign transfers, births of thousands of agents that do not exist, names with paths in them.
It says birth as an agent of its own and answers its survey with a base that nobody else has.  What it says in the names of
others is for the broker's access control to stop: the sender of a message is its topic.
"""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from protocol import codec
from protocol.frames import encode_frame
from protocol.messages import (
    VERSION,
    Blob,
    Body,
    ExecState,
    Execution,
    Grant,
    Matrix,
    Offer,
    Plan,
    Presence,
    Progress,
    Rebirth,
    Report,
    Surveyed,
)
from protocol.topics import UP_LEAVES, Topics

NAME: Final = "mallory"
SESSION: Final = "6" * 16
LEAVES: Final = sorted(UP_LEAVES)
N_INVENTED: Final = 5000


class Hostile:
    """Floods from a thread of its own, at most `per_s` publications a second, until it is left."""

    def __init__(
        self,
        port: int,
        *,
        job: str,
        seed: int,
        victims: tuple[str, ...] = (),
        per_s: float = 2000.0,
        fleet: str = "main",
    ) -> None:
        self.n_sent: Counter[str] = Counter()
        self._topics, self._job, self._victims, self._per_s = Topics(fleet), job, victims, per_s
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._flood, name="hostile", daemon=True)
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=NAME)
        self._client.username_pw_set(NAME)
        self._client.on_message = self._told
        self._client.connect("127.0.0.1", port)

    def __enter__(self) -> Self:
        """Say birth, then flood."""
        self._client.loop_start()
        self._client.subscribe(self._topics.down(NAME, "plan"))
        self._say("state", Presence(session=SESSION, online=True, methods=["qlora"]))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()

    def _say(self, leaf: Any, body: Body, agent: str = NAME, session: str = SESSION) -> None:
        self._client.publish(self._topics.up(agent, leaf), codec.encode(body, session=session, seq=1, now=1.0), qos=1)

    def _told(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        """A plan: a survey is answered with a base of its own, a share with a lie about its end."""
        if not message.payload:
            return
        plan = codec.decode(bytes(message.payload)).b
        assert isinstance(plan, Plan)
        lie = Surveyed(base_sha256="6" * 64, matrices=[Matrix(name="x", d_out=1, d_in=1)], n_train=2**53, n_eval=0)
        self._say("exec", _word(plan.job, plan.round, plan.attempt, serial=2**53, surveyed=lie))

    def _flood(self) -> None:
        kinds: list[Callable[[], tuple[str, bytes]]] = [
            *(self._garbage, self._damaged, self._other_version, self._other_type, self._oversized, self._nested),
            *(self._birth, self._birth, self._stranger, self._forged_word, self._forged_offer, self._not_a_number),
            *(self._credit, self._chunk, self._odd_topic, self._in_their_name, self._replay),
        ]
        batch = max(1, round(self._per_s / 50))
        while not self._stop.wait(batch / self._per_s):
            for _ in range(batch):
                kind = self._random.choice(kinds)
                topic, payload = kind()
                self.n_sent[kind.__name__.lstrip("_")] += 1
                self._client.publish(topic, payload, qos=0)

    # ------------------------------------------------------------------------------------------------------- what it says

    def _own(self, leaf: str) -> str:
        return f"{self._topics.root}/a/{NAME}/up/{leaf}"

    def _any(self) -> str:
        return self._own(self._random.choice(LEAVES))

    def _packed(self, body: Body, session: str = SESSION) -> bytes:
        return codec.encode(body, session=session, seq=self._random.randrange(9), now=1.0)

    def _garbage(self) -> tuple[str, bytes]:
        return self._any(), self._random.randbytes(self._random.randrange(1, 200))

    def _damaged(self) -> tuple[str, bytes]:
        whole = bytearray(self._packed(Presence(session=SESSION, online=True)))
        whole[self._random.randrange(len(whole))] ^= 1 << self._random.randrange(8)
        kept = self._random.choice([len(whole), self._random.randrange(1, len(whole))])
        return self._own("state"), bytes(whole[:kept])

    def _other_version(self) -> tuple[str, bytes]:
        return self._any(), msgspec.msgpack.encode({"v": VERSION + 1, "b": {"t": "presence"}})

    def _other_type(self) -> tuple[str, bytes]:
        return self._any(), self._packed(Rebirth())

    def _oversized(self) -> tuple[str, bytes]:
        return self._own("report"), bytes(codec.MAX_SMALL_BYTES + 1)

    def _nested(self) -> tuple[str, bytes]:
        return self._own("exec"), b"\x82\xa1v\x01\xa1b" + b"\xdc\x4e\x20" * 2000

    def _birth(self) -> tuple[str, bytes]:
        agent = f"invented-{self._random.randrange(N_INVENTED)}"
        return self._topics.up(agent, "state"), self._packed(Presence(session=SESSION, online=True, methods=["qlora"]))

    def _stranger(self) -> tuple[str, bytes]:
        leaf = self._random.choice(LEAVES)
        words: dict[str, Body] = {"report": Report(n_cpus=2**53), "progress": Progress(job=self._job, loss=math.nan)}
        return f"{self._topics.root}/a/s{self._random.getrandbits(60)}/up/{leaf}", self._packed(
            words.get(leaf, Progress())
        )

    def _forged_word(self) -> tuple[str, bytes]:
        number, attempt = self._random.choice([0, 1, 2, 2**53]), self._random.choice([0, 1, 2**53])
        return self._own("exec"), self._packed(_word(self._job, number, attempt, serial=self._random.randrange(99)))

    def _forged_offer(self) -> tuple[str, bytes]:
        digest = self._random.choice(["0", "6", "f"]) * 64
        blob = Blob(sha256=digest, size=self._random.choice([1, 2**40]), chunk=self._random.choice([1024, 2**22]))
        offer = Offer(
            job=self._random.choice([self._job, "no-such-job"]),
            round=self._random.choice([1, 2, 2**53]),
            attempt=self._random.choice([0, 2**53]),
            kind=self._random.choice(["lora", "../../etc/passwd"]),
            blob=blob,
            samples=2**53,
            loss=math.nan,
        )
        return self._own("offer"), self._packed(offer)

    def _not_a_number(self) -> tuple[str, bytes]:
        point = {"bits": "nf4", "batch": 1, "n_tokens": math.inf, "rank": 1, "step_s": math.nan, "peak_bytes": 1}
        found = {"device": "", "probe_rank": 1, "scores": b"", "points": [point], "load_ratio": math.nan}
        body = {
            "t": "exec",
            "job": self._job,
            "round": 0,
            "attempt": 0,
            "serial": 1,
            "state": "DONE",
            "calibrated": found,
        }
        return self._own("exec"), msgspec.msgpack.encode({"v": VERSION, "ts": 1.0, "ses": SESSION, "seq": 1, "b": body})

    def _credit(self) -> tuple[str, bytes]:
        ranges = [(self._random.getrandbits(50), 4096)] * 16
        return self._own("answer"), self._packed(Grant(xfer=f"{self._random.getrandbits(128):032x}", ranges=ranges))

    def _chunk(self) -> tuple[str, bytes]:
        whole = encode_frame(self._random.getrandbits(32), bytes(1024))
        agent = self._random.choice([NAME, f"invented-{self._random.randrange(N_INVENTED)}"])
        return self._topics.up_chunk(agent, f"{self._random.getrandbits(128):032x}"), whole

    def _odd_topic(self) -> tuple[str, bytes]:
        names = ["..", "A", "a b", "-", "a" * 65, "é", "\u2028", "x" * 60_000]
        return f"{self._topics.root}/a/{self._random.choice(names)}/up/{self._random.choice([*LEAVES, '..', ''])}", b"x"

    def _in_their_name(self) -> tuple[str, bytes]:
        """Stopped by the broker, where its access control is what docs/operations.md says."""
        topics = [self._topics.coordinator_state(), self._topics.job(self._job)]
        topics += [self._topics.up(victim, "exec") for victim in self._victims]
        topics += [self._topics.down(victim, "plan") for victim in self._victims]
        return self._random.choice(topics), self._packed(Rebirth())

    def _replay(self) -> tuple[str, bytes]:
        return self._own("exec"), self._packed(_word(self._job, 1, 0, serial=1), session="5" * 16)


def _word(job: str, number: int, attempt: int, serial: int, surveyed: Surveyed | None = None) -> Execution:
    return Execution(
        job=job,
        round=number,
        attempt=attempt,
        serial=serial,
        state=ExecState.DONE,
        reason="%s\n" * 9,
        surveyed=surveyed,
    )


def access(victims: tuple[str, ...]) -> list[str]:
    """Lines of a mosquitto access control list: everything for those without a name, for us all but what is others'."""
    root = Topics("main").root
    closed = [f"{root}/c/#", *(f"{root}/a/{victim}/#" for victim in victims)]
    return ["topic readwrite #", f"user {NAME}", "topic readwrite #", *(f"topic deny {topic}" for topic in closed)]
