"""Expert loads of a run's steps in a file that stays small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lazarus.record.load_history import LoadHistory, each_load

SHAPE = (2, 3)


def counts(step: int) -> np.ndarray:
    return np.full(SHAPE, float(step))


def steps_in(path: Path) -> list[int]:
    for step, counts_LE in each_load(path):
        assert (counts_LE == step).all()
    return [step for step, _ in each_load(path)]


def test_every_step_of_a_short_run_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "loads.bin"
    for first in (1, 6):  # the next controller goes on
        history = LoadHistory(path)
        for step in range(first, first + 5):
            history.add(step, counts(step))
        history.flush()
    assert steps_in(path) == list(range(1, 11))


@pytest.mark.parametrize("total", [1_000, 10_000])
def test_a_long_run_keeps_every_so_many_th(tmp_path: Path, total: int) -> None:
    path = tmp_path / "loads.bin"
    for first in range(1, total + 1, 50):
        history = LoadHistory(path, most_bytes=4096)
        for step in range(first, first + 50):
            history.add(step, counts(step))
        history.flush()
        assert path.stat().st_size <= 4096
    kept = steps_in(path)
    strides = set(np.diff(kept).tolist())
    assert len(strides) == 1 and len(kept) > 50 and kept[-1] > total - strides.pop()


def test_half_a_record_and_a_foreign_file_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "loads.bin"
    history = LoadHistory(path)
    for step in (1, 2, 3):
        history.add(step, counts(step))
    history.flush()
    path.write_bytes(path.read_bytes()[:-1])
    assert steps_in(path) == [1, 2]
    path.write_bytes(b"a poem")
    assert steps_in(path) == []
