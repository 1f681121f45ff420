"""A door in front of a rendezvous store that turns the first callers away."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from lazarus.runtime.controller.rendezvous import listen


class StoreDoor:
    """Forwards connections to a store; the first ones are dropped, or answered by nobody.

    Args:
        store: Address of the store, "host:port".
        drops: So many connections are closed at once.
        stalls: So many after these are taken and never answered.
    """

    def __init__(self, store: str, *, drops: int = 0, stalls: int = 0) -> None:
        host, _, port = store.rpartition(":")
        self._store = (host, int(port))
        self._drops, self._stalls = drops, stalls
        self._listener = listen("127.0.0.1")
        self._open: list[socket.socket] = []
        self.dropped = self.stalled = self.forwarded = 0
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self._take(caller)

    def _take(self, caller: socket.socket) -> None:
        if self.dropped < self._drops:
            self.dropped += 1
            caller.close()
            return
        self._open.append(caller)
        if self.stalled < self._stalls:
            self.stalled += 1
            return
        self.forwarded += 1
        store = socket.create_connection(self._store)
        self._open.append(store)
        for source, target in ((caller, store), (store, caller)):
            threading.Thread(target=_pump, args=(source, target), daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        for each in self._open:
            each.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(1 << 16):
            target.sendall(content)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
