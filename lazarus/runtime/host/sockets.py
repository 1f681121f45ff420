"""TCP sockets of this process: addresses, peers, and whether their links still carry data."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

Address = tuple[str, int]

_TCP = (socket.AF_INET, socket.AF_INET6)
# Offsets in Linux's tcp_info: retransmissions of the oldest segment, unacknowledged segments.
_RETRANSMITS, _UNACKED, _INFO_BYTES = 2, 24, 104


def socket_names() -> dict[int, str]:
    """File descriptors of this process's sockets, with the kernel's name of each socket."""
    found: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            if target.startswith("socket:"):
                found[int(entry)] = target
    return found


def listeners() -> dict[str, Address]:
    """Addresses that this process listens at, by the kernel's name of the socket."""
    return {name: address_of(copy) for name, copy in _copies(is_listening=True)}


def connections(*, besides: set[str]) -> Iterator[tuple[str, socket.socket]]:
    """Duplicates of the connected TCP sockets whose names are not in ``besides``.

    The descriptor of a duplicate cannot be reused by other code. The caller closes each one.
    """
    return _copies(is_listening=False, besides=besides)


def _copies(
    *, is_listening: bool, besides: set[str] | None = None
) -> Iterator[tuple[str, socket.socket]]:
    for fd, name in socket_names().items():
        if name in (besides or ()):
            continue
        try:
            copy = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        if _is(copy, is_listening=is_listening):
            yield name, copy
            if is_listening:
                copy.close()
        else:
            copy.close()


def _is(copy: socket.socket, *, is_listening: bool) -> bool:
    try:
        if copy.family not in _TCP or copy.type != socket.SOCK_STREAM:
            return False
        if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return is_listening
        return not is_listening and bool(copy.getpeername())
    except OSError:
        return False  # not connected


def address_of(own: socket.socket) -> Address:
    """Local address of a socket."""
    host, port, *_ = own.getsockname()
    return _plain(host), port


def peer_of(connected: socket.socket) -> Address | None:
    """Address of the other end; None if the connection is gone."""
    try:
        host, port, *_ = connected.getpeername()
    except OSError:
        return None
    return _plain(host), port


def _plain(host: str) -> str:
    """Write an IPv4 address mapped into IPv6 ("::ffff:10.0.0.1") as IPv4."""
    return host.removeprefix("::ffff:")


def is_mute(connected: socket.socket) -> bool:
    """Whether data sent on this connection is being retransmitted without an acknowledgement.

    A peer whose process is stopped still acknowledges, since its kernel does; a cut link does not.
    """
    try:
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    except (OSError, AttributeError):
        return False
    if len(info) < _UNACKED + 4:
        return False
    return info[_RETRANSMITS] >= 1 and struct.unpack_from("I", info, _UNACKED)[0] > 0
