"""The text form of faults, and schedules of random ones."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.errors import ConfigError
from lazarus.faults import (
    OPTIONS,
    PHASES,
    ChaosSpec,
    FaultSpec,
    chaos_events,
    fault_problems,
    parse_chaos,
    parse_fault,
)


@st.composite
def fault_specs(draw: st.DrawFn) -> FaultSpec:
    kind = draw(st.sampled_from(sorted(OPTIONS)))
    node = None if kind in ("join", "controller") else draw(st.integers(0, 99))
    names = draw(st.lists(st.sampled_from(OPTIONS[kind] or ("",)), unique=True))
    return FaultSpec(
        kind=kind,
        node=node,
        step=draw(st.integers(1, 10**6)),
        phase=draw(st.sampled_from((None, *PHASES))),
        options={n: draw(st.floats(1e-3, 1e6)) for n in names if n},
    )


@given(fault_specs())
def test_the_text_of_a_fault_reads_back_as_the_same_fault(spec: FaultSpec) -> None:
    assert parse_fault(str(spec)) == spec


def test_the_examples_of_the_manual() -> None:
    assert parse_fault("kill:2@20") == FaultSpec(kind="kill", node=2, step=20)
    slow = parse_fault("slow:2@20,factor=3,steps=50")
    assert slow.options == {"factor": 3, "steps": 50} and str(slow) == "slow:2@20,factor=3,steps=50"
    assert parse_fault("leave:1@40,notice=30s").options == {"notice": 30}
    assert parse_fault("stop:3@15/commit,for=500ms").options == {"for": 0.5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kil:2@20", "did you mean kill"),
        ("kill@20", "kill needs a node: kill:NODE@20"),
        ("join:3@20", "join takes no node"),
        ("kill:2", "does not read as"),
        ("kill:2@0", "counted from 1"),
        ("kill:2@20/comit", "did you mean commit"),
        ("slow:2@20,speed=3", "it takes: factor, steps"),
        ("slow:2@20,factor=3s", "is not a duration"),
        ("slow:2@20,factor=fast", "is not a number"),
        ("slow:2@20,factor=1,factor=2", "given twice"),
        ("", "does not read as"),
    ],
)
def test_a_fault_that_does_not_read_says_why(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_fault(text)


def test_a_fault_for_a_node_that_is_not_there_is_a_problem() -> None:
    (problem,) = fault_problems([parse_fault("kill:4@20")], nodes=4, steps=40)
    assert "there is no node 4; 4 nodes are numbered 0 to 3" in str(problem)
    joined = [parse_fault("join@10"), parse_fault("kill:4@20")]
    assert fault_problems(joined, nodes=4, steps=40) == []
    (late,) = fault_problems([parse_fault("kill:1@50")], nodes=4, steps=40)
    assert "step 50 never comes" in str(late)
    chaos = ChaosSpec(mtbf_s=1.0, kinds=("join",))
    assert fault_problems([parse_fault("kill:9@20")], nodes=4, steps=40, chaos=chaos) == []


def test_random_faults_are_the_same_for_the_same_seed_and_have_the_mean() -> None:
    spec = parse_chaos("mtbf=30s,seed=1,kinds=kill+join")
    assert parse_chaos(str(spec)) == spec
    events = list(islice(chaos_events(spec), 4000))
    assert events == list(islice(chaos_events(spec), 4000))
    assert events[-1].at_s / 4000 == pytest.approx(30, rel=0.1)
    assert {e.kind for e in events} == {"kill", "join"}
    assert all(0 <= e.pick < 1 for e in events)


@pytest.mark.parametrize("text", ["seed=1", "mtbf=0", "mtbf=5,kind=kill", "mtbf=5,kinds=boom", "x"])
def test_a_schedule_that_does_not_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_chaos(text)
