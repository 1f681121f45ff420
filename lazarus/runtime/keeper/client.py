"""Calls to a keeper: fetch a record, list what it holds, give it orders. EFFECTS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import xxhash

from lazarus.checkpoint.errors import DamagedError, KeeperUnavailableError, RefusedError
from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.checkpoint.format.image import parse_image
from lazarus.checkpoint.restoring.restore_choice import Copy, Source
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import KEEPER, metadata_of, method, open_channel
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.keeper_messages import (
    Drop,
    FetchRequest,
    InventoryReply,
    InventoryRequest,
    Order,
    OrderReply,
    PushReply,
    RecordHead,
    chunks_of,
    received_into,
)

_Reply = TypeVar("_Reply")
_SILENCES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stock:
    """A keeper's answer to an inventory: its records, and the host memory they take."""

    keys: tuple[RecordKey, ...]
    checksums: tuple[str, ...]
    sizes: tuple[int, ...]
    reserved_bytes: int
    peak_bytes: int
    stale_messages: int
    pid: int

    def copies(self, *, node: int) -> tuple[Copy, ...]:
        """The records as copies for ``decide_recovery``, as held on ``node``."""
        return tuple(
            Copy(
                layer=key.layer,
                expert=key.expert,
                generation=key.generation,
                step=key.step,
                source=Source.OTHER_NODE,
                node=node,
                routed=key.routed,
                checksum=checksum,
                num_bytes=size,
            )
            for key, checksum, size in zip(self.keys, self.checksums, self.sizes, strict=True)
        )


class KeeperClient:
    """Talks to one keeper. Every call has a time limit."""

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials,
        tag: Tag,
        timeout_s: float = 30.0,
    ) -> None:
        self.address = address
        self._tag = tag
        self._timeout_s = timeout_s
        self._metadata = metadata_of(credentials)
        self._channel = open_channel(address, credentials)
        self._fetch = self._channel.unary_stream(method(KEEPER, "Fetch"))
        self._push = self._channel.stream_unary(method(KEEPER, "Push"))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def retagged(self, tag: Tag) -> None:
        """Speak for another generation from now on."""
        self._tag = tag

    def fetch(
        self, *, layer: int, expert: int, generation: int, step: int
    ) -> tuple[RecordKey, bytes]:
        """One record, compared with its checksum and its own tags.

        Returns:
            Its key, and its image (see ``lazarus.checkpoint.files.tensors.tensors_of``).

        Raises:
            RefusedError: The keeper does not hold it, or we are behind.
            DamagedError: What arrived is not what was announced.
            KeeperUnavailableError: No answer.
        """
        request = FetchRequest(
            stamp=self._tag, layer=layer, expert=expert, generation=generation, step=step
        )
        try:
            stream = self._fetch(
                codec.encode(request), timeout=self._timeout_s, metadata=self._metadata
            )
            head = codec.decode(RecordHead, next(stream))
            image = bytearray(head.num_bytes)
            count = received_into(memoryview(image), stream)
        except grpc.RpcError as error:
            raise _as_error(error, self.address) from error
        except (StopIteration, ValueError) as error:
            raise DamagedError(f"record from {self.address}: {error}") from error
        if count != head.num_bytes or xxhash.xxh3_128_hexdigest(image) != head.checksum:
            raise DamagedError(f"L{layer}/E{expert} from {self.address}: checksum differs")
        check_identity(head.key, parse_image(image).metadata)
        return head.key, bytes(image)

    def push(self, key: RecordKey, data: memoryview, *, checksum: str, published_step: int) -> None:
        """Send a record to be kept there too.

        Raises:
            RefusedError, KeeperUnavailableError: It is not kept.
        """
        head = RecordHead(
            stamp=self._tag,
            key=key,
            num_bytes=len(data),
            checksum=checksum,
            published_step=published_step,
        )
        try:
            answer = self._push(
                chunks_of(head, data), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise _as_error(error, self.address) from error
        reply = self._read(PushReply, answer)
        if not reply.accepted:
            raise RefusedError(f"{self.address} refused a copy: {reply.reason}")

    def answers(self) -> bool:
        """Whether it answers at all, to a question that changes nothing."""
        ask = self._channel.unary_unary(method(KEEPER, "Nothing"))
        try:
            ask(b"", timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as problem:
            return problem.code() not in _SILENCES
        return True

    def inventory(self) -> Stock:
        """What it holds.

        Raises:
            RefusedError, KeeperUnavailableError: No inventory.
        """
        reply = self._call("Inventory", InventoryRequest(stamp=self._tag), InventoryReply)
        return Stock(
            keys=tuple(h.key for h in reply.held),
            checksums=tuple(h.checksum for h in reply.held),
            sizes=tuple(h.num_bytes for h in reply.held),
            reserved_bytes=reply.reserved_bytes,
            peak_bytes=reply.peak_bytes,
            stale_messages=reply.stale_messages,
            pid=reply.pid,
        )

    def tell(
        self,
        *,
        lineage: Sequence[tuple[int, int]] = (),
        resume_step: int = -1,
        drops: Iterable[tuple[int, int, int, int]] = (),
        leave: bool = False,
    ) -> int:
        """Give orders: forget void and surplus records, or exit. Returns records forgotten.

        Args:
            lineage: With ``resume_step``: forget what they void.
            resume_step: Step of the newest RESUME; -1 leaves the records alone.
            drops: Surplus copies as (layer, expert, generation, step).
            leave: Exit at once, as when this node was fenced or the run is over.
        """
        order = Order(
            stamp=self._tag,
            lineage=tuple(lineage),
            resume_step=resume_step,
            drops=tuple(Drop(layer=x, expert=e, generation=g, step=t) for x, e, g, t in drops),
            leave=leave,
        )
        return self._call("Tell", order, OrderReply).dropped

    def _call(self, name: str, request: Any, reply: type[_Reply]) -> _Reply:
        """One message there, one back."""
        call = self._channel.unary_unary(method(KEEPER, name))
        try:
            answer = call(codec.encode(request), timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _as_error(error, self.address) from error
        return self._read(reply, answer)

    def _read(self, kind: type[_Reply], answer: bytes) -> _Reply:
        try:
            return codec.decode(kind, answer)
        except ValueError as error:
            raise KeeperUnavailableError(f"keeper {self.address}: {error}") from error


def check_identity(key: RecordKey, metadata: Any) -> None:
    """Compare a key with the tags inside its image.

    Raises:
        DamagedError: The image is another record.
    """
    want = {
        "layer": str(key.layer),
        "expert": str(key.expert),
        "step": str(key.step),
        "generation": str(key.generation),
    }
    wrong = {name: metadata.get(name) for name in want if metadata.get(name) != want[name]}
    if wrong:
        raise DamagedError(f"L{key.layer}/E{key.expert} of step {key.step} says it is {wrong}")


def _as_error(error: grpc.RpcError, address: str) -> RefusedError | KeeperUnavailableError:
    if error.code() in _REFUSALS:
        return RefusedError(f"keeper {address}: {error.details()}")
    return KeeperUnavailableError(f"keeper {address}: {error.code().name}: {error.details()}")
