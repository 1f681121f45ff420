"""Client of a keeper: fetch or push expert images, list the images it holds, give it orders."""

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
    """A keeper's answer to an inventory: the images it holds, and the host memory they take.

    Attributes:
        keys: Layer, expert, generation and step of each image.
        checksums: xxh3-128 of each image, in hex.
        sizes: Bytes of each image.
        reserved_bytes: Host memory that the keeper has taken, free slots included.
        peak_bytes: The most that ``reserved_bytes`` has been.
        stale_messages: Messages that the keeper refused as stale or invalid.
        pid: The keeper's process id.
    """

    keys: tuple[RecordKey, ...]
    checksums: tuple[str, ...]
    sizes: tuple[int, ...]
    reserved_bytes: int
    peak_bytes: int
    stale_messages: int
    pid: int

    def copies(self, *, node: int) -> tuple[Copy, ...]:
        """The images as copies held on ``node``, for the choice of what to restore from."""
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
    """Talks to one keeper. Every call has a time limit.

    Args:
        address: The keeper's "host:port".
        credentials: The job's credentials.
        tag: Job, term and generation that the caller speaks for; a keeper refuses older ones.
        timeout_s: Limit of each call.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials,
        tag: Tag,
        timeout_s: float,
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
        """Speak for another term or generation from now on."""
        self._tag = tag

    def fetch(
        self, *, layer: int, expert: int, generation: int, step: int
    ) -> tuple[RecordKey, bytes]:
        """Fetch one expert's image and check it against its checksum and its own metadata.

        Returns:
            The image's key, and its bytes (see ``lazarus.checkpoint.files.tensors.tensors_of``).

        Raises:
            RefusedError: The keeper does not hold the image, or this client's tag is stale.
            DamagedError: The bytes do not match their checksum, or are another image.
            KeeperUnavailableError: The keeper did not answer in time.
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
        """Send an image to the keeper, which then holds a copy.

        Args:
            key: The image's key.
            data: Its bytes.
            checksum: xxh3-128 of ``data`` in hex.
            published_step: Newest step whose commit is journaled.

        Raises:
            RefusedError, KeeperUnavailableError: The keeper did not take the copy.
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
        """Whether the keeper answers a call, even with an error; changes nothing there."""
        ask = self._channel.unary_unary(method(KEEPER, "Nothing"))
        try:
            ask(b"", timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as problem:
            return problem.code() not in _SILENCES
        return True

    def inventory(self) -> Stock:
        """List the images that the keeper holds.

        Raises:
            RefusedError: This client's tag is stale.
            KeeperUnavailableError: The keeper did not answer in time.
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
        """Order the keeper to forget images, or to exit. Returns the number of images forgotten.

        Args:
            lineage: (generation, step) of every RESUME; images that these made void are forgotten.
            resume_step: Step of the newest RESUME; -1: ignore ``lineage``.
            drops: Surplus copies to forget, as (layer, expert, generation, step).
            leave: Exit now, because the node was fenced or the run is over.

        Raises:
            RefusedError: This client's tag is stale.
            KeeperUnavailableError: The keeper did not answer in time.
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
        """Send one request and return the reply."""
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
    """Compare a key with the metadata inside an image.

    Raises:
        DamagedError: The metadata names another layer, expert, step or generation.
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
