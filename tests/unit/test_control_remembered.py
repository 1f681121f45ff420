"""Answers kept by identity, and tables with entries taken out."""

from __future__ import annotations

from lazarus.control.cluster.remembered import remembered
from lazarus.control.cluster.state import without


def test_an_answer_is_worked_out_once_for_the_same_two_objects() -> None:
    asked: list[tuple[int, ...]] = []

    @remembered
    def total(weights: dict[int, int], keys: tuple[int, ...]) -> int:
        asked.append(keys)
        return sum(weights[key] for key in keys)

    weights, keys = {1: 10, 2: 20}, (1, 2)
    assert [total(weights, keys) for _ in range(3)] == [30, 30, 30]
    assert len(asked) == 1
    assert total({1: 1, 2: 2}, keys) == 3  # another table, though the keys are the same object
    assert total(weights, (2,)) == 20
    assert total(weights, keys) == 30 and len(asked) == 3


def test_few_answers_are_kept_and_none_is_taken_for_another_s() -> None:
    @remembered
    def first(table: list[int], key: str) -> int:
        return table[0]

    key = "k"
    for number in range(100):  # each list dies, and the next may lie where it lay
        assert first([number], key) == number


def test_a_table_loses_the_keys_it_has_and_is_itself_without_any() -> None:
    table = {"a": 1, "b": 2}
    assert without(table, {"b", "c"}) == {"a": 1} and table == {"a": 1, "b": 2}
    assert without(table, ()) is table
