"""Checks of a configuration before anything starts. Pure, except that paths are looked up."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lazarus.config.presets import BYTE_VOCAB
from lazarus.config.train_config import TrainConfig
from lazarus.errors import ConfigError, Problem
from lazarus.faults import fault_problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory in bytes: the size of a slot, and the memory of a node."""

    per_slot: float
    per_node: float  # available to slots, after subtracting the dense state


def auto_slots_per_node(
    *,
    num_experts: int,
    num_nodes: int,
    min_replicas: int,
    spare_losses: int,
    ranks_per_node: int = 1,
    memory: Memory | None = None,
) -> int:
    """The fewest slots per node with which ``min_replicas`` holds after ``spare_losses`` losses.

    An expert has at most one replica on each remaining node, and a node needs at most one slot per
    expert. If memory holds fewer slots, the result is what fits, and ``min_replicas`` holds for
    fewer losses.

    Args:
        num_experts: Experts per layer.
        num_nodes: Nodes of the run.
        min_replicas: Wanted replicas of each expert, on distinct nodes.
        spare_losses: Number of lost nodes to prepare for.
        ranks_per_node: The result is a multiple of this number.
        memory: Memory of a slot and of a node; None: unlimited.

    Raises:
        ConfigError: Memory does not hold every expert once.
    """
    left = max(1, num_nodes - spare_losses)
    slots = -(-num_experts * min(min_replicas, left) // left)
    slots = -(-min(slots, num_experts) // ranks_per_node) * ranks_per_node
    if memory is None:
        return slots
    fit = int(memory.per_node // memory.per_slot) // ranks_per_node * ranks_per_node
    if min(slots, fit) * num_nodes < num_experts:
        needed = -(-num_experts // num_nodes)
        raise ConfigError(
            f"{num_experts} experts do not fit: memory holds {fit} slots on each of {num_nodes} "
            f"nodes ({memory.per_slot / 2**30:.2f} GiB a slot, {memory.per_node / 2**30:.1f} GiB a "
            f"node), {needed} are needed. Use more nodes or smaller experts."
        )
    return min(slots, fit)


def resolve_slots_per_node(
    config: TrainConfig,
    *,
    num_experts: int,
    num_nodes: int | None = None,
    ranks_per_node: int = 1,
    memory: Memory | None = None,
) -> int:
    """The slots per node; ``"auto"`` is resolved with ``auto_slots_per_node``.

    Raises:
        ConfigError: The experts do not fit, or the slots are no multiple of ``ranks_per_node``.
    """
    nodes = config.cluster.nodes if num_nodes is None else num_nodes
    asked = config.placement.slots_per_node
    if asked == "auto":
        return auto_slots_per_node(
            num_experts=num_experts,
            num_nodes=nodes,
            min_replicas=config.placement.min_replicas,
            spare_losses=config.placement.spare_losses,
            ranks_per_node=ranks_per_node,
            memory=memory,
        )
    problems = slot_problems(
        slots=asked, num_experts=num_experts, nodes=nodes, ranks_per_node=ranks_per_node
    )
    if problems:
        raise ConfigError(problems)
    return asked


def slot_problems(
    *, slots: int, num_experts: int, nodes: int, ranks_per_node: int = 1
) -> list[Problem]:
    """Problems if the slots do not hold every expert once, or do not divide among the ranks."""
    key = "placement.slots_per_node"
    problems = []
    if slots * nodes < num_experts:
        text = (
            f"{num_experts} experts do not fit: {nodes} nodes x {slots} slots = {nodes * slots} < "
            f"{num_experts} per layer. Use >= {-(-num_experts // slots)} nodes, or "
            f"{key} >= {-(-num_experts // nodes)}."
        )
        problems.append(Problem(text, key=key))
    if slots % ranks_per_node:
        text = f"{key}={slots} does not divide among {ranks_per_node} ranks of a node"
        problems.append(Problem(text, key=key))
    return problems


def data_problems(config: TrainConfig) -> list[Problem]:
    """A problem if ``data.path`` does not exist."""
    path = config.data.path
    if path is None or Path(path).expanduser().exists():
        return []
    text = (
        f'data.path = "{path}" does not exist (looked at {Path(path).expanduser().absolute()}); '
        f"give a text file, a folder, a .npy or a .bin file, or leave it out for Python's sources"
    )
    return [Problem(text, key="data.path")]


def builtin_problems(config: TrainConfig) -> list[Problem]:
    """Problems of a run with the built-in model and data: experts, lengths, vocabulary, path."""
    model, problems = config.model, data_problems(config)
    slots = config.placement.slots_per_node
    ranks = config.cluster.ranks_per_node
    if slots != "auto":
        problems += slot_problems(
            slots=slots,
            num_experts=model.experts,
            nodes=config.cluster.nodes,
            ranks_per_node=1 if ranks == "auto" else ranks,
        )
    if config.seq_len > model.seq_len:
        text = f"data.seq_len={config.seq_len} is more than model.seq_len={model.seq_len}"
        problems.append(Problem(text, key="data.seq_len"))
    if not str(config.data.path or "").endswith((".npy", ".bin")) and model.vocab < BYTE_VOCAB:
        text = f"model.vocab={model.vocab}, but text is read as bytes: use >= {BYTE_VOCAB}"
        problems.append(Problem(text, key="model.vocab"))
    for name in ("k_snapshot", "k_persist"):
        asked = getattr(config.checkpoint, name)
        if asked != "auto" and asked > model.experts:
            text = f"checkpoint.{name}={asked} is more than model.experts={model.experts}"
            problems.append(Problem(text, key=f"checkpoint.{name}"))
    return problems


def scripted_fault_problems(config: TrainConfig) -> list[Problem]:
    """Problems of configured faults that can never happen in this run."""
    return fault_problems(
        config.faults.parsed(),
        nodes=config.cluster.nodes,
        steps=config.train.steps,
        chaos=config.faults.parsed_chaos(),
    )


def security_problems(config: TrainConfig) -> list[Problem]:
    """Problems of certificate, key and secret files that cannot be read."""
    problems = []
    for name in ("cert", "key", "ca", "secret_file"):
        path = getattr(config.security, name)
        if path is not None and not os.access(Path(path).expanduser(), os.R_OK):
            text = f'security.{name} = "{path}" cannot be read'
            problems.append(Problem(text, key=f"security.{name}"))
    return problems


BUILTIN_CHECKS: tuple[Callable[[TrainConfig], list[Problem]], ...] = (
    builtin_problems,
    scripted_fault_problems,
    security_problems,
)


def warnings_of(
    config: TrainConfig, *, num_experts: int, slots_per_node: int, ranks_per_node: int = 1
) -> list[str]:
    """Warnings about settings that work, but perhaps not as intended."""
    nodes, floor = config.cluster.nodes, config.placement.min_replicas
    out = []
    losses = 0
    while (
        nodes - losses > 1
        and min(floor, nodes - losses - 1) == floor
        and ((nodes - losses - 1) * slots_per_node >= num_experts * floor)
    ):
        losses += 1
    if nodes * slots_per_node < num_experts * floor or nodes < floor:
        real = min(nodes, nodes * slots_per_node // num_experts)
        out.append(
            f"min_replicas={floor} does not fit: {nodes} nodes x {slots_per_node} slots hold "
            f"{num_experts} experts x {real}; the floor is {real}"
        )
    elif losses == 0:
        better = -(-num_experts * floor // max(1, nodes - 1))
        out.append(
            f"min_replicas={floor} holds for 0 further losses: {nodes} nodes x {slots_per_node} "
            f"slots = {nodes * slots_per_node}, {num_experts} experts x {floor} need "
            f"{num_experts * floor}; slots_per_node={better} keeps it for 1 loss"
        )
    ranks = nodes * ranks_per_node
    if config.train.global_batch < ranks:
        out.append(
            f"train.global_batch={config.train.global_batch} samples leaves "
            f"{ranks - config.train.global_batch} of {ranks} ranks without work in each step; "
            f"use >= {ranks} (>= {20 * ranks}, 20 a rank, keeps the ranks' shares within 5 %)"
        )
    return out
