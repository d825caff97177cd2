"""A uvicorn that the daemon runs beside its other tasks: plain or with TLS, with signals left to the daemon."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp

STOP_S: Final = 2


class Server(uvicorn.Server):
    """One listener.  `certificate` is a file with key and certificate; without one it speaks plain HTTP."""

    def __init__(self, app: ASGIApp, certificate: Path | None = None, **settings: Any) -> None:
        self._certificate = certificate
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=STOP_S,
                ssl_certfile=certificate,
                **settings,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the daemon."""
        yield

    def renewed(self) -> None:
        """Show the certificate that is in the file now to whoever connects from now on."""
        if self._certificate is not None and self.config.loaded and self.config.ssl is not None:
            self.config.ssl.load_cert_chain(self._certificate)

    async def work(self, listening: socket.socket, stopping: Callable[[], None] = lambda: None) -> None:
        """Answer on this socket until cancelled; then call `stopping` and let running answers finish for STOP_S."""
        serving = asyncio.create_task(self.serve([listening]), name="uvicorn")
        try:
            await asyncio.shield(serving)
        finally:
            stopping()
            self.should_exit = True
            await serving
