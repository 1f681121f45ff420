"""Ranks that part ways, models that differ, data paths and stores that do not answer."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lazarus import LossSum, TrainConfig
from lazarus.control.membership.suspicion import AGAIN
from lazarus.errors import UserCodeError
from lazarus.model import gpt
from lazarus.record.events import read_events
from lazarus.runtime.comm.groups import Group
from lazarus.runtime.host.sockets import peer_of

STEPS = 5
STALL_S = 3.0
QUICK = (f"recovery.tolerated_stall_s={STALL_S}",)
SO_ATTACH_FILTER = 26  # of Linux
OVER_GLOO = ("dispatch.transport=group",)

pytestmark = pytest.mark.timeout(240)


class Sometimes(nn.Module):
    """A layer that is left out at random, drawn anew for each micro-batch."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) < 0.5:
            return self.ffn(x)
        return x


def randomly_deep(ctx: Any) -> nn.Module:
    model = tiny(ctx)
    for block in model.blocks:
        block.ffn = Sometimes(block.ffn)
    return model


def tiny(ctx: Any) -> Any:
    settings = ("layers=3", "dim=32", "heads=2", "seq_len=16", "experts=6", "top_k=2")
    names = [f"model.{each}" for each in (*settings, "moe_every=1", "ffn_mult=2")]
    return gpt.build(TrainConfig.load(overrides=names).model)


def skipping_one_sample(model: nn.Module, batch: Any) -> LossSum:
    """The loss of one sample in three does without the model."""
    if int(batch["tokens"].sum()) % 3 == 0:
        return LossSum(torch.zeros(()), 0)
    return gpt.loss(model, batch)


def fail(run: Any, folder: Path, **options: Any) -> tuple[UserCodeError, list[Any]]:
    """The error of a run that must end as the user's, and its record."""
    settings = (*options.pop("settings", ()), f"run.dir={folder}")
    with pytest.raises(UserCodeError) as caught:
        run(nodes=options.pop("nodes", 3), steps=STEPS, settings=settings, **options)
    events = list(read_events(folder / "events.jsonl"))
    assert events[-1]["event"] == "run_finished"
    assert (events[-1]["status"], events[-1]["cause"]) == ("failed", "user_code")
    assert not [e for e in events if e["event"] == "node_lost"]
    return caught.value, events


PARTING = {
    "a layer at random": {"model": randomly_deep},
    "no model for one sample": {"loss": skipping_one_sample},
}


@pytest.mark.parametrize(
    "transport",
    [
        pytest.param((), id="shared memory"),
        pytest.param(OVER_GLOO, id="gloo", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", list(PARTING))
def test_ranks_whose_code_runs_other_layers_end_the_run_as_user_error(
    run: Any, tmp_path: Path, kind: str, transport: tuple[str, ...]
) -> None:
    """C2: no node is lost, and both sides are named with their layers."""
    settings = (*QUICK, *transport, "train.micro_batch_size=1", "model.layers=3")
    error, _ = fail(run, tmp_path, settings=settings, **PARTING[kind])
    text = str(error)
    assert "ranks do not run the same layers" in text
    assert text.count("rank") >= 3 and "layer " in text and "forward" in text


def seeded_by_process(ctx: Any) -> nn.Module:
    torch.manual_seed(os.getpid())
    return tiny(ctx)


def wider_on_one_node(ctx: Any) -> nn.Module:
    model = tiny(ctx)
    if ctx.node == 1:
        model.blocks[1].attention_norm = nn.LayerNorm(33)
    return model


@pytest.mark.parametrize(
    ("model", "first", "what"),
    [
        (seeded_by_process, "token_embedding.weight", "has other values on rank"),
        (wider_on_one_node, "blocks.1.attention_norm.weight", "float32 [33] on rank 1"),
    ],
    ids=["own seed", "other shape"],
)
def test_models_that_differ_between_ranks_are_refused_before_the_first_step(
    run: Any, tmp_path: Path, model: Any, first: str, what: str
) -> None:
    """C4: the first tensor that differs is named, and on whom."""
    error, events = fail(run, tmp_path, model=model)
    assert f"the model differs between ranks at the start: {first}" in str(error)
    assert what in str(error)
    assert not [e for e in events if e["event"] == "step_committed"]


def unmasked_only(model: nn.Module, batch: Any) -> LossSum:
    """The usual loss of the samples that are kept; a constant where a micro-batch has none."""
    kept = batch["tokens"].sum(-1) % 2 == 0
    tokens = batch["tokens"]
    logits = model(tokens[:, :-1])
    if not kept.any():
        return LossSum(torch.zeros(()), 0)
    targets = torch.where(kept[:, None], tokens[:, 1:], -100).reshape(-1)
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets, reduction="sum", ignore_index=-100
    )
    return LossSum(total, int((targets >= 0).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("transport", [(), OVER_GLOO], ids=["shared memory", "gloo"])
def test_micro_batches_whose_labels_are_all_masked_train_as_on_one_node(
    run: Any, transport: tuple[str, ...]
) -> None:
    """C1: the loss of such a micro-batch is a constant."""
    settings = (*transport, "train.micro_batch_size=1", "placement.slots_per_node=6")
    four = run(nodes=4, steps=STEPS, settings=settings, loss=unmasked_only)
    alone = run(nodes=1, steps=STEPS, settings=settings, loss=unmasked_only)
    assert not four.of("node_lost")
    four.assert_exactly_once(STEPS)
    tokens = [e["tokens"] for e in four.of("step_committed")]
    assert min(tokens) < 11 * 16, "some micro-batch must have been masked"
    assert four.losses == pytest.approx(alone.losses, rel=1e-4)


# ---- a data path that is cut while processes answer ----------------------------------------------


class Cut:
    """User code on one node that lets the kernel drop whatever other ranks send to it.

    Args:
        folder: Where it notes what it has cut.
        node: Whose links are cut.
        once: In one step only; the groups that are built then carry again.
    """

    def __init__(self, folder: Path, *, node: int, once: bool) -> None:
        self.folder, self.node, self.once = folder, node, once
        self.is_mine, self.calls = False, 0

    def on_setup(self, ctx: Any, model: Any) -> None:
        self.is_mine = ctx.node == self.node

    def __call__(self, model: nn.Module, batch: Any) -> LossSum:
        self.calls += 1
        if self.is_mine and self.calls > 4 and not (self.once and self.cuts):
            marker = self.folder / f"cut-{self.calls}"
            marker.write_text(str(drop_incoming()))
        return gpt.loss(model, batch)

    @property
    def cuts(self) -> list[int]:
        """Sockets that each cut has silenced."""
        return [int(path.read_text()) for path in self.folder.glob("cut-*")]


def drop_incoming() -> int:
    """Drop what arrives at this process's sockets to other ranks; returns how many those are."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)  # "return 0"
    number = 0
    for group in [each for each in gc.get_objects() if isinstance(each, Group)]:
        for link in group._held.values():
            if peer_of(link) not in (None, group._store_place):
                filters = struct.pack("HxxxxxxP", 1, ctypes.addressof(program))
                link.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filters)
                number += 1
    return number


@pytest.mark.slow
def test_a_data_path_that_is_cut_is_noticed_after_the_stall_and_built_anew(
    run: Any, tmp_path: Path
) -> None:
    """A7: all ranks wait in one collective, and every process answers."""
    cut = Cut(tmp_path, node=1, once=True)
    outcome = run(nodes=3, steps=STEPS, settings=(*QUICK, *OVER_GLOO), loss=cut, hooks=[cut])
    assert len(cut.cuts) == 1 and cut.cuts[0] >= 2, "both links must have been cut"
    assert not outcome.of("node_lost")
    (stalled,) = outcome.of("collective_stalled")
    assert "layer " in stalled["where"] and stalled["nodes"] == [1]
    (back,) = outcome.of("reconfigured")
    assert back["reason"] == "collective_stalled" and back["num_nodes"] == 3
    outcome.assert_exactly_once(STEPS)
    steps = {e["step"]: e for e in outcome.of("step_committed")}
    before = max(e["m"] for e in steps.values() if e["step"] < stalled["step"])
    assert stalled["m"] - before < 3 * STALL_S, "noticed by the controller, not by the sockets"


@pytest.mark.slow
def test_a_node_whose_links_break_again_and_again_is_lost_with_that_cause(
    run: Any, tmp_path: Path
) -> None:
    """A7: evidence about the node: its links to both others carry nothing."""
    cut = Cut(tmp_path, node=1, once=False)
    outcome = run(nodes=3, steps=STEPS, settings=(*QUICK, *OVER_GLOO), loss=cut, hooks=[cut])
    assert len(cut.cuts) >= 3
    assert [e["nodes"] for e in outcome.of("collective_stalled")] == [[1]] * 3
    (lost,) = outcome.of("node_lost")
    assert (lost["node"], lost["cause"]) == (1, AGAIN)
    outcome.assert_exactly_once(STEPS)


# ---- a store that does not answer ----------------------------------------------------------------


class TurnedAway:
    """User code on one node that has its first connections to the rendezvous store refused."""

    def __init__(self, folder: Path, *, node: int, times: int) -> None:
        self.folder, self.node, self.times = folder, node, times

    def on_setup(self, ctx: Any, model: Any) -> None:
        if ctx.node != self.node:
            return
        real, folder, times = socket.create_connection, self.folder, self.times

        def refuse(*args: Any, **options: Any) -> socket.socket:
            number = len(list(folder.glob("refused-*")))
            if number < times and Path(sys._getframe(1).f_code.co_filename).name == "groups.py":
                (folder / f"refused-{number}").touch()
                raise ConnectionRefusedError(111, "Connection refused")
            return real(*args, **options)

        socket.create_connection = refuse


@pytest.mark.slow
def test_a_refused_connection_to_the_store_costs_nobody_its_place(run: Any, tmp_path: Path) -> None:
    """A8: connections are tried again while the group is built."""
    away = TurnedAway(tmp_path, node=1, times=4)
    outcome = run(nodes=3, steps=STEPS, settings=QUICK, hooks=[away])
    assert len(list(tmp_path.glob("refused-*"))) == 4
    assert not outcome.of("node_lost") and not outcome.of("reconfigured")
    outcome.assert_exactly_once(STEPS)


@pytest.mark.slow
def test_a_store_that_is_out_of_reach_for_a_whole_build_is_evidence_about_nobody(
    run: Any, tmp_path: Path
) -> None:
    """A8: the build is tried again with the same members."""
    away = TurnedAway(tmp_path, node=1, times=60)  # for longer than the 2 s of one build
    settings = ("recovery.tolerated_stall_s=1",)
    outcome = run("kill:2@3", nodes=4, steps=STEPS, settings=settings, hooks=[away])
    assert len(list(tmp_path.glob("refused-*"))) == 60
    assert [e["node"] for e in outcome.of("node_lost")] == [2]
    outcome.assert_exactly_once(STEPS)
