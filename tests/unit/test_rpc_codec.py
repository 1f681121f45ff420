"""Every message survives the wire, whatever its fields hold; what is no message is refused."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import pytest

from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.control import messages as m
from lazarus.failure import Cause, Failure
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc import keeper_messages as k

PREPARE = m.Prepare(
    generation=3,
    step=7,
    seats=(m.Seat(worker="a", node=0), m.Seat(worker="b", node=4, host="10.0.0.1", keeper="x:1")),
    feeders=(m.Seat(worker="a", node=0),),
    plan="{}",
    moves=(m.Move(layer=1, expert=2, source=0, target=1),),
    dense_sources=(0, 1),
    history=b"\x00\xff",
    speeds=(0.5, 1.0),
)
REPORT = m.Report(
    generation=2,
    committed=4,
    prepared=5,
    vectors=(m.Vector(generation=1, step=4, lanes=b"12345678", wall_s=0.25),),
)
FAILURE = Failure(
    cause=Cause.USER_CODE, message="no", sample_ids=(3, 1 << 40), details={"live": 1, "why": [2.5]}
)
STAMP = Tag(job="j", term=1, generation=2)
KEY = RecordKey(layer=0, expert=3, step=7, generation=2, routed=9)


@pytest.mark.parametrize(
    "sent",
    [
        m.ToWorker(PREPARE, term=5),
        m.FromWorker(REPORT),
        m.FromWorker(m.Aligned(generation=1, step=0, held=(m.Held(layer=0, experts=(1, 5)),))),
        m.ToDriver(m.RunOver(status="failed", failure=FAILURE)),
        m.FromDriver(m.StopRun(now=True)),
        k.RecordHead(stamp=STAMP, key=KEY, num_bytes=1 << 40, checksum="0"),
        k.Order(stamp=STAMP, lineage=((1, 0), (2, 5)), resume_step=5, leave=True),
    ],
    ids=lambda sent: type(getattr(sent, "body", sent)).__name__,
)
def test_a_message_comes_back_as_it_was_sent(sent: Any) -> None:
    assert codec.decode(type(sent), codec.encode(sent)) == sent


def test_every_body_travels_in_one_direction_and_every_class_is_frozen() -> None:
    bodies = {
        cls
        for _, cls in inspect.getmembers(m, inspect.isclass)
        if issubclass(cls, m.Body) and cls is not m.Body
    }
    carried = [set(get_args(get_type_hints(envelope)["body"])) for envelope in get_args(m.Envelope)]
    assert sum(len(one) for one in carried) == len(set().union(*carried))
    assert set().union(*carried) == bodies
    for module in (m, k):
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, msgspec.Struct) and cls is not msgspec.Struct:
                assert cls.__struct_config__.frozen, cls


def test_a_field_that_is_not_known_is_ignored_and_one_that_is_missing_takes_its_default() -> None:
    newer = {"body": {"type": "Fence", "generation": 4, "why": "later"}, "colour": "red"}
    found = codec.decode(m.ToWorker, msgspec.msgpack.encode(newer))
    assert found == m.ToWorker(m.Fence(generation=4), term=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"body": {"type": "Hurry", "generation": 1}},
        {"body": {"type": "Fence", "generation": "1"}},
        {"body": {"type": "Fence", "generation": 1.0}},
        {"body": {"type": "Fence", "generation": 1 << 63}},
        {"body": {"type": "Vector", "generation": 1, "step": 1, "lanes": b""}},
        {"body": {"type": "Fence"}},
        [1, 2],
    ],
)
def test_what_is_no_order_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="different versions"):
        codec.decode(m.ToWorker, msgspec.msgpack.encode(wrong))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 100_000, codec.encode(REPORT)[:-1]])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="different versions"):
        codec.decode(m.FromWorker, data)


def test_numbers_of_numpy_travel_as_plain_ones() -> None:
    body = m.Healed(generation=np.int64(3), step=2, bytes_received=np.int64(9))  # type: ignore[arg-type]
    assert codec.decode(m.FromWorker, codec.encode(m.FromWorker(body))).body == m.Healed(
        generation=3, step=2, bytes_received=9
    )


def test_text_that_is_not_unicode_is_sent_escaped_and_the_rest_unharmed() -> None:
    body = m.UserError(generation=1, step=2, error="no file \udce9.txt", traceback="é")
    found = codec.decode(m.FromWorker, codec.encode(m.FromWorker(body))).body
    assert found == m.UserError(generation=1, step=2, error="no file \\udce9.txt", traceback="é")
    lanes = m.Vector(generation=1, step=2, lanes=b"\xff\x00")
    odd = m.Report(generation=1, committed=2, prepared=2, vectors=(lanes,))
    plain = codec._escaped(codec._builtins(m.FromWorker(odd)))
    assert codec.decode(m.FromWorker, msgspec.msgpack.encode(plain)).body == odd
