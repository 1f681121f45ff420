"""Documents by index out of text, JSON lines, parquet and saved datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazarus.data import documents as module
from lazarus.data.documents import Documents, kind_of, open_documents
from lazarus.errors import DataError

TEXTS = ["one", "", "zwei\nLäufer \u2028 end", "three" * 50, "x"]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def json_lines(place: Path, rows: list[Any]) -> Path:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def parquet(place: Path, rows: list[Any], *, group: int = 2) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), place, row_group_size=group)
    return place


def saved(place: Path, rows: list[Any]) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(place))
    return place


def opened(place: Path, column: str = "text") -> Documents:
    return open_documents(str(place), column=column)


WRITERS = {"rows.jsonl": json_lines, "rows.parquet": parquet, "rows": saved}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_the_ones_that_were_written(name: str, tmp_path: Path) -> None:
    rows = [{"id": i, "text": text, "more": [i]} for i, text in enumerate(TEXTS)]
    found = opened(WRITERS[name](tmp_path / name, rows))
    assert len(found) == len(TEXTS)
    assert [found[i] for i in reversed(range(len(found)))] == TEXTS[::-1]
    assert list(found.pieces()) == [(text, True) for text in TEXTS]


@pytest.mark.parametrize("name", WRITERS)
def test_conversations_come_from_their_column_without_what_others_have(
    name: str, tmp_path: Path
) -> None:
    rows = [{"messages": CHAT}, {"messages": [{**CHAT[0], "name": "n"}, CHAT[1]]}]
    found = opened(WRITERS[name](tmp_path / name, rows))
    assert found[0] == CHAT
    assert found[1] == rows[1]["messages"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(name: str, tmp_path: Path) -> None:
    place = WRITERS[name](tmp_path / name, [{"body": "x", "id": 1}])
    with pytest.raises(DataError, match=r"no column 'text' \(there: body, id\); set data.text_key"):
        opened(place)[0]
    assert opened(place, "body")[0] == "x"
    with pytest.raises(DataError, match="holds int; a document is a text, or a list of messages"):
        opened(place, "id")[0]


def test_a_folder_of_json_lines_is_read_in_name_order(tmp_path: Path) -> None:
    json_lines(tmp_path / "b.jsonl", [{"text": "3"}])
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "1"}\r\n\r\n{"text": "2"}')
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "README.md").write_text("about")
    found = opened(tmp_path)
    assert [found[i] for i in range(len(found))] == ["1", "2", "3"]


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": \n[1]\n')
    found = opened(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl, object 2 is not JSON"):
        found[1]
    with pytest.raises(DataError, match="object 3 is a list"):
        found[2]


@given(st.lists(st.sampled_from(["", "{}", '{"a": 1}', "\r", " x"])), st.integers(1, 7))
def test_lines_are_those_of_a_slow_twin_whatever_is_scanned_at_once(
    lines: list[str], scanned: int
) -> None:
    import numpy as np

    content = "\n".join(lines).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCANNED", scanned)
        found = module._lines_of(np.frombuffer(content, np.uint8))
    wanted = [line for line in content.split(b"\n") if line not in (b"", b"\r")]
    assert [content[first:last] for first, last in found] == wanted


def test_a_parquet_file_holds_the_last_row_groups_only(tmp_path: Path) -> None:
    rows = [{"text": str(i)} for i in range(40)]
    found = opened(parquet(tmp_path / "a.parquet", rows))
    order = [7, 39, 0, 12, 13, 25, 7, 8, 30]
    assert [found[i] for i in order] == [str(i) for i in order]
    assert len(vars(found)["_held"]) == module._GROUPS


def test_text_files_are_documents_and_long_ones_come_in_pieces_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 4)
    (tmp_path / "a.txt").write_text("ab\ncdef\ngh\nij")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "x.dat").write_bytes(b"\0\1")
    found = opened(tmp_path)
    assert len(found) == 2
    pieces = list(found.pieces())
    assert pieces == [("ab\ncdef\n", False), ("gh\nij", True), ("", True)]
    assert (found[0], found[1]) == ("ab\ncdef\n", "")


def test_text_that_is_not_utf_8_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        opened(tmp_path / "a.txt")[0]


def test_the_kind_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    for name, kind in (("a.txt", "text"), ("b.jsonl", "jsonl"), ("c.parquet", "parquet")):
        (tmp_path / name).write_text("{}")
        assert kind_of(tmp_path / name) == kind
        assert kind_of(tmp_path) == kind
    assert kind_of(saved(tmp_path / "saved", [{"text": "x"}])) == "datasets"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder"])
def test_no_documents_are_refused(name: str, tmp_path: Path) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    elif name == "a.jsonl":
        (tmp_path / name).write_text("\n\n")
    else:
        (tmp_path / name).write_text("no parquet")
    with pytest.raises(DataError, match="has no documents in it|is not parquet"):
        opened(tmp_path / name)


def test_lines_of_blanks_are_no_documents(tmp_path: Path) -> None:
    place = tmp_path / "a.jsonl"
    place.write_text(' \t\n{"text": "one"}\n\r\n  {"text": "two"}\n   ')
    assert list(opened(place)) == ["one", "two"]


def test_a_parquet_file_that_lacks_the_column_of_the_others_is_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for name, column in (("a", "text"), ("b", "body")):
        parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has no column 'text', which a\.parquet has"):
        opened(tmp_path)
