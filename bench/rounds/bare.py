"""What the bytes themselves cost: the same chunks, published bare through the same broker, by paho alone.

One process is the server, one each the clients.  A round: the server publishes all chunks of a model, once for all or once for
each; whoever has them publishes as many of its own; it ends when the server has all of them.  No digest, no disk, no credit.

    python -m bench.rounds.bare client CONFIG N        started by `rounds`; ends with its standard input
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from protocol.bus import parse_url

PATIENCE_S = 60.0


class Asked(msgspec.Struct, frozen=True):
    """Where the broker is, and what one payload is made of."""

    broker: Mapping[str, Any]
    n_bytes: int
    chunk_bytes: int

    @property
    def chunks(self) -> list[bytes]:
        """A payload of its own, in pieces."""
        data = os.urandom(self.n_bytes)
        return [data[at : at + self.chunk_bytes] for at in range(0, self.n_bytes, self.chunk_bytes)]


def connected(asked: Asked, name: str, *topics: str) -> tuple[mqtt.Client, queue.SimpleQueue[mqtt.MQTTMessage]]:
    """A client that listens to these topics; what comes is in the queue."""
    address, broker = parse_url(str(asked.broker["url"])), asked.broker
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
    if address.tls:
        client.tls_set(broker["ca_file"], broker["cert_file"], broker["key_file"])
    came: queue.SimpleQueue[mqtt.MQTTMessage] = queue.SimpleQueue()
    heard: queue.SimpleQueue[object] = queue.SimpleQueue()
    client.on_message = lambda _client, _data, message: came.put(message)
    client.on_connect = lambda client, *_: client.subscribe([(topic, 0) for topic in topics])
    client.on_subscribe = lambda *_: heard.put(None)
    client.connect(address.host, address.port)
    client.loop_start()
    heard.get(timeout=PATIENCE_S)
    return client, came


def serve_client(asked: Asked, number: int) -> None:
    """Answer each whole payload with one, until nobody wants it any more."""
    client, came = connected(asked, f"bare-{number}", "bare/all", f"bare/down/{number}")
    chunks = asked.chunks
    print("ready", flush=True)
    while True:
        for _ in chunks:
            came.get()
        for chunk in chunks:
            client.publish(f"bare/up/{number}", chunk)


def rounds(asked: Asked, n_clients: int, n_rounds: int, *, is_broadcast: bool) -> list[float]:
    """Seconds of each round."""
    command = [sys.executable, "-m", "bench.rounds.bare", "client", msgspec.json.encode(asked).decode()]
    clients = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for number in range(n_clients)
    ]
    try:
        for process in clients:
            assert process.stdout is not None
            process.stdout.readline()
        server, came = connected(asked, "bare-server", "bare/up/+")
        chunks, found = asked.chunks, []
        topics = ["bare/all"] if is_broadcast else [f"bare/down/{number}" for number in range(n_clients)]
        for _ in range(n_rounds):
            began = time.perf_counter()
            for chunk in chunks:
                for topic in topics:
                    server.publish(topic, chunk)
            for _ in range(n_clients * len(chunks)):
                came.get(timeout=PATIENCE_S)
            found.append(time.perf_counter() - began)
        server.disconnect()
        return found
    finally:
        for process in clients:
            process.kill()
            process.wait()


if __name__ == "__main__":
    serve_client(msgspec.json.decode(sys.argv[2], type=Asked), int(sys.argv[3]))
