"""The journal: one numbered sequence, whoever writes a number first has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lazarus.errors import LazarusError
from lazarus.journals import FOLD, read_journal
from lazarus.runtime.controller import _earlier
from lazarus.runtime.journal import Journal, JournalConflictError


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


def fill(folder: Path, count: int) -> Journal:
    journal = Journal(folder)
    for step in range(count):
        journal.append({"kind": "commits", "step": step})
    return journal


def test_a_long_journal_is_folded_and_reads_the_same(tmp_path: Path) -> None:
    fill(tmp_path, 2 * FOLD + 3)
    assert [entry["step"] for entry in read_journal(tmp_path)] == list(range(2 * FOLD + 3))
    assert len(list(tmp_path.iterdir())) == 2 + 3
    assert Journal(tmp_path).append({"kind": "term"}) == 2 * FOLD + 4


def test_an_old_controller_cannot_take_a_number_that_was_folded_away(tmp_path: Path) -> None:
    fill(tmp_path, FOLD - 2)
    older, newer = Journal(tmp_path), Journal(tmp_path)
    for step in (FOLD - 2, FOLD - 1, FOLD):
        newer.append({"kind": "commits", "step": step})
    with pytest.raises(JournalConflictError, match=f"entry {FOLD - 1} exists"):
        older.append({"kind": "claim"})
    assert [entry["step"] for entry in read_journal(tmp_path)] == list(range(FOLD + 1))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_death_between_folding_and_tidying_up_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = fill(tmp_path, FOLD - 1)
    unlink = Path.unlink
    gone: list[Path] = []

    def dies(path: Path, *, missing_ok: bool = False) -> None:
        if path.suffix == ".json":
            gone.append(path)
            if len(gone) > 7:
                raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            journal.append({"kind": "commits", "step": FOLD - 1})
    assert [entry["step"] for entry in read_journal(tmp_path)] == list(range(FOLD))
    assert Journal(tmp_path).append({"kind": "commits", "step": FOLD}) == FOLD + 1
    assert [entry["step"] for entry in read_journal(tmp_path)] == list(range(FOLD + 1))


def test_who_reads_while_entries_are_folded_sees_them_all(tmp_path: Path) -> None:
    journal = fill(tmp_path, FOLD - 1)
    read = Path.read_text
    folded: list[int] = []

    def folds_meanwhile(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "000000500.json" and not folded:
            folded.append(1)
            journal.append({"kind": "commits", "step": FOLD - 1})
        return read(path, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", folds_meanwhile)
        entries = read_journal(tmp_path)
    assert folded
    assert [entry["step"] for entry in entries] == list(range(FOLD))


def test_a_death_before_folding_leaves_files_that_are_read_in_their_place(tmp_path: Path) -> None:
    journal = fill(tmp_path, FOLD - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "_fold", lambda *_: None)
        journal.append({"kind": "commits", "step": FOLD - 1})
    later = Journal(tmp_path)
    for step in range(FOLD, 2 * FOLD + 1):
        later.append({"kind": "commits", "step": step})
    assert [entry["step"] for entry in read_journal(tmp_path)] == list(range(2 * FOLD + 1))
