"""The journal: one numbered sequence, whoever writes a number first has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lazarus.errors import JournalError, LazarusError
from lazarus.record import journal_reader
from lazarus.record.journal_reader import entries_after, newest_state, read_journal
from lazarus.runtime.controller.journal import FOLD_ENTRIES, Journal, JournalConflictError


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


def fill(folder: Path, count: int, *, every: int = 10) -> Journal:
    """Entries 1 to ``count``, folded behind each that is divided by ``every``."""
    journal = Journal(folder)
    for step in range(1, count + 1):
        lanes = {"generation": 1, "step": step, "lanes": "AAAA"}
        journal.append({"kind": "commits", "step": step, "commits": [lanes]})
        if step % every == 0:
            journal.fold(state(step))
    return journal


def state(step: int) -> str:
    return json.dumps({"step": step}, separators=(",", ":"))


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_journal(folder)]


def test_a_restart_reads_the_newest_state_and_what_came_after_it(tmp_path: Path) -> None:
    fill(tmp_path, 35)
    assert newest_state(tmp_path) == (30, {"step": 30})
    assert [(n, e["step"]) for n, e in entries_after(tmp_path, 30)] == [
        (n, n) for n in range(31, 36)
    ]
    assert Journal(tmp_path).append({"kind": "term"}) == 36


def test_however_long_a_journal_is_its_folder_stays_small(tmp_path: Path) -> None:
    fill(tmp_path, 1000)
    entries = journal_reader.numbers_in(tmp_path)
    assert entries == list(range(991, 1001))
    assert journal_reader.states_in(tmp_path) == [990, 1000]
    assert steps(tmp_path) == list(range(1, 1001))
    archived = read_journal(tmp_path)[0]["commits"][0]
    assert archived == {"generation": 1, "step": 1}, "vectors are not archived"


def test_it_is_time_to_fold_after_many_entries(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(FOLD_ENTRIES):
        assert not journal.is_long
        journal.append({"kind": "evaluated", "step": number})
    assert journal.is_long and Journal(tmp_path).is_long
    journal.fold("{}")
    assert not journal.is_long and not Journal(tmp_path).is_long


def test_an_old_controller_cannot_take_a_number_that_was_archived(tmp_path: Path) -> None:
    older, newer = fill(tmp_path, 7), Journal(tmp_path)
    for step in range(8, 31):
        newer.append({"kind": "claim", "step": step})
        if step % 10 == 0:
            newer.fold(state(step))
    with pytest.raises(JournalConflictError, match="entry 8 exists"):
        older.append({"kind": "claim"})
    assert steps(tmp_path) == list(range(1, 31))
    assert not (tmp_path / "000000008.json").exists()


@pytest.mark.parametrize("survive", [0, 1, 7, 10])
def test_a_death_between_archiving_and_tidying_up_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survive: int
) -> None:
    journal = fill(tmp_path, 29)
    journal.append({"kind": "claim", "step": 30})
    unlink = Path.unlink
    gone: list[Path] = []

    def dies(path: Path, *, missing_ok: bool = False) -> None:
        if path.suffix == ".json":
            gone.append(path)
            if len(gone) > survive:
                raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            journal.fold(state(30))
    assert steps(tmp_path) == list(range(1, 31))
    later = Journal(tmp_path)
    later.append({"kind": "claim", "step": 31})
    later.fold(state(31))
    assert steps(tmp_path) == list(range(1, 32))
    assert journal_reader.states_in(tmp_path) == [30, 31]


def test_half_a_line_at_the_end_of_the_archive_is_written_anew(tmp_path: Path) -> None:
    """A controller that died while it archived: the entries are still where they were."""
    journal = fill(tmp_path, 20)
    with (tmp_path / "archive.jsonl").open("ab") as out:
        out.write(journal_reader.sealed(11, "entry", {"kind": "claim", "step": 11})[:-9])
    assert steps(tmp_path) == list(range(1, 21))
    journal = Journal(tmp_path)
    journal.append({"kind": "claim", "step": 21})
    journal.fold(state(21))
    assert journal_reader.numbers_in(tmp_path) == [21]
    assert steps(tmp_path) == list(range(1, 22))


def test_who_reads_while_entries_are_archived_sees_them_all(tmp_path: Path) -> None:
    journal = fill(tmp_path, 29)
    read = journal_reader.read_bytes
    folded: list[int] = []

    def folds_meanwhile(path: Path, *, most: int) -> bytes:
        if path.name == "000000015.json" and not folded:
            folded.append(1)
            journal.append({"kind": "claim", "step": 30})
            journal.fold(state(30))
        return read(path, most=most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_reader, "read_bytes", folds_meanwhile)
        entries = read_journal(tmp_path)
    assert folded
    assert [entry["step"] for entry in entries] == list(range(1, 31))


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_no_flipped_bit_of_an_entry_is_taken_for_true(tmp_path: Path) -> None:
    """D11: every bit, one after the other; the file is named."""
    journal = Journal(tmp_path)
    journal.append({"kind": "claim", "generation": 7, "members": [0, 1]})
    path = tmp_path / "000000001.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped(path, bit)
        with pytest.raises(JournalError, match="000000001.json: is "):
            list(entries_after(tmp_path, 0))
        path.write_bytes(whole)
    assert len(list(entries_after(tmp_path, 0))) == 1


def test_where_the_newest_state_is_damaged_the_one_before_it_and_a_longer_tail_do(
    tmp_path: Path,
) -> None:
    """D11: damage to the newest state costs a restart nothing but time."""
    fill(tmp_path, 35)
    flipped(journal_reader.state_path(tmp_path, 30), 400)
    assert newest_state(tmp_path) == (20, {"step": 20})
    assert [n for n, _ in entries_after(tmp_path, 20)] == list(range(21, 36))
    flipped(journal_reader.state_path(tmp_path, 20), 400)
    with pytest.raises(JournalError, match="state/0000000[23]0.json: is damaged"):
        newest_state(tmp_path)


def test_a_file_under_another_number_is_found_out(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    (tmp_path / "000000003.json").write_bytes((tmp_path / "000000002.json").read_bytes())
    with pytest.raises(JournalError, match="000000003.json: is in the wrong place"):
        list(entries_after(tmp_path, 0))


def test_foreign_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    """D10: what has not the name of an entry is none."""
    fill(tmp_path, 5)
    (tmp_path / "notes.json").write_text("mine")
    (tmp_path / "000000006.json.bak").write_text("mine")
    (tmp_path / "1.json").mkdir()
    assert Journal(tmp_path).append({"kind": "claim", "step": 6}) == 6
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_journal_of_format_1_is_read_and_never_written(tmp_path: Path) -> None:
    (tmp_path / "000000001-000001000.jsonl").write_text(
        "".join(f'{{"kind":"claim","step":{step}}}\n' for step in range(1, 1001))
    )
    (tmp_path / "000001001.json").write_text('{"kind":"claim","step":1001}')
    assert steps(tmp_path) == list(range(1, 1002))
    with pytest.raises(JournalError, match="earlier version; this one writes format 2"):
        Journal(tmp_path)
