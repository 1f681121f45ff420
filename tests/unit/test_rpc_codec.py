"""Every control record survives the wire, whatever its fields hold."""

import dataclasses

import pytest

from lazarus.control import messages as m
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc import lazarus_pb2 as pb

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


@pytest.mark.parametrize(
    ("envelope", "record"),
    [
        (pb.ToWorker, PREPARE),
        (pb.FromWorker, REPORT),
        (pb.FromWorker, m.Aligned(generation=1, step=0, held=(m.Held(layer=0, experts=(1, 5)),))),
        (pb.ToDriver, m.RunOver(status="finished")),
        (pb.FromDriver, m.StopRun(now=True)),
    ],
)
def test_a_record_comes_back_as_it_was_sent(envelope: type, record: m.Body) -> None:
    sent = codec.wrap(envelope, record)
    received = envelope()
    received.ParseFromString(sent.SerializeToString())
    assert codec.unwrap(received) == record


def test_every_field_of_every_record_is_on_the_wire() -> None:
    for name in dir(m):
        cls = getattr(m, name)
        if isinstance(cls, type) and issubclass(cls, m.Body) and cls is not m.Body:
            wire = {f.name for f in getattr(pb, name).DESCRIPTOR.fields}
            assert {f.name for f in dataclasses.fields(cls)} == wire, name


def test_an_empty_envelope_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="different versions"):
        codec.unwrap(pb.ToWorker())
