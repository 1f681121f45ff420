"""Placement of Mixture-of-Experts replicas on nodes: load-balanced and able to survive losses.

Start with ``PlacementRequest``, ``plan`` and ``replan``.
"""

from placement.balance.allocate import allocate_as_paper, allocate_replicas
from placement.certificate import Certificate, certificate
from placement.errors import InfeasiblePlacementError, InvalidRequestError
from placement.plan import Plan
from placement.policy import PlacementPolicy, plan, policy_from_path, replan
from placement.request import PlacementRequest

__all__ = [
    "Certificate",
    "InfeasiblePlacementError",
    "InvalidRequestError",
    "PlacementPolicy",
    "PlacementRequest",
    "Plan",
    "allocate_as_paper",
    "allocate_replicas",
    "certificate",
    "plan",
    "policy_from_path",
    "replan",
]
