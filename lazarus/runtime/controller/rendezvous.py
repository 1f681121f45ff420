"""The rendezvous store of a run, through which ranks find each other; it runs in the controller.

This module does not import torch until ``open``, so that a restarted controller listens sooner.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any


def listen(host: str) -> socket.socket:
    """Open a listening TCP socket on ``host`` and a free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    server.bind((host, 0))
    server.listen(1024)
    return server


class RendezvousStore:
    """The TCP store of a run; it runs in the controller, never in a rank.

    Clients that connect before ``open`` wait, or try again.

    Args:
        host: Address at which ranks reach the store.
        timeout_s: Time-out of the store's operations.
        bind_host: Address that the store listens on; empty: ``host``.
    """

    def __init__(self, host: str, *, timeout_s: float, bind_host: str = "") -> None:
        self._server = listen(bind_host or host)
        self._host, self._timeout_s = host, timeout_s
        self.address = f"{host}:{self._server.getsockname()[1]}"
        self._store: Any = None

    def open(self) -> RendezvousStore:
        """Begin to answer clients. Returns ``self``."""
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
