"""Compute the first plan of a run with the run's own code, without starting processes.

As for a real run, the folder is taken, the checkpoint to resume from is chosen, the checkpoint URL
is tried and the driver's settings are made. Then the controller's ``decide`` is called with the
answers that workers would give, until it orders the first plan. No files are left behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cloudpickle
import torch
from msgspec.structs import replace as changed

from lazarus.basics.tracebacks import describe
from lazarus.checkpoint.errors import CheckpointError
from lazarus.config.train_config import TrainConfig
from lazarus.control.machine import decide
from lazarus.control.messages import Align, Aligned, Body, Fence, Hello, Prepare, Report, RunOver
from lazarus.control.plans.planning import node_bytes
from lazarus.control.ports import Command, Tell, TellDriver, WorkerSaid, each
from lazarus.control.restart.replay import initial_state
from lazarus.control.vector import start_history
from lazarus.errors import (
    BrokenInvariantError,
    ConfigError,
    LazarusError,
    Problem,
    UserCodeError,
)
from lazarus.run.run_place import RunPlace
from lazarus.run.run_spec import prepared, scratch_folder
from lazarus.run.trainer import ElasticTrainer
from lazarus.runtime.host.memory import visible_bytes
from lazarus.runtime.launch.choose_launcher import (
    joins_cluster,
    own_hosts,
    require_own_address,
)
from lazarus.runtime.rpc.credentials import check_certificate
from lazarus.runtime.saving.rollback_state import read_base
from lazarus.runtime.spec import RunSpec, UserCode
from lazarus.runtime.training import defaults
from lazarus.runtime.training.factory import first_context, first_replica
from lazarus.runtime.training.hollow import hollow_shape
from placement import Plan

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a run keeps in memory, before it has a plan.

    Attributes:
        dense_bytes: Dense state of a rank: parameters, optimizer state, buffers.
        expert_bytes: State of one expert.
        num_experts: Experts of a layer.
        num_layers: Layers with experts.
    """

    dense_bytes: int
    expert_bytes: int
    num_experts: int
    num_layers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstPlan:
    """The plan that a run would begin with, and the memory that it takes.

    Attributes:
        plan: The plan.
        node_bytes: What a node's dense state, experts and gradients take.
        memory_bytes: Memory of a node; 0: not known.
    """

    plan: Plan
    node_bytes: float
    memory_bytes: int


def first_plan(trainer: ElasticTrainer, place: RunPlace) -> Plan:
    """The plan of ``planned``."""
    return planned(trainer, place).plan


def planned(
    trainer: ElasticTrainer,
    place: RunPlace,
    *,
    memory_bytes: int = 0,
    on_state: Callable[[State], None] = lambda state: None,
) -> FirstPlan:
    """Plan as a run would begin. The run's folder is given back.

    On an existing cluster, zones and memory of the machines are not known before the run's nodes
    start; the plan then ignores both.

    Args:
        trainer: The run's trainer.
        place: The run's folder.
        memory_bytes: Memory of each rank; 0: this machine's.
        on_state: Called before the plan is made, which may be refused.

    Raises:
        ConfigError: The run would be refused, with the same message.
        UserCodeError: The user's model or optimizer raised.
        StorageError: The checkpoint storage is full or out of order.
    """
    scratch = scratch_folder(place)
    try:
        spec = prepared(
            place,
            policies=trainer.policies,
            faults=trainer.faults,
            user=trainer.user,
            scratch=scratch,
        )
        require_own_address(spec.config.security.bind)
        if not joins_cluster(spec.config):
            check_certificate(spec.credentials, host=own_hosts(spec.config)[0])
        aligned = _aligned(spec)
        names = ("dense_bytes", "expert_bytes", "num_experts", "num_layers")
        on_state(State(**{name: getattr(aligned, name) for name in names}))
        hellos = _hellos(spec, memory_bytes)
        plan, ranks = _ordered(spec, aligned, hellos), spec.control.ranks_per_node
        return FirstPlan(
            plan=plan,
            node_bytes=node_bytes(aligned, slots=plan.slots_per_node, ranks=ranks),
            memory_bytes=min(hello.memory_bytes for hello in hellos),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        place.leave()


def _aligned(spec: RunSpec) -> Aligned:
    """The ``Aligned`` message that every rank of the run would send before the first generation."""
    device, user = torch.device("cpu"), _unpickled(spec.user)
    context = first_context(spec.config, node=0, device=device)
    if spec.config.model.hf is not None and user.model is None and spec.resume is None:
        shape = _hollow(spec.config, user)
        history = start_history(shape["num_layers"], shape["num_experts"])
    else:
        replica = _of_user(lambda: first_replica(spec.config, user, context=context))
        shape, history = replica.shape(), replica.history
        if spec.resume is not None:
            try:
                history = read_base(spec.resume, replica).history
            except CheckpointError as problem:
                text = f"cannot resume from {spec.resume.url}: {problem}"
                raise ConfigError(text) from problem
    return Aligned(
        generation=0,
        step=spec.control.start_step,
        history=history.astype("<f8").tobytes(),
        scalars="{}",
        **shape,
    )


def _hollow(config: TrainConfig, user: UserCode) -> dict[str, Any]:
    """The shape of the model in the folder ``model.hf``, which is built without memory.

    Raises:
        ConfigError: The folder's model cannot be trained.
        UserCodeError: The user's optimizer raised.
    """
    try:
        model = defaults.hollow_model(config)
    except (ValueError, ImportError) as problem:
        text = f'model.hf = "{config.model.hf}": {problem}'
        raise ConfigError(Problem(text, key="model.hf")) from problem
    return _of_user(
        lambda: hollow_shape(
            model,
            optimizer=user.optimizer or defaults.optimizer(config),
            scratch_buffers=config.train.scratch_buffers,
        )
    )


def _of_user(build: Callable[[], T]) -> T:
    """Build model and optimizer as every worker of the run would.

    Raises:
        UserCodeError: The user's model or optimizer raised.
    """
    try:
        return build()
    except LazarusError:
        raise
    except Exception as problem:
        said = describe(problem)
        raise UserCodeError(
            where=f"build at {said.place}" if said.place else "build",
            summary=said.summary,
            traceback_text=said.shown,
            phase="build",
        ) from problem


def _unpickled(blob: bytes) -> UserCode:
    user: UserCode = cloudpickle.loads(blob)  # made by this very process
    return user


def _ordered(spec: RunSpec, aligned: Aligned, hellos: Sequence[Hello]) -> Plan:
    """Run the controller's decisions, with workers that answer at once, up to the first plan.

    Raises:
        ConfigError: The controller ends the run.
        BrokenInvariantError: The controller orders no plan.
    """
    config = spec.control
    state = initial_state(config, term=1, now_s=0.0)
    asked: list[Body] = []
    said: list[tuple[str, Body]] = [(hello.worker, hello) for hello in hellos]
    while said:
        worker, body = said.pop(0)
        state, commands = decide(state, WorkerSaid(worker=worker, body=body, at_s=0.0))
        for order, to in _orders(commands):
            asked.append(order)
            match order:
                case Prepare():
                    return Plan.from_json(order.plan)
                case Fence(generation=generation):
                    step = config.start_step
                    report = Report(generation=generation, committed=step, prepared=step, entered=0)
                    said.append((to, report))
                case Align(generation=generation):
                    said.append((to, changed(aligned, generation=generation)))
                case RunOver(failure=failure) if failure is not None:
                    raise ConfigError(failure.message)
    names = ", ".join(type(order).__name__ for order in asked)
    raise BrokenInvariantError(f"the controller ordered no plan, but {names}")


def _hellos(spec: RunSpec, memory_bytes: int) -> list[Hello]:
    """The ``Hello`` messages of all ranks of the first nodes.

    Args:
        spec: The run.
        memory_bytes: Memory of each rank; 0: in an embedded run, the nodes share this machine's
            equally.
    """
    control = spec.control
    memory = memory_bytes * control.ranks_per_node
    if not memory:
        memory = 0 if joins_cluster(spec.config) else visible_bytes() // control.nodes
    return [
        Hello(
            worker=f"n{node}.{local_rank}",
            node_key=f"n{node}",
            local_rank=local_rank,
            ranks_per_node=control.ranks_per_node,
            version=control.version,
            memory_bytes=memory,
        )
        for node in range(control.nodes)
        for local_rank in range(control.ranks_per_node)
    ]


def _orders(commands: Iterable[Command]) -> list[tuple[Body, str]]:
    """The messages to workers, with the worker's name, and to the driver, with an empty name."""
    found: list[tuple[Body, str]] = []
    for command in each(commands):
        if isinstance(command, Tell):
            found.append((command.body, command.worker))
        elif isinstance(command, TellDriver):
            found.append((command.body, ""))
    return found
