"""Experiments that need no simulated time: survival of losses, skewed load, checkpoint stalls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from lazarus.record.loads import LoadTrace, fitted, load_loads, zipf_load
from lazarus.simulate.inputs.costs import PROFILES, grouped_step, replicated_step
from lazarus.simulate.inputs.shapes import SHAPES, Shape
from lazarus.simulate.studies.scenarios import Files
from placement import PlacementRequest, certificate, plan, replan
from placement.assignment.baselines import baseline
from placement.migration.migrate import transfers

Table = list[dict[str, Any]]

# (shape, training step, lost nodes, published: experts moved, transfer seconds, whole change)
_MULTI = (
    ("gpt-s", 200, 2, 11, 2.3, 21.3),
    ("gpt-s", 4000, 3, 52, 3.0, 34.1),
    ("gpt-l", 200, 4, 160, 7.6, 18.2),
    ("gpt-l", 4000, 5, 55, 7.8, 19.7),
)
_PUBLISHED_SURVIVAL = {("gpt-l", 200, 4): {"mro": 0.41, "spread": 0.12}}


def _load(files: Files, shape: Shape) -> LoadTrace:
    if files.expert_load is not None and files.expert_load.is_file():
        trace = load_loads(files.expert_load)
        return fitted(trace, num_layers=shape.moe_layers, num_experts=shape.experts)
    return zipf_load(shape.moe_layers, shape.experts, 1.0)


def multi_node(files: Files) -> Table:
    """Loss of several of ten nodes at once: probability of survival, experts moved, duration.

    The number of experts moved is the mean over up to 20 sets of lost nodes that every expert
    survives.

    Source: Lazarus, Table 2 and Figure 8.
    """
    rows: Table = []
    costs = PROFILES["rtx3090-100g"]
    for name, step, lost, moved, transfer_s, whole_s in _MULTI:
        shape = SHAPES[name]
        load = _load(files, shape).at(step)
        request = PlacementRequest(load=load, num_nodes=10, slots_per_node=6)
        survival = {"lazarus": _survival(plan(request), lost)}
        for other in ("mro", "spread", "compact"):
            survival[other] = _survival(baseline(other, request), lost)
        ours, busiest = _moved(request, load, lost)
        took_s = busiest * shape.expert_bytes / costs.net_bytes_per_s + costs.transfer_fixed_s
        rows.append(
            {
                "part": f"{name} step {step}, {lost} lost",
                "survival": {k: round(p, 3) for k, p in survival.items()},
                "survival_published": _PUBLISHED_SURVIVAL.get((name, step, lost), {}),
                "experts_moved": round(ours, 1),
                "experts_moved_published": moved,
                "transfer_s": round(took_s, 2),
                "transfer_s_published": transfer_s,
                "change_s": round(
                    took_s
                    + costs.detect_s
                    + costs.releasing_s(10 - lost)
                    + costs.grouping_s(10 - lost),
                    2,
                ),
                "change_s_published": whole_s,
            }
        )
    return rows


def _survival(made: Any, lost: int) -> float:
    return float(certificate(made, max_losses=lost).survival[lost])


def _moved(request: PlacementRequest, load: Any, lost: int) -> tuple[float, float]:
    """Mean number of replicas moved after losing ``lost`` nodes: in total, by the busiest node."""
    rng, before = np.random.default_rng(0), plan(request)
    moved, busiest = [], []
    for _ in range(200):
        gone = frozenset(int(n) for n in rng.choice(10, size=lost, replace=False))
        alive = [i for i in range(10) if i not in gone]
        if not before.node_member[:, :, alive].any(2).all():
            continue
        after = PlacementRequest(
            load=load, num_nodes=len(alive), slots_per_node=6, node_ids=tuple(alive)
        )
        todo = transfers(before, replan(after, previous=before, lost=gone), lost=gone)
        into = np.bincount([t.target_node for t in todo], minlength=10)
        out = np.bincount([t.source_node for t in todo], minlength=10)
        moved.append(len(todo))
        busiest.append(max(into.max(), out.max()))
        if len(moved) == 20:
            break
    return float(np.mean(moved)), float(np.mean(busiest))


def skew(files: Files) -> Table:
    """Step time of one layer of eight experts as one expert gets up to four times its fair share.

    Source: the ablation in the Lazarus paper, where the step time with replicas stays constant and
    fixed expert parallelism slows down drastically.
    """
    del files
    shape, costs = SHAPES["gpt-s"], PROFILES["rtx3090-100g"]
    rows: Table = []
    for ratio in (1, 2, 3, 4):
        load = np.ones((1, 8))
        load[0, 0] = ratio * 7 / (8 - ratio)
        load /= load.sum()
        made = plan(PlacementRequest(load=load, num_nodes=10, slots_per_node=6))
        ours = replicated_step(costs, shape, made, load, tokens=40960).total
        theirs = grouped_step(costs, shape, load, nodes=10, group=2, tokens=40960).total
        rows.append(
            {
                "part": f"{ratio}:1",
                "lazarus_step_s": round(ours, 4),
                "ds_step_s": round(theirs, 4),
                "survives_3": round(_survival(made, 3), 3),
            }
        )
    return rows


# A LLaMA-like model with 24 layers of 8 experts, as MoC-System simulates it.
_PEC = Shape(
    name="llama-moe-8e", moe_layers=24, dim=2048, hidden=5632, matrices=3, experts=8, top_k=2,
    dense_params=0.65e9, attention_layers=24, seq_len=2048,
)  # fmt: skip


def pec(files: Files) -> Table:
    """Stall of a snapshot, and length of the iteration with it, by size of the cluster.

    The whole state is sharded over all GPUs. "Blocking" copies and writes within the step, "async"
    copies during forward and backward, "partial" copies one of eight experts at a time. The
    micro-batch of a GPU is constant, so a GPU of a larger cluster has less to save.

    Source: MoC-System, its simulation: 1 GB/s of snapshot on an A800, 20 % of its peak.
    """
    del files
    flops, copy, write = 312e12 * 0.20, 1e9, 0.5e9
    active = _PEC.dense_flops + 6 * _PEC.top_k * _PEC.moe_layers * _PEC.expert_params
    busy_s = 4096 * active / flops  # forward and backward of one micro-batch
    rows: Table = []
    for gpus in (8, 64, 256, 1024):
        full = _PEC.total_bytes / gpus
        part = (_PEC.dense_bytes + (_PEC.total_bytes - _PEC.dense_bytes) / _PEC.experts) / gpus
        blocking = full / copy + full / write
        async_s, pec_s = max(0.0, full / copy - busy_s), max(0.0, part / copy - busy_s)
        rows.append(
            {
                "part": f"{gpus} GPUs",
                "forward_backward_s": round(busy_s, 3),
                "stall_blocking_s": round(blocking, 3),
                "stall_async_s": round(async_s, 3),
                "stall_partial_s": round(pec_s, 3),
                "iteration_blocking_over_partial": round((busy_s + blocking) / (busy_s + pec_s), 2),
                "published": "3.25 to 5.12 at 8 and 16 GPUs, another model",
                "stall_saved": round(1 - pec_s / blocking, 3),
                "stall_saved_published": "0.982 to 0.989",
            }
        )
    return rows


TABLES: Mapping[str, Callable[[Files], Table]] = MappingProxyType(
    {"multi-node": multi_node, "skew": skew, "pec": pec}
)
TABLE_FILES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"multi-node": ("load",), "skew": (), "pec": ()}
)
