"""The journal: one numbered sequence, whoever writes a number first has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lazarus.errors import LazarusError
from lazarus.runtime.controller import _earlier
from lazarus.runtime.journal import Journal, JournalConflictError, read_journal


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for term in range(1, 15):
        assert journal.append({"kind": "term", "term": term}) == term
    assert [entry["term"] for entry in read_journal(tmp_path)] == list(range(1, 15))


def test_of_two_controllers_only_one_gets_a_number(tmp_path: Path) -> None:
    older, newer = Journal(tmp_path), Journal(tmp_path)
    newer.append({"kind": "claim", "generation": 2})
    with pytest.raises(JournalConflictError, match="entry 1 exists"):
        older.append({"kind": "commits", "commits": []})
    assert [entry["kind"] for entry in read_journal(tmp_path)] == ["claim"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_later_life_goes_on_behind_the_last_entry(tmp_path: Path) -> None:
    Journal(tmp_path).append({"kind": "header"})
    assert Journal(tmp_path).append({"kind": "term", "term": 2}) == 2


def test_half_an_entry_is_never_read(tmp_path: Path) -> None:
    """A writer that died left its draft; its number is free, its content nothing."""
    journal = Journal(tmp_path)
    journal.append({"kind": "header"})
    (tmp_path / ".000000002.4711").write_text('{"kind": "cla')
    assert [entry["kind"] for entry in read_journal(tmp_path)] == ["header"]
    assert Journal(tmp_path).append({"kind": "term", "term": 2}) == 2


def test_a_gap_is_an_error_that_names_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for term in (1, 2, 3):
        journal.append({"kind": "term", "term": term})
    (tmp_path / "000000002.json").unlink()
    with pytest.raises(LazarusError, match="lacks entry 2"):
        read_journal(tmp_path)


def test_half_a_line_of_the_record_is_cut_off(tmp_path: Path) -> None:
    record = tmp_path / "events.jsonl"
    record.write_text(json.dumps({"event": "a"}) + "\n" + '{"event": "b')
    assert _earlier(record) == [{"event": "a"}]
    assert record.read_text() == json.dumps({"event": "a"}) + "\n"
