"""Dense gradients by units: every number of ranks gives the bits of the slow, obvious order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dispatcher import Exchange, run_ranks
from lazarus.data.units import Units
from lazarus.runtime.state.dense_chains import DenseChains

NUMEL = 37
UNITS = Units(global_batch=13, unit_size=2)


def gradient(unit: int, step: int) -> Tensor:
    """Sizes differ by orders of magnitude, so that another order has other bits."""
    made = torch.Generator().manual_seed(100 * step + unit)
    return torch.randn(NUMEL, generator=made) * 10.0 ** (unit % 5 - 2)


def slowly(step: int, num_chains: int) -> Tensor:
    chains: dict[int, Tensor] = {}
    for unit in range(UNITS.count):
        chain = unit % num_chains
        found = gradient(unit, step)
        chains[chain] = chains[chain] + found if chain in chains else found
    total = chains[0]
    for chain in range(1, len(chains)):
        total = total + chains[chain]
    return total


@pytest.mark.parametrize("num_chains", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_any_number_of_ranks_sums_in_the_order_of_the_units(ranks: int, num_chains: int) -> None:
    def body(exchange: Exchange) -> list[Tensor]:
        flat, found = torch.zeros(NUMEL), []
        sync = DenseChains(flat, UNITS, num_chains=num_chains)
        sync.begin_generation()
        for step in (1, 2):
            flat.zero_()
            sync.start_step()
            for number, unit in enumerate(UNITS.dealt(exchange.rank, exchange.size)):
                # A round without a unit leaves something behind, which must not count.
                flat += torch.full((NUMEL,), 7.0) if unit is None else gradient(unit, step)
                sync.unit_done(exchange, number)
            sync.finish(exchange)
            found.append(flat.clone())
        return found

    for found in run_ranks(body, size=ranks):
        for step, got in enumerate(found, start=1):
            assert torch.equal(got, slowly(step, num_chains))


def test_another_order_has_other_bits() -> None:
    assert not torch.equal(slowly(1, 1), slowly(1, 2))


def test_an_abandoned_attempt_leaves_nothing_behind() -> None:
    def body(exchange: Exchange) -> Tensor:
        flat = torch.zeros(NUMEL)
        sync = DenseChains(flat, UNITS)
        flat += 5.0
        sync.unit_done(exchange, 0)  # then a peer is lost
        flat.zero_()
        sync.start_step()
        for number, unit in enumerate(UNITS.dealt(exchange.rank, exchange.size)):
            flat += 0.0 if unit is None else gradient(unit, 1)
            sync.unit_done(exchange, number)
        return sync.finish(exchange)._flat_grad

    for got in run_ranks(body, size=2):
        assert torch.equal(got, slowly(1, 1))


@pytest.mark.parametrize("num_chains", [1, 2])
def test_a_model_without_trained_dense_parameters_sums_nothing(num_chains: int) -> None:
    def body(exchange: Exchange) -> int:
        sync = DenseChains(torch.zeros(0), UNITS, num_chains=num_chains)
        sync.begin_generation()
        for number in range(UNITS.num_rounds(exchange.size)):
            sync.unit_done(exchange, number)
        return sync.finish(exchange)._flat_grad.numel()

    assert run_ranks(body, size=2) == [0, 0]
