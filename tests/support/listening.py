"""What processes listen on, and what goes over a machine's wire, as the kernel tells it."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

_LISTENS = "0A"
_SO_ATTACH_FILTER = 26
_ALL_PROTOCOLS = 3


def listeners(pids: Iterable[int]) -> dict[int, set[tuple[str, int]]]:
    """Addresses and ports of the TCP sockets that each process listens on."""
    by_inode = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENS:
                by_inode[words[9]] = _address(words[1])
    found: dict[int, set[tuple[str, int]]] = {}
    for pid in pids:
        try:
            links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue  # it has ended, or just closed one
        inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
        found[pid] = {by_inode[inode] for inode in inodes if inode in by_inode}
    return found


def _address(text: str) -> tuple[str, int]:
    packed, _, port = text.partition(":")
    words = [bytes.fromhex(packed[i : i + 8])[::-1] for i in range(0, len(packed), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), int(port, 16)


def tree_of(pid: int) -> set[int]:
    """A process and all that it started, and those started."""
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(path.name)] = int(words[1])
    tree, new = {pid}, {pid}
    while new := {child for child, parent in parents.items() if parent in new} - tree:
        tree |= new
    return tree


class Sniffer:
    """Everything that goes from or to one address of the loopback, while it is open."""

    def __init__(self, address: str) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS)
            )
        except PermissionError:
            pytest.skip("only root may listen on the wire")
        word = int(ipaddress.IPv4Address(address))
        program = [
            (0x20, 0, 0, 26),  # load the source address
            (0x15, 2, 0, word),
            (0x20, 0, 0, 30),  # load the destination address
            (0x15, 0, 1, word),
            (0x06, 0, 0, 0xFFFF),  # take the packet
            (0x06, 0, 0, 0),
        ]
        code = b"".join(struct.pack("HBBI", *line) for line in program)
        self._code = ctypes.create_string_buffer(code)
        attached = struct.pack("HL", len(program), ctypes.addressof(self._code))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._socket.bind(("lo", 0))
        self._socket.settimeout(0.1)
        self.seen = bytearray()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._closed.is_set():
            try:
                self.seen += self._socket.recv(1 << 16)
            except TimeoutError:
                continue

    def close(self) -> bytes:
        """What was seen."""
        self._closed.set()
        self._thread.join()
        self._socket.close()
        return bytes(self.seen)
