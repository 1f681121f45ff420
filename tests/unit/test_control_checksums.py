"""A checksum is no count: what a rank really says of its model is not refused as malformed."""

from __future__ import annotations

from lazarus.control.membership import checks
from lazarus.control.messages import TensorSum


def test_any_checksum_of_64_bits_passes_and_counts_stay_bounded() -> None:
    for bits in (1, checks.MOST + 1, (1 << 63) - 1):
        assert checks._odd_fields(TensorSum(name="w", kind="float32 [2]", sum=bits)) == ""
    assert checks._odd_field("step", checks.MOST + 1) != ""
