"""Square sums of gradients: right, and the same bits wherever a row lies."""

from __future__ import annotations

import pytest
import torch

from lazarus.runtime.state.norms import STRETCH, square_sums


@pytest.mark.parametrize("size", [1, 5, STRETCH - 1, STRETCH, STRETCH + 1, 9 * STRETCH + 77])
def test_they_are_those_of_double_precision(size: int) -> None:
    row = torch.randn(size, generator=torch.Generator().manual_seed(size))
    (found,) = square_sums([row])
    assert found == pytest.approx(float(row.double().square().sum()), rel=1e-6)


def test_their_bits_do_not_depend_on_the_place_of_the_row() -> None:
    row = torch.randn(3 * STRETCH + 19, generator=torch.Generator().manual_seed(1))
    bank = torch.zeros(row.numel() + 32)
    found = set()
    for start in range(32):
        bank[start : start + row.numel()] = row
        found.add(square_sums([bank[start : start + row.numel()]])[0])
    assert len(found) == 1


def test_large_gradients_that_overflow_in_single_precision_are_still_summed() -> None:
    (found,) = square_sums([torch.full((2 * STRETCH,), 1e25)])
    assert found == pytest.approx(2 * STRETCH * 1e50)


def test_what_is_not_finite_shows() -> None:
    poisoned = torch.zeros(2 * STRETCH)
    poisoned[7] = torch.nan
    boundless = torch.zeros(3)
    boundless[0] = torch.inf
    nan, inf, zero = square_sums([poisoned, boundless, torch.zeros(4)])
    assert nan != nan and inf == float("inf") and zero == 0.0


def test_no_rows_have_no_sums() -> None:
    assert square_sums([]) == []
