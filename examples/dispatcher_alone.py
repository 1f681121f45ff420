"""The dispatcher without anything around it: four ranks, six experts, replicas wherever you like.

Run: python examples/dispatcher_alone.py
"""

import torch

from dispatcher import Dispatcher, Exchange, RoutingTable, SplitRule
from dispatcher.processes import run_processes

EXPERT_OF_SLOT = [[0, 1, 2], [2, 3, 0], [4, 5, 0], [5, 1, -1]]  # [ranks, slots]; -1 is empty


def rank_main(exchange: Exchange) -> tuple[int, int, float]:
    table = RoutingTable.from_plan_arrays(EXPERT_OF_SLOT, rank=exchange.rank)
    dispatcher = Dispatcher(table, exchange=exchange, rule=SplitRule(mode="balanced"))
    experts = [torch.nn.Linear(16, 16) for _ in EXPERT_OF_SLOT[exchange.rank]]

    torch.manual_seed(exchange.rank)
    x_TD = torch.randn(100, 16, requires_grad=True)
    weight_TK, expert_TK = torch.randn(100, 6).softmax(-1).topk(2)
    arrived = dispatcher.dispatch(x_TD, expert_TK)
    y_TD = dispatcher.combine(arrived.map(lambda slot, rows: experts[slot](rows)), weight_TK)
    y_TD.square().sum().backward()
    return arrived.rows_MD.shape[0], len(arrived.groups), float(x_TD.grad.norm())


if __name__ == "__main__":
    for rank, (rows, groups, norm) in enumerate(run_processes(rank_main, size=4)):
        print(f"rank {rank} served {rows} copies with {groups} experts; gradient norm {norm:.3f}")
