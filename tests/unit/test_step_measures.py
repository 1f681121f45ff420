"""What users log, as it travels behind the lanes of a commit vector; and the ledger of samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.control.cluster.state import Control, ControlConfig, Phase
from lazarus.control.commit.exactly_once import ids_of_step, ledger_event, num_samples_in
from lazarus.control.commit.measures import measures_of, with_measures
from lazarus.control.machine import decide
from lazarus.control.messages import Evaluated, ReplicaMismatch, Vector
from lazarus.control.parts.committed import Committed
from lazarus.control.parts.roster import Node, Roster, Worker
from lazarus.control.parts.standing import Standing
from lazarus.control.ports import Journal, Publish, WorkerSaid
from lazarus.control.vector import VectorLayout, contribution, decode, sample_hash
from lazarus.errors import BrokenInvariantError
from lazarus.runtime.state.compare import differences
from lazarus.runtime.training.context import MAX_NAMES, Measures

LAYOUT = VectorLayout(world_size=2, num_layers=1, num_experts=3)
NAMES = st.lists(
    st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"]), min_size=1),
    unique=True,
    min_size=1,
    max_size=9,
)


@given(names=NAMES, data=st.data())
def test_measures_come_back_from_a_vector_whatever_their_names(
    names: list[str], data: st.DataObject
) -> None:
    finite = st.floats(-1e9, 1e9)
    sums = np.array([data.draw(finite) if i % 2 == 0 else 2.0 for i in range(2 * len(names))])
    lanes = np.arange(LAYOUT.num_lanes, dtype=np.float64)
    found = measures_of(LAYOUT, np.frombuffer(with_measures(lanes, names, sums).tobytes()))
    assert found == {name: (sums[2 * i] / 2.0, 2.0) for i, name in enumerate(names)}


def test_a_vector_without_measures_has_no_tail_and_a_damaged_tail_is_refused() -> None:
    lanes = np.zeros(LAYOUT.num_lanes)
    assert with_measures(lanes, (), np.zeros(0)) is lanes
    assert measures_of(LAYOUT, lanes) == {}
    whole = with_measures(lanes, ("a", "b"), np.ones(4))
    with pytest.raises(BrokenInvariantError, match="names 1 measures and sums 2"):
        measures_of(LAYOUT, whole[:-1] if whole.size % 2 else np.append(whole[:-1], 0.0))


def test_log_sums_values_by_weight_and_a_new_name_waits_for_the_next_step() -> None:
    measures = Measures()
    measures.start()
    measures.log("a", 2.0, 3.0)
    measures.agree(measures.logged)
    assert not measures.has_unknown
    measures.log("a", 4.0, 1.0)
    measures.log("late", 5.0, 2.0)
    assert measures.has_unknown
    assert measures.lanes().tolist() == [10.0, 4.0]
    measures.start()  # the attempt is abandoned: nothing of it is left
    assert not measures.has_unknown
    measures.log("late", 5.0, 2.0)
    measures.commit()
    measures.start()
    measures.agree((*measures.names, *measures.logged))
    assert measures.lanes().tolist() == [0.0, 0.0, 10.0, 2.0]


def test_names_are_bounded_and_lines_of_text() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_NAMES}"):
        Measures().agree(str(i) for i in range(MAX_NAMES + 1))
    with pytest.raises(ValueError, match="one line of text"):
        Measures().agree(["two\nlines"])


def running(*, ledger: bool = True, num_samples: int = 50) -> Control:
    config = ControlConfig(steps=9, global_batch=8, seed=4, ledger=ledger)
    return Control(
        config=config,
        phase=Phase.RUNNING,
        resumed=1,
        generation=1,
        standing=Standing(
            members=(0, 1),
            seats=("a", "b"),
            seat_nodes=(0, 1),
            shape=(1, 3),
            num_samples=num_samples,
        ),
        committed=Committed(history=np.zeros((3, 1, 3))),
        roster=Roster(
            nodes={i: Node(key=name, workers=(name,)) for i, name in enumerate("ab")},
            workers={name: Worker(node=i, local_rank=0, host="") for i, name in enumerate("ab")},
        ),
    )


def vector_of(ids: np.ndarray, *, step: int = 1, logged: bool = False) -> Vector:
    parts = [
        contribution(
            LAYOUT, rank=rank, generation=1, step=step, samples=len(own), count=4.0,
            sample_hash=sample_hash(own, step=step), loss_sum=1.0, aux_sum=0.0, found_inf=False,
            pause=False, own_s=0.1,
        )
        for rank, own in enumerate((ids[:3], ids[3:]))
    ]  # fmt: skip
    lanes = parts[0] + parts[1]
    if logged:
        lanes = with_measures(lanes, ("accuracy",), np.array([3.0, 4.0]))
    return Vector(generation=1, step=step, lanes=lanes.tobytes())


def published(state: Control, vector: Vector) -> list[Publish]:
    _, commands = decide(state, WorkerSaid(worker="a", body=vector, at_s=5.0))
    return [command for command in commands if isinstance(command, Publish)]


@pytest.mark.parametrize("num_samples", [50, 0, -1])
def test_the_ledger_names_the_samples_that_the_vector_vouches_for(num_samples: int) -> None:
    ids = ids_of_step(1, seed=4, global_batch=8, num_samples=num_samples)
    events = published(running(num_samples=num_samples), vector_of(ids, logged=True))
    assert [event.event for event in events] == ["step_committed", "ledger"]
    assert events[1].fields["sample_ids"] == ids.tolist()
    assert events[0].fields["metrics"] == {"accuracy": 0.75}
    assert events[0].fields["metric_weights"] == {"accuracy": 4.0}


def test_a_vector_of_other_samples_gets_an_alarm_instead_of_a_ledger() -> None:
    ids = ids_of_step(1, seed=4, global_batch=8, num_samples=50)
    for wrong in (np.append(ids[:-1], ids[0]), ids[:-1]):
        events = published(running(), vector_of(wrong))
        assert [event.event for event in events] == ["step_committed", "ledger_mismatch"]
    assert len(published(running(ledger=False), vector_of(ids))) == 1


def test_the_ledger_event_depends_on_the_step() -> None:
    ids = ids_of_step(1, seed=4, global_batch=8, num_samples=50)
    vector = vector_of(ids, step=2)
    sums = decode(LAYOUT, np.frombuffer(vector.lanes))
    assert ledger_event(running(), vector, sums).event == "ledger_mismatch"


def test_scalars_tell_how_many_samples_there_are() -> None:
    assert num_samples_in('{"data": {"num_samples": 7}}') == 7
    assert num_samples_in("") == 0


def test_an_evaluation_is_published_once_however_often_it_is_reported() -> None:
    state = replace(running(), step=4)
    said = WorkerSaid(
        worker="a", body=Evaluated(generation=1, step=4, loss_sum=6.0, count=4.0), at_s=1.0
    )
    state, commands = decide(state, said)
    assert [c.fields["loss"] for c in commands if isinstance(c, Publish)] == [1.5]
    assert [c.entry["kind"] for c in commands if isinstance(c, Journal)] == ["evaluated"]
    assert not [c for c in decide(state, said)[1] if isinstance(c, Publish)]


def test_the_odd_copy_is_named_by_majority() -> None:
    #                 dense  L0/E0  L0/E1  L1/E0  L1/E1
    sums = np.array([[5, 7, 0, 9, 3], [5, 7, 8, 9, 0], [6, 7, 8, 1, 4], [5, 2, 8, 9, 4]])
    found = {(d.layer, d.expert): d for d in differences(sums, num_experts=2)}
    assert found[-1, -1].odd == (2,) and found[-1, -1].is_majority
    assert found[0, 0].odd == (3,) and found[1, 0].odd == (2,)
    assert (0, 1) not in found
    assert found[1, 1].odd == (0,) and found[1, 1].holders == (0, 2, 3)
    two = differences(np.array([[5, 7], [5, 8]]), num_experts=1)
    assert not two[0].is_majority and two[0].odd == (0, 1)
    assert "differs between 0, 1" in two[0].to_json(step=3, nodes=(4, 6))


def test_a_mismatch_is_an_event_with_layer_and_expert() -> None:
    what = differences(np.array([[5, 7], [5, 8]]), num_experts=1)[0].to_json(step=3, nodes=(4, 6))
    said = WorkerSaid(worker="a", body=ReplicaMismatch(generation=1, step=3, what=what), at_s=1.0)
    _, commands = decide(running(), said)
    (event,) = [c for c in commands if isinstance(c, Publish)]
    assert event.event == "replica_mismatch"
    assert (event.fields["layer"], event.fields["expert"]) == (0, 0)
    assert event.fields["nodes"] == [4, 6]
