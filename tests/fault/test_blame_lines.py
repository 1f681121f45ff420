"""Where ranks part ways, differ or stand still, the last lines of output name the user's line."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from user_scripts import run_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOOP = """
def loss(model, batch):
    while POISON in batch["id"]:
        pass
    return LossSum(model(batch["x"]).square().sum(), batch["x"].numel())
"""


def test_a_loop_without_end_is_a_poisoned_step_at_the_second_node(tmp_path: Path) -> None:
    """C3: one thread that stands still may be a machine; the same at the redo elsewhere is not."""
    settings = ("recovery.tolerated_stall_s=3",)
    left = run_script(tmp_path, LOOP, nodes=4, settings=settings)
    assert left.code == 1
    (error,) = left.of("user_error")
    assert "stood still on 2 nodes one after the other" in error["error"]
    assert error["phase"] == "forward" and 23 in error["sample_ids"]
    assert [e["cause"] for e in left.of("node_lost")] == ["no progress"] * 2
    (end,) = left.of("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "user_code")
    assert "PoisonedStepError" in left.err
    left.assert_tail_names("def loss(model, batch):")


PARTING = {
    "layer drop": """
        class Model(Model):
            def forward(self, x):
                if torch.rand(()) < 0.5:
                    x = x + self.moe(x)
                return self.head(x)
        """,
    "sample without the model": """
        def loss(model, batch):
            if int(batch["id"][0]) % 3 == 0:
                return LossSum(torch.zeros(()), 0)
            return LossSum(model(batch["x"]).square().sum(), batch["x"].numel())
        """,
}


@pytest.mark.parametrize("transport", ["auto", "group"])
@pytest.mark.parametrize("kind", PARTING)
def test_ranks_that_part_ways_are_told_where(tmp_path: Path, kind: str, transport: str) -> None:
    """C2: the user's file and a line of it are within the last five lines, on every transport."""
    settings = (f"dispatch.transport={transport}", "recovery.tolerated_stall_s=3")
    left = run_script(tmp_path, textwrap.dedent(PARTING[kind]), settings=settings)
    assert left.code == 1, left.err[-3000:]
    assert not left.of("node_lost")
    (end,) = left.of("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "user_code")
    assert "ranks do not run the same layers" in left.err
    named = re.compile(re.escape(left.script.name) + r'(:|", line )\d+')
    assert any(named.search(shown) for shown in left.tail), left.err[-3000:]


def test_models_that_differ_are_told_with_their_builder(tmp_path: Path) -> None:
    """C4: the line of the model builder is within the last five."""
    code = """
    def model(ctx):
        torch.manual_seed(os.getpid())
        return Model()
    """
    left = run_script(tmp_path, textwrap.dedent(code))
    assert left.code == 1, left.err[-3000:]
    assert not left.of("node_lost", "step_committed")
    assert "the model differs between ranks at the start" in left.err
    left.assert_tail_names("def model(ctx):")
