"""Checks for users' own streams, policies and layers; each raises if a requirement is not met."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lazarus.checkpoint.format.lineage import Lineage, extended
from lazarus.checkpoint.restoring.policy import ClusterView, RecoveryPolicy, decision_of, on_history
from lazarus.checkpoint.restoring.restore_choice import Copy, Loss, Source, StoredCheckpoint
from lazarus.data.stream import ShardIterator, StreamSource
from lazarus.errors import DataError
from lazarus.model.conformance import check_layer


def check_stream(
    source: StreamSource, *, num_shards: int = 4, items: int = 64, tries: int = 8, seed: int = 0
) -> None:
    """Check that a stream continues identically after being interrupted at random places.

    Args:
        source: The stream.
        num_shards: Number of shards to split the stream into.
        items: At most so many items of each shard are read.
        tries: Interruptions of each shard.
        seed: Seed of the random places.

    Raises:
        DataError: A shard reads differently the second time or after a resume, or its state is not
            made of JSON values and tensors.
    """
    rng = random.Random(f"check_stream {seed}")
    for i in range(num_shards):
        straight = list(itertools.islice(source.shard(i, num_shards), items))
        again = list(itertools.islice(source.shard(i, num_shards), items))
        if not same(straight, again):
            raise DataError(f"shard {i} of {num_shards} reads differently the second time")
        for _ in range(tries):
            place = rng.randint(0, len(straight))
            state = _state_at(source.shard(i, num_shards), place, shard=i)
            resumed = source.shard(i, num_shards)
            resumed.load_state_dict(state)
            rest = list(itertools.islice(resumed, len(straight) - place))
            if not same(rest, straight[place:]):
                raise DataError(
                    f"shard {i} of {num_shards}, interrupted after {place} items and resumed from "
                    f"its state, goes on differently"
                )


def _state_at(iterator: ShardIterator, place: int, *, shard: int) -> Mapping[str, Any]:
    for _ in range(place):
        next(iterator)
    state = iterator.state_dict()
    if (wrong := _not_plain(state, "state")) is not None:
        raise DataError(f"shard {shard}: {wrong}; a state is made of JSON values and tensors")
    kept = copy.deepcopy(state)
    next(iterator, None)  # a state that is a live view of the iterator changes here
    if not same(kept, state):
        raise DataError(f"shard {shard}: its state changes after it was taken; return a copy")
    return kept


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal. Tensors and arrays must agree in dtype and values."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def _not_plain(value: Any, path: str) -> str | None:
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor | np.ndarray):
        return None
    if isinstance(value, Mapping):
        inside: Sequence[tuple[str, Any]] = [(f"{path}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        return f"{path} is a {type(value).__name__}"
    return next((wrong for where, v in inside if (wrong := _not_plain(v, where))), None)


def conformance(
    *,
    recovery: RecoveryPolicy | None = None,
    layer: Callable[[], nn.Module] | None = None,
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
    seed: int = 0,
    rounds: int | None = None,
) -> int:
    """Check a recovery policy on many random losses, or a layer on many random placements.

    ``placement.testing.conformance`` does the same for a placement policy.

    A layer must compute, on any ranks and with any replicas, the outputs, gradients and counts that
    it computes alone. It must do so with ranks that have no samples, with repeated forwards of
    activation checkpointing, and after being copied.

    Args:
        recovery: The policy, called as ``recovery(losses, view, now_s=...)``.
        layer: Builds the layer, or a model with one or more of them. The experts must fit in memory
            many times over: use a small one.
        call: Runs what ``layer`` builds on tokens [T, D] and returns [T, any width]; every token by
            itself. None: the module is called with the tokens.
        seed: Seed of the random losses or placements.
        rounds: Number of random questions (None: 200) or placements (None: 6).

    Returns:
        The number of questions or placements.

    Raises:
        AssertionError: The policy raised, gave an answer that cannot be carried out, gave two
            answers to the same question, or changed its arguments; the message has the question.
            Or the layer does not keep to ``lazarus.model.protocol.ElasticLayer``; the message says
            in what.
        TypeError: Neither or both of policy and layer are given.
    """
    if (recovery is None) == (layer is None):
        raise TypeError("pass either recovery= or layer=")
    if layer is not None:
        return check_layer(layer, call=call, seed=seed, rounds=6 if rounds is None else rounds)
    assert recovery is not None
    return _check_recovery(recovery, seed=seed, rounds=200 if rounds is None else rounds)


def _check_recovery(recovery: RecoveryPolicy, *, seed: int, rounds: int) -> int:
    rng = random.Random(f"conformance {seed}")
    for number in range(rounds):
        losses, view = on_history(*_question(rng))
        name = f"question {number} of seed {seed}: {losses} in {view}"
        now_s = rng.uniform(0.0, 1e6)
        kept = copy.deepcopy((losses, view))
        try:
            answers = [recovery(losses, view, now_s=now_s) for _ in range(2)]
            for answer in answers:
                decision_of(answer, losses, view)
        except Exception as problem:
            raise AssertionError(f"{type(problem).__name__}: {problem} ({name})") from problem
        assert answers[0] == answers[1], f"two answers, {answers[0]} and {answers[1]} ({name})"
        assert kept == (losses, view), f"the question was changed ({name})"
    return rounds


def _question(rng: random.Random) -> tuple[tuple[Loss, ...], ClusterView]:
    """Random lost experts of a run with several generations and perhaps a rollback."""
    lineage: Lineage = ()
    step = start = rng.choice((0, 0, 70))
    for generation in range(1, 2 + rng.randrange(4)):
        lineage = extended(lineage, generation=generation, step=step)
        step += rng.randrange(40)
        if rng.random() < 0.2:
            step = rng.randint(start, step)
    generation = len(lineage)
    nodes = tuple(sorted(rng.sample(range(12), rng.randint(1, 6))))
    stored = tuple(
        StoredCheckpoint(
            generation=rng.randint(1, generation), step=rng.randint(start, step + 5),
            is_full=rng.random() < 0.5,
        )
        for _ in range(rng.randrange(4))
    )  # fmt: skip
    experts = rng.sample([(x, e) for x in range(3) for e in range(8)], rng.randint(1, 5))
    losses = tuple(_loss(rng, key, generation, (start, step), nodes) for key in sorted(experts))
    view = ClusterView(
        step=step, nodes=nodes, lineage=lineage, checkpoints=stored, start_step=start,
        in_flight=rng.choice((-1, step)), plt=rng.choice((0.0, 0.03, 0.2)), plt_budget=0.05,
        waited_s=rng.choice((0.0, 4.0)),
    )  # fmt: skip
    return losses, view


def _loss(
    rng: random.Random,
    key: tuple[int, int],
    generation: int,
    steps: tuple[int, int],
    nodes: Sequence[int],
) -> Loss:
    """One lost expert with random copies; also its initial state, if the run began at step 0."""
    first, last = steps
    layer, expert = key
    copies = [
        Copy(
            layer=layer, expert=expert, generation=rng.randint(1, generation),
            step=rng.randint(first, last), source=source, routed=rng.randrange(1000),
            node=-1 if source is Source.STORAGE else rng.choice(nodes),
        )
        for source in rng.choices((Source.OWN_NODE, Source.OTHER_NODE, Source.STORAGE), k=3)
    ][: rng.randrange(4)]  # fmt: skip
    if first == 0:
        copies.append(Copy(layer=layer, expert=expert, generation=0, step=0, source=Source.INITIAL))
    targets = tuple(rng.sample(nodes, rng.randint(1, min(3, len(nodes)))))
    return Loss(layer=layer, expert=expert, targets=targets, routed=1000, copies=tuple(copies))
