"""Tokenised documents as samples, against slow and obvious twins."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import small_tokenizers
import torch
from small_tokenizers import MARKED, PLAIN, THINKING

from lazarus import TrainConfig
from lazarus.data import documents as reading
from lazarus.data import packing
from lazarus.data.documents import open_documents
from lazarus.data.packing import Packed, Padded, cache_folder, token_stream
from lazarus.data.tokenizing import Tokenizer, open_tokenizer
from lazarus.errors import DataError
from lazarus.model import gpt
from lazarus.runtime.training import defaults

TEXTS = ["the quick brown fox", "", "it is a lazy dog\n" * 9, "a b", "jumps over"]
CHATS = [
    [
        {"role": "system", "content": "be quick"},
        {"role": "user", "content": "what is a?"},
        {"role": "assistant", "content": "it is b"},
        {"role": "user", "content": "and c"},
        {"role": "assistant", "content": "it is the fox"},
    ],
    [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "lazy"}],
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return open_tokenizer(str(small_tokenizers.tokenizer_file(tmp_path / "tokenizer.json")))


def chat_tokenizer(folder: Path, template: str | None = PLAIN) -> Tokenizer:
    return open_tokenizer(str(small_tokenizers.tokenizer_folder(folder, template=template)))


def rows(place: Path, key: str, values: list[object]) -> str:
    place.write_text("".join(json.dumps({key: value}) + "\n" for value in values))
    return str(place)


def stream_of(path: str, tokenizer: Tokenizer) -> np.ndarray:
    return token_stream(open_documents(path, column="text"), tokenizer, column="text")


def test_packing_is_that_of_a_slow_twin(tmp_path: Path, tokenizer: Tokenizer) -> None:
    wanted: list[int] = []
    for text in TEXTS:
        wanted += [*tokenizer.encode([text])[0], tokenizer.end or 0]
    stream = stream_of(rows(tmp_path / "a.jsonl", "text", TEXTS), tokenizer)
    found = Packed(stream, seq_len=8)
    assert len(found) == len(wanted) // 8
    for i in range(len(found)):
        assert found[i]["input_ids"].tolist() == wanted[8 * i : 8 * i + 8]
        assert found[i]["labels"].tolist() == wanted[8 * i : 8 * i + 8]
    with pytest.raises(IndexError):
        found[len(found)]


def test_padding_is_that_of_a_slow_twin(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = open_documents(rows(tmp_path / "a.jsonl", "text", TEXTS), column="text")
    found = Padded(documents, tokenizer, seq_len=8, first=1)
    assert len(found) == len(TEXTS) - 1
    for i, text in enumerate(TEXTS[1:]):
        ids = [*tokenizer.encode([text])[0], tokenizer.end][:8]
        fill = 8 - len(ids)
        assert found[i]["input_ids"].tolist() == ids + [tokenizer.pad] * fill
        assert found[i]["labels"].tolist() == ids + [-100] * fill
        assert found[i]["attention_mask"].tolist() == [1] * len(ids) + [0] * fill


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKING], ids=["plain", "marked", "thinking"])
def test_only_the_assistants_words_count(template: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model", template)
    path = rows(tmp_path / "a.jsonl", "messages", CHATS)
    found = Padded(open_documents(path, column="text"), tokenizer, seq_len=200)
    loaded = vars(tokenizer)["_loaded"]
    for i, chat in enumerate(CHATS):
        ids, labels = found[i]["input_ids"], found[i]["labels"]
        whole = loaded.apply_chat_template(chat, tokenize=True)["input_ids"]
        assert ids[: len(whole)].tolist() == whole
        counted = labels != -100
        assert torch.equal(ids[counted], labels[counted])
        said = [m["content"] + "<|end|>" for m in chat if m["role"] == "assistant"]
        if template == THINKING:
            said[-1] = "(hm) " + said[-1]
        assert loaded.decode(ids[counted].tolist()) == "".join(said)


def test_packed_conversations_count_the_same_words(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "model")
    path = rows(tmp_path / "a.jsonl", "messages", CHATS)
    alone = Padded(open_documents(path, column="text"), tokenizer, seq_len=200)
    wanted: list[tuple[int, int]] = []
    for i in range(len(CHATS)):
        size = int(alone[i]["attention_mask"].sum())
        wanted += zip(
            alone[i]["input_ids"].tolist(), alone[i]["labels"].tolist()[:size], strict=False
        )
        wanted += [(tokenizer.end or 0, -100)]
    packed = Packed(stream_of(path, tokenizer), seq_len=4)
    got = [
        (packed[i]["input_ids"].tolist(), packed[i]["labels"].tolist()) for i in range(len(packed))
    ]
    flat = [pair for ids, labels in got for pair in zip(ids, labels, strict=True)]
    assert len(flat) == len(wanted) // 4 * 4
    assert flat == wanted[: len(flat)]


def test_a_template_that_hides_where_a_turn_is_is_refused(tmp_path: Path) -> None:
    shouting = "{% for m in messages %}{{ m.content | upper }}{{ loop.length }}{% endfor %}"
    tokenizer = chat_tokenizer(tmp_path / "model", shouting)
    with pytest.raises(DataError, match="turn 3 cannot be found in what the chat template makes"):
        tokenizer.converse(CHATS[0])


def test_conversations_need_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for one in (tokenizer, chat_tokenizer(tmp_path / "model", None)):
        with pytest.raises(DataError, match="no chat template"):
            one.converse(CHATS[0])


def test_a_long_text_is_tokenised_in_pieces_with_one_end(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PIECE", 40)
    (tmp_path / "a.txt").write_text(TEXTS[2] * 3)
    stream = stream_of(str(tmp_path / "a.txt"), tokenizer)
    loaded = vars(tokenizer)["_loaded"]
    assert (
        loaded.decode(stream.tolist(), skip_special_tokens=False) == TEXTS[2] * 3 + "<|endoftext|>"
    )


def test_tokens_are_made_once_for_each_state_of_the_files(
    tmp_path: Path, tokenizer: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows(tmp_path / "a.jsonl", "text", TEXTS)
    first = stream_of(path, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", lambda *args: pytest.fail("tokenised again"))
        assert stream_of(path, tokenizer).tolist() == first.tolist()
    os.utime(path, ns=(0, 0))
    assert stream_of(path, tokenizer).tolist() == first.tolist()
    assert len(list(cache.iterdir())) == 2


def test_of_two_that_tokenise_at_once_the_first_ones_tokens_are_taken(
    tmp_path: Path, tokenizer: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows(tmp_path / "a.jsonl", "text", TEXTS)
    batches = packing._batches

    def slow(documents: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_batches", batches)
            stream_of(path, tokenizer)
        return batches(documents)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_batches", slow)
        found = stream_of(path, tokenizer)
    assert found.tolist() == stream_of(path, tokenizer).tolist()
    assert [file.suffix for file in cache.iterdir()] == [".u32"]


def test_unfinished_tokens_of_a_writer_that_is_gone_are_deleted(
    tmp_path: Path, tokenizer: Tokenizer, cache: Path
) -> None:
    cache.mkdir(parents=True)
    old, new = cache / "old.part", cache / "new.part"
    for part in (old, new):
        part.write_bytes(b"x")
    os.utime(old, (0, 0))
    stream_of(rows(tmp_path / "a.jsonl", "text", TEXTS), tokenizer)
    assert not old.exists() and new.exists()


def test_a_failure_leaves_no_tokens(tmp_path: Path, tokenizer: Tokenizer, cache: Path) -> None:
    path = rows(tmp_path / "a.jsonl", "text", ["a", 3])
    with pytest.raises(DataError, match="object 2 holds int"):
        stream_of(path, tokenizer)
    assert list(cache.iterdir()) == []


def test_packing_needs_an_end_of_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Loaded
    from tokenizers.models import WordLevel

    Loaded(WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "words.json"))
    tokenizer = open_tokenizer(str(tmp_path / "words.json"))
    path = rows(tmp_path / "a.jsonl", "text", TEXTS)
    with pytest.raises(DataError, match="no end-of-text token"):
        stream_of(path, tokenizer)
    assert len(Padded(open_documents(path, column="text"), tokenizer, seq_len=4)) == len(TEXTS)


@pytest.mark.parametrize("packing", [True, False])
def test_the_configuration_splits_samples_into_two_parts(
    packing: bool, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    settings = [
        f"data.path={rows(tmp_path / 'a.jsonl', 'body', TEXTS * 4)}", "data.text_key=body",
        f"data.tokenizer={tokenizer.name}", f"data.packing={str(packing).lower()}",
        "data.split=0.75", "data.seq_len=8",
    ]  # fmt: skip
    config = TrainConfig.load(overrides=settings)
    train, held_out = defaults.training_data(config), defaults.held_out_data(config)
    assert len(train) == int(0.75 * (len(train) + len(held_out)))
    seen = [
        tuple(part[i]["input_ids"].tolist()) for part in (train, held_out) for i in range(len(part))
    ]
    documents = open_documents(config.data.path, column="body")
    whole = Padded(documents, tokenizer, seq_len=8)
    if packing:
        whole = Packed(token_stream(documents, tokenizer, column="body"), seq_len=8)  # type: ignore
    assert seen == [tuple(whole[i]["input_ids"].tolist()) for i in range(len(whole))]


def test_the_built_in_loss_counts_what_counts() -> None:
    shape = gpt.GPTConfig(
        layers=1, dim=8, heads=1, vocab=50, seq_len=8, experts=2, top_k=1, ffn_mult=1
    )
    torch.manual_seed(0)
    model, ids = gpt.build(shape), torch.randint(50, (2, 9))
    whole = gpt.loss(model, {"tokens": ids})
    same = gpt.loss(model, {"input_ids": ids})
    assert torch.equal(whole.total, same.total) and int(same.count) == whole.count == 16
    labels = ids.clone()
    labels[0, :] = -100
    labels[1, 5:] = -100
    part = gpt.loss(model, {"input_ids": ids, "labels": labels})
    logits = model(ids[:, :-1])[1, :4]
    wanted = torch.nn.functional.cross_entropy(logits, ids[1, 1:5], reduction="sum")
    assert int(part.count) == 4
    torch.testing.assert_close(part.total, wanted)
