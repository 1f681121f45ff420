"""One rank of the comparison with a single process: the runtime's own Replica, World and Step.

Imported by the tests, and run by path (``runpy``) as the body of each real process.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dispatcher.exchange import Exchange
from dispatcher.splits.split import SplitRule
from lazarus.config.train_config import TrainConfig
from lazarus.data.units import Units
from lazarus.model import gpt
from lazarus.runtime.comm.groups import Group
from lazarus.runtime.comm.guarded_exchange import GuardedExchange
from lazarus.runtime.comm.standing import Standing
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import Observer
from lazarus.runtime.input.reader import open_reading
from lazarus.runtime.input.sources import RankPlace
from lazarus.runtime.state.replica import Replica
from lazarus.runtime.training import defaults
from lazarus.runtime.training.context import WorkerContext
from lazarus.runtime.training.hooks import Hooks
from lazarus.runtime.training.step import Batching, Step
from lazarus.runtime.training.world import World
from placement import PlacementRequest, Plan, plan

Balance = Literal["aux", "bias", "none"]

STEPS = 5
CONFIG = TrainConfig.load(
    overrides=[
        "model.layers=2",
        "model.dim=32",
        "model.heads=2",
        "model.seq_len=16",
        "model.experts=6",
        "model.moe_every=1",
        "model.ffn_mult=2",
        "train.global_batch=11",
        "train.micro_batch_size=2",
        "train.steps=20",
        "optim.lr=0.003",
        "optim.clip_norm=0.3",
        # Above the rounding noise of gradients that are zero in exact arithmetic (biases of keys):
        # AdamW would blow that noise up to whole learning rates.
        "optim.eps=1e-5",
        "optim.warmup_steps=2",
    ]
)
NUM_SAMPLES = 37
_BUILDING = threading.Lock()  # a model draws from the one global generator


class Tokens:
    """Map-style; a sample is a function of its index."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = np.random.default_rng(index).integers(0, 256, CONFIG.seq_len + 1)
        return {"tokens": torch.from_numpy(drawn)}


def make_model(top_k: int, balance: Balance = "aux") -> gpt.GPT:
    shape = TrainConfig.from_dict(
        CONFIG.to_dict() | {"model": CONFIG.to_dict()["model"] | {"top_k": top_k}}
    ).model
    return gpt.build(shape, options=gpt.GPTOptions(balance=balance, bias_rate=0.05))


def quiet_observer(ledger: StepLedger) -> Observer:
    return Observer(
        ledger=ledger,
        faults=(),
        send=lambda body: None,
        node_folder=Path("/nowhere"),
        go_timeout_s=1.0,
    )


def make_replica(
    top_k: int,
    *,
    overlaps: bool = False,
    balance: Balance = "aux",
    units: Units | None = None,
    num_chains: int = 1,
) -> Replica:
    with _BUILDING:
        return Replica(
            lambda: make_model(top_k, balance),
            optimizer=defaults.optimizer(CONFIG),
            schedule=defaults.schedule(CONFIG),
            clip_norm=CONFIG.optim.clip_norm,
            seed=CONFIG.run.seed,
            device=torch.device("cpu"),
            overlaps=overlaps,
            units=units,
            num_chains=num_chains,
        )


def placed(replica: Replica, exchange: Exchange, *, seed: int | None, floor: int) -> Plan:
    """Plan by loads drawn from ``seed``, or equal ones, and hold this rank's experts."""
    shape = (len(replica.layers), replica.num_experts)
    load = np.ones(shape) if seed is None else np.random.default_rng(seed).random(shape)
    adopted = plan(
        PlacementRequest(
            load=load,
            num_nodes=exchange.size,
            slots_per_node=6,
            min_replicas=min(floor, exchange.size),
        )
    )
    replica.ensure_slots(adopted.expert_of_slot.shape[2])
    for layer in range(shape[0]):
        held = [int(e) for e in adopted.expert_of_slot[layer, exchange.rank] if e >= 0]
        replica.place(layer, held, {})
    return adopted


def make_step(
    exchange: Exchange,
    *,
    top_k: int,
    ledger: StepLedger,
    precision: str = "fp32",
    hooks: Hooks | None = None,
    mode: str = "home",
    overlaps: bool = False,
    balance: Balance = "aux",
    units: Units | None = None,
    num_chains: int = 1,
    placement_seed: int | None = None,
    floor: int = 2,
) -> tuple[Replica, Step]:
    """What a rank stands at after RESUME of generation 1.

    Args:
        units: Elastic determinism, with dense gradients in ``num_chains``.
        placement_seed: Place by loads drawn from this seed instead of equal ones.
        floor: Replicas of each expert, if there are as many ranks.
    """
    replica = make_replica(
        top_k, overlaps=overlaps, balance=balance, units=units, num_chains=num_chains
    )
    adopted = placed(replica, exchange, seed=placement_seed, floor=floor)
    standing = Standing(generation=1, term=1, step=0, plan=adopted, exchange=exchange)
    rule = SplitRule(mode=mode, rows_per_replica=1.0, by_source=units is not None)
    world = World(replica, adopted, standing, rule=rule)
    reading = open_reading(
        Tokens(),
        collate=defaults.collate,
        seed=CONFIG.run.seed,
        global_batch=CONFIG.train.global_batch,
    )
    reading.seat(RankPlace(rank=exchange.rank, size=exchange.size, committed=0, units=units))
    step = Step(
        replica,
        world,
        batching=Batching(
            seed=CONFIG.run.seed,
            global_batch=CONFIG.train.global_batch,
            micro_batch_size=CONFIG.train.micro_batch_size,
            precision=precision,
            units=units,
        ),
        reading=reading,
        loss=defaults.loss,
        observer=quiet_observer(ledger),
        context=WorkerContext(
            rank=exchange.rank,
            world_size=exchange.size,
            node=exchange.rank,
            device=replica.device,
            generation=1,
            seed=CONFIG.run.seed,
            dtype=torch.float32,
        ),
        hooks=hooks or Hooks(()),
    )
    return replica, step


def train(
    exchange: Exchange,
    *,
    top_k: int,
    ledger: StepLedger,
    mode: str = "home",
    overlaps: bool = False,
    evaluating: bool = False,
    balance: Balance = "aux",
) -> dict[str, Any]:
    """Five steps; what the comparison looks at, as numpy arrays by global name.

    Args:
        evaluating: The model's modules are in evaluation mode all the while.
    """
    replica, step = make_step(
        exchange, top_k=top_k, ledger=ledger, mode=mode, overlaps=overlaps, balance=balance
    )
    replica.model.train(not evaluating)
    # Ranks that are threads share a generator: all have drawn their weights before any trains.
    exchange.all_reduce(torch.zeros(1), label="digest")
    found: dict[str, Any] = {"losses": []}
    for number in range(1, STEPS + 1):
        lanes = step.compute(number, pause=lambda: False, prepared=lambda: None)
        sums = step.check(lanes, step=number)
        if number == 1:
            found["gradients"] = gradients_of(replica)
        found["losses"].append(sums.loss)
        found["counts"] = sums.counts
        replica.apply(sums, dense_square=step.dense_square)
    state = dict(replica.dense_tensors())
    for layer, bank in enumerate(replica.banks):
        for expert in (e for e in bank.expert_of_slot if e >= 0):
            state.update(replica.expert_tensors(layer, expert))
    found["state"] = {name: tensor.numpy().copy() for name, tensor in state.items()}
    return found


def gradients_of(replica: Replica) -> dict[str, np.ndarray]:
    """Gradients of the step's sum, by global name: dense ones and those of held experts."""
    found = {name: p.grad.numpy().copy() for name, p in replica.dense if p.grad is not None}
    for path, bank in zip(replica.layer_names, replica.banks, strict=True):
        assert bank.weight.grad is not None
        for slot, expert in enumerate(bank.expert_of_slot):
            if expert >= 0:
                for field, view in bank.field_views(bank.weight.grad[slot]).items():
                    found[f"{path}.experts.{expert}.{field}"] = view.numpy().copy()
    return found


def run_process(*, rank: int, size: int, store: str, mode: str, shared: bool, pipe: Any) -> None:
    """A real process: a group over its own sockets, shared memory on top or not, as in a run."""
    torch.set_num_threads(1)
    ledger = StepLedger()
    ledger.raise_fence(1, lambda: None)
    ledger.enter(1)
    group = Group(generation=1)
    group.build(
        store=store,
        prefix=f"reference/{size}",
        rank=rank,
        size=size,
        host="127.0.0.1",
        device=torch.device("cpu"),
        timeout_s=60.0,
        connect_s=20.0,
    )
    exchange = GuardedExchange(
        group.exchange(shared=shared, timeout_s=60.0),
        ledger=ledger,
        observer=quiet_observer(ledger),
    )
    pipe.send([train(exchange, top_k=top_k, ledger=ledger, mode=mode) for top_k in (1, 2)])
    pipe.close()
    group.close()


if __name__ == "__rank__":
    run_process(**globals()["arguments"])
