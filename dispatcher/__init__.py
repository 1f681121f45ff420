"""Token dispatch for mixtures of experts: replicas on any ranks, no token dropped or padded.

``Dispatcher`` is the general interface. Needs PyTorch and NumPy only.
"""

from dispatcher.dispatcher import Dispatched, Dispatcher
from dispatcher.errors import (
    DispatchError,
    DispatchInputError,
    HandleError,
    LinkError,
    PeerInputError,
    RankMismatchError,
    RanksPartedError,
    RoutingTableError,
)
from dispatcher.exchange import Exchange, Pending, SoloExchange, TorchExchange
from dispatcher.gradients import flat_all_reduce, slots_for_exchange, sum_replica_gradients
from dispatcher.layer.dispatch import Routed, finish_routing, route, start_routing
from dispatcher.layer.general import ExpertFunction
from dispatcher.layer.layout import ExpertLayout, RowLayout, TensorLayout
from dispatcher.layer.path import PathOptions, expert_path
from dispatcher.local.blocks import shared_zeros
from dispatcher.local.shared import SharedExchange, within_machine
from dispatcher.loopback import LoopbackExchange, LoopbackWorld, run_ranks
from dispatcher.splits.routing import RoutingTable
from dispatcher.splits.split import SplitRule

__all__ = [
    "DispatchError",
    "DispatchInputError",
    "Dispatched",
    "Dispatcher",
    "Exchange",
    "ExpertFunction",
    "ExpertLayout",
    "HandleError",
    "LinkError",
    "LoopbackExchange",
    "LoopbackWorld",
    "PathOptions",
    "PeerInputError",
    "Pending",
    "RankMismatchError",
    "RanksPartedError",
    "Routed",
    "RoutingTable",
    "RoutingTableError",
    "RowLayout",
    "SharedExchange",
    "SoloExchange",
    "SplitRule",
    "TensorLayout",
    "TorchExchange",
    "expert_path",
    "finish_routing",
    "flat_all_reduce",
    "route",
    "run_ranks",
    "shared_zeros",
    "slots_for_exchange",
    "start_routing",
    "sum_replica_gradients",
    "within_machine",
]
