"""The rendezvous store of a run, in which ranks find each other; it lives in the controller.

Importing this module does not import torch, of which only the store itself is needed: a controller
that restarts listens before it has loaded that.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any


def listen(host: str) -> socket.socket:
    """A listening TCP socket on ``host`` and a free port; nothing binds to all interfaces."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((host, 0))
    server.listen(1024)
    return server


class RendezvousStore:
    """The TCP store of a run; it lives in the controller, never in a rank.

    It listens on ``bind_host``, and ``host`` is where others reach it. Whoever connects before
    ``open`` waits, or tries again.
    """

    def __init__(self, host: str, *, timeout_s: float, bind_host: str = "") -> None:
        self._server = listen(bind_host or host)
        self._host, self._timeout_s = host, timeout_s
        self.address = f"{host}:{self._server.getsockname()[1]}"
        self._store: Any = None

    def open(self) -> RendezvousStore:
        """Answer who connects. Returns itself."""
        from torch import distributed

        c10d: Any = distributed  # torch's stubs lack these classes
        port = self._server.getsockname()[1]
        self._store = c10d.TCPStore(
            self._host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout_s),
            master_listen_fd=self._server.detach(),
            use_libuv=True,
        )
        return self
