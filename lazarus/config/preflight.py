"""Checks of a configuration before anything starts. Pure, except that paths are looked up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lazarus.config.presets import BYTE_VOCAB
from lazarus.config.train_config import TrainConfig
from lazarus.errors import Problem
from lazarus.faults import fault_problems

TOKEN_FILES = (".npy", ".bin")  # ends of names of files that hold tokens
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")  # written by ``save_to_disk``


def stated_ranks_per_node(config: TrainConfig) -> int:
    """``cluster.ranks_per_node``; 1 for "auto", because the nodes' GPUs are not known yet."""
    stated = config.cluster.ranks_per_node
    return 1 if stated == "auto" else stated


def slot_problems(
    *, slots: int, num_experts: int, nodes: int, ranks_per_node: int
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
    """Problems if ``data.path`` or ``data.tokenizer`` is to be read but cannot be."""
    if config.data.source is not None:
        return []
    return [*_path_problems(config), *_tokenizer_problems(config)]


def _path_problems(config: TrainConfig) -> list[Problem]:
    path = config.data.path
    if path is None:
        return []
    place = Path(path).expanduser()
    if place.exists():
        saved = any((place / name).is_file() for name in SAVED_DATASET)
        if config.data.tokenizer is None and (saved or place.suffix == ".parquet"):
            text = f'data.path = "{path}" is no plain text; data.tokenizer says how it is read'
            return [Problem(text, key="data.path")]
        return []
    text = (
        f'data.path = "{path}" does not exist (looked at {Path(path).expanduser().absolute()}); '
        f"give a text file, a folder, a .npy or a .bin file, or leave it out for Python's sources"
    )
    return [Problem(text, key="data.path")]


def _tokenizer_problems(config: TrainConfig) -> list[Problem]:
    name = config.data.tokenizer
    if name is None:
        return []
    text = ""
    if name == "hf":
        if config.model.hf is not None:
            return []
        text = 'data.tokenizer = "hf" is the tokenizer of model.hf, which is not set'
    elif not Path(name).expanduser().exists():
        text = f'data.tokenizer = "{name}" does not exist'
    elif str(config.data.path or "").endswith(TOKEN_FILES):
        text = f'data.tokenizer = "{name}", but data.path holds tokens already'
    return [Problem(text, key="data.tokenizer")] if text else []


def builtin_problems(config: TrainConfig) -> list[Problem]:
    """Problems of a run with the built-in model and data: experts, lengths, vocabulary, path.

    Nothing is known of a model or of data that the configuration names a function for.
    """
    model, problems = config.model, data_problems(config)
    if config.model.builder is not None or config.model.hf is not None:
        return problems
    slots = config.placement.slots_per_node
    if slots != "auto":
        problems += slot_problems(
            slots=slots,
            num_experts=model.experts,
            nodes=config.cluster.nodes,
            ranks_per_node=stated_ranks_per_node(config),
        )
    if config.data.source is None:
        problems += _token_problems(config)
    for name in ("k_snapshot", "k_persist"):
        asked = getattr(config.checkpoint, name)
        if asked != "auto" and asked > model.experts:
            text = f"checkpoint.{name}={asked} is more than model.experts={model.experts}"
            problems.append(Problem(text, key=f"checkpoint.{name}"))
    return problems


def _token_problems(config: TrainConfig) -> list[Problem]:
    """Problems if the built-in data's samples do not suit the built-in model."""
    model, problems = config.model, []
    if config.seq_len > model.seq_len:
        text = f"data.seq_len={config.seq_len} is more than model.seq_len={model.seq_len}"
        problems.append(Problem(text, key="data.seq_len"))
    is_bytes = not (config.data.tokenizer or str(config.data.path or "").endswith(TOKEN_FILES))
    if is_bytes and model.vocab < BYTE_VOCAB:
        text = f"model.vocab={model.vocab}, but text is read as bytes: use >= {BYTE_VOCAB}"
        problems.append(Problem(text, key="model.vocab"))
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


def warnings_of(config: TrainConfig, *, num_experts: int, slots_per_node: int) -> list[str]:
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
    ranks = nodes * stated_ranks_per_node(config)
    if config.train.global_batch < ranks:
        out.append(
            f"train.global_batch={config.train.global_batch} samples leaves "
            f"{ranks - config.train.global_batch} of {ranks} ranks without work in each step; "
            f"use >= {ranks} (>= {20 * ranks}, 20 a rank, keeps the ranks' shares within 5 %)"
        )
    if config.optim.warmup_steps >= config.train.steps:
        out.append(
            f"optim.warmup_steps={config.optim.warmup_steps} is not below "
            f"train.steps={config.train.steps}: the learning rate is still rising when the run ends"
        )
    return out
