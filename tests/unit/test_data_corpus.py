"""Tokens from text, folders, token files and the default text."""

from pathlib import Path

import numpy as np
import pytest

from lazarus.data.corpus import check_tokens, datasets, load_corpus
from lazarus.errors import DataError


def test_the_default_text_is_python_and_needs_no_download() -> None:
    corpus = load_corpus()
    assert corpus.tokens.shape[0] > 1_000_000
    assert b"import" in corpus.tokens.tobytes()[:100_000]
    assert corpus.digest() == load_corpus().digest()


def test_windows_share_one_token_with_their_neighbour(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(65, 65 + 26)))
    train, held_out = datasets(load_corpus(str(tmp_path / "a.txt")), seq_len=5, split=0.8)
    assert len(train) == 4 and held_out is not None and len(held_out) == 1
    assert bytes(train[0]["tokens"].tolist()) == b"ABCDEF"
    assert bytes(train[1]["tokens"].tolist()) == b"FGHIJK"
    assert bytes(held_out[0]["tokens"].tolist()) == b"UVWXYZ"
    with pytest.raises(IndexError):
        train[4]


def test_a_folder_is_read_in_name_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bb")
    (tmp_path / "a.txt").write_text("aa")
    (tmp_path / "sub" / "c.txt").write_text("cc")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "x.bin").write_bytes(b"\0\1\2")
    assert load_corpus(str(tmp_path)).tokens.tobytes() == b"aa\nbb\ncc"


@pytest.mark.parametrize(
    ("name", "dtype"), [("t.npy", "<u4"), ("t.bin", "<u2"), ("t.u32.bin", "<u4")]
)
def test_token_files_are_memory_mapped(tmp_path: Path, name: str, dtype: str) -> None:
    tokens = np.arange(1000, dtype=dtype)
    path = tmp_path / name
    np.save(path, tokens) if name.endswith("npy") else tokens.tofile(path)
    corpus = load_corpus(str(path))
    assert isinstance(corpus.tokens, np.memmap)
    assert np.array_equal(corpus.tokens, tokens)
    check_tokens(corpus, vocab=1000)
    with pytest.raises(DataError, match="holds token 999, but model.vocab=900"):
        check_tokens(corpus, vocab=900)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "is not there"),
        ("empty.txt", b"", "has no text"),
        ("odd.bin", b"abc", "is not a token file"),
        ("not.npy", b"hello world", "is not a token file"),
    ],
)
def test_unusable_data_says_what_is_wrong(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_corpus(str(path))


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "evil.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is not a token file"):
        load_corpus(str(path))


def test_too_little_text_names_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError, match=r"5 tokens = 0 windows of 64 \+ 1"):
        datasets(load_corpus(str(tmp_path / "a.txt")), seq_len=64, split=0.9)
