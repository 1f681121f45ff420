"""What users do to a process beside their functions: hooks, defaults, streams, code in no file."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from user_scripts import run_script

from lazarus.checkpoint.files.verify import verify
from lazarus.record import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_a_hook_that_runs_a_layer_on_one_node_alone_is_the_users_error(
    tmp_path: Path, hook: str
) -> None:
    """C2: ranks whose hooks differ part ways, in the forward or in the backward."""
    code = f"""
    def model(ctx):
        made = Model()
        def again(module, *_):
            if ctx.node == 1:
                made.moe(torch.zeros(4, 8))
        made.head.{hook}(again)
        return made
    """
    left = run_script(tmp_path, code, settings=("recovery.tolerated_stall_s=3",))
    assert left.code == 1, left.err[-3000:]
    assert not left.of("node_lost", "step_committed")
    (end,) = left.of("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "user_code")
    assert "ranks do not run the same layers" in left.err
    named = re.compile(re.escape(left.script.name) + r'(:|", line )\d+')
    assert any(named.search(shown) for shown in left.tail), left.err[-3000:]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_builder_that_leaves_another_default_dtype_costs_nobody_its_place(
    tmp_path: Path, dtype: str
) -> None:
    """C3: tensors of the library keep the types that they need, also after a loss."""
    code = f"""
    def model(ctx):
        made = Model()
        torch.set_default_dtype(torch.{dtype})
        return made
    def loss(model, batch):
        total = model(batch["x"].float()).square().sum()
        return LossSum(total, batch["x"].numel())
    """
    settings = (
        'faults.specs=["kill:1@4"]',
        "checkpoint.every=2",
        "checkpoint.full_at_end=true",
        "recovery.compare_every=2",
    )
    left = run_script(tmp_path, code, settings=settings)
    assert left.code == 0, left.err[-3000:]
    assert [e["node"] for e in left.of("node_lost")] == [1]
    assert left.steps == list(range(1, 9))
    assert not left.of("replica_mismatch", "user_error")
    assert verify(str(left.folder / "checkpoints")).usable[-1] == 8


def test_a_model_built_under_another_default_dtype_is_refused_by_its_builders_line(
    tmp_path: Path,
) -> None:
    """C3: before the first step, with the parameter and its type."""
    code = """
    def model(ctx):
        torch.set_default_dtype(torch.float64)
        return Model()
    """
    left = run_script(tmp_path, code)
    assert left.code == 1, left.err[-3000:]
    error = left.of("user_error")[0]
    assert "moe.router.weight is torch.float64; master weights are float32" in error["error"]
    assert error["phase"] == "build" and not left.of("node_lost", "step_committed")
    left.assert_tail_names("def model(ctx):")


STREAM = """
class Shard:
    def __init__(self, number, count):
        self.number, self.count, self.place = number, count, 0
    def __iter__(self):
        return self
    def __next__(self):
        if self.place >= self.count:
            raise StopIteration
        self.place += 1
        return {"id": torch.tensor(self.number), "x": torch.full((4, 8), self.place / 44)}
    def state_dict(self):
        return {"place": self.place}
    def load_state_dict(self, state):
        self.place = state["place"]
class Data:
    def shard(self, i, of):
        return Shard(i, COUNTS[i])
settings = ["data.num_shards=4"]
"""


def test_shards_that_end_early_begin_again_each_by_itself(tmp_path: Path) -> None:
    """C3: also where another rank reads on in the middle of such a shard."""
    code = STREAM.replace("COUNTS[i]", "(3, 5, 2, 9)[i]")
    left = run_script(tmp_path, code, settings=('faults.specs=["kill:1@5"]',))
    assert left.code == 0, left.err[-3000:]
    assert [e["node"] for e in left.of("node_lost")] == [1]
    assert list(metrics.committed_steps(left.events)) == list(range(1, 9))


def test_a_shard_without_items_is_the_users_error(tmp_path: Path) -> None:
    """C3: its number is named, and nobody is lost."""
    left = run_script(tmp_path, STREAM.replace("COUNTS[i]", "(3, 5, 0, 9)[i]"))
    assert left.code == 1, left.err[-3000:]
    assert "shard 2 of 4 has no items" in left.of("user_error")[0]["error"]
    assert not left.of("node_lost", "step_committed")
    (end,) = left.of("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "user_code")


def test_code_that_lies_in_no_file_is_named_by_the_name_it_was_compiled_under(
    tmp_path: Path,
) -> None:
    """C3: a cell of a notebook, or a template, that ``exec`` has run."""
    cell = textwrap.dedent("""\
    def loss(model, batch):
        if POISON in batch["id"]:
            raise ValueError("no file has this line")
        return LossSum(model(batch["x"]).square().sum(), batch["x"].numel())
    """)
    left = run_script(tmp_path, f'exec(compile({cell!r}, "<cell 7>", "exec"))')
    assert left.code == 1, left.err[-3000:]
    error = left.of("user_error")[0]
    assert (error["where"], error["phase"]) == ("<cell 7>:3 in loss", "forward")
    assert 23 in error["sample_ids"] and not left.of("node_lost")
    assert "ValueError: no file has this line" in left.err
    wanted = ('"<cell 7>", line 3', "<cell 7>:3 ")
    assert any(w in shown for shown in left.tail for w in wanted), left.err[-3000:]
