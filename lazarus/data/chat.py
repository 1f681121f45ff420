"""Conversations as tokens by a tokenizer's chat template, with the assistant's words marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lazarus.data.documents import Message
from lazarus.errors import DataError

ASSISTANT = "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\b")  # templates that mark the assistant's words themselves
_UNCLEAR = "cannot be found in what the chat template makes; mark it with {% generation %} there"

Span = tuple[int, int]  # first character and end


class Rendered(NamedTuple):
    """Token ids of a conversation, and whether each is a word of the assistant."""

    ids: list[int]
    counts: list[bool]


def rendered(tokenizer: Any, messages: Sequence[Message], *, name: str) -> Rendered:
    """Render a conversation by the chat template of a ``transformers`` tokenizer.

    If the template marks what the assistant generates, the marks are taken. Otherwise the
    conversation is rendered up to each of the assistant's turns and to its end: what comes in
    between, with the token that ends the turn, are the assistant's words.

    Raises:
        DataError: There is no template, or it refuses the messages, or its texts do not tell where
            a turn begins and ends.
    """
    template = tokenizer.chat_template
    if not template:
        raise DataError(f"the tokenizer in {name} has no chat template, which conversations need")
    try:
        if isinstance(template, str) and _MARKS.search(template):
            return _by_marks(tokenizer, messages)
        whole = _text(tokenizer, messages)
        spans = [
            _turn(tokenizer, messages, index, whole)
            for index, message in enumerate(messages)
            if message["role"] == ASSISTANT
        ]
    except DataError:
        raise
    except Exception as problem:  # templates raise what they like
        text = f"the chat template in {name} refuses a conversation: {problem}"
        raise DataError(text) from problem
    return _tokens(tokenizer, whole, spans)


def _by_marks(tokenizer: Any, messages: Sequence[Message]) -> Rendered:
    found = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return Rendered(list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]])


def _text(tokenizer: Any, messages: Sequence[Message], *, asks: bool = False) -> str:
    found: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=asks
    )
    return found


def _turn(tokenizer: Any, messages: Sequence[Message], index: int, whole: str) -> Span:
    """Where the assistant's turn ``index`` is in the text of the whole conversation."""
    before = _text(tokenizer, messages[:index]) if index else ""
    asked = _text(tokenizer, messages[:index], asks=True) if index else ""
    content = str(messages[index]["content"] or "").strip()
    if len(asked) > len(before) and whole.startswith(asked):
        start = len(asked)
    else:  # the template shows no header, or another one, where the assistant is to begin
        start = whole.find(content, len(before))
        if start < 0 or not whole.startswith(before):
            raise DataError(f"the assistant's turn {index + 1} {_UNCLEAR}")
    alone = _text(tokenizer, messages[: index + 1])
    end = len(alone)
    if not whole.startswith(alone):  # as the last turn, it is rendered in another way
        at = whole.find(content, start)
        tail = alone[alone.rfind(content) + len(content) :]
        end = at + len(content) + len(tail)
        if not content or at < 0 or not whole.startswith(tail, at + len(content)):
            raise DataError(f"the assistant's turn {index + 1} {_UNCLEAR}")
    return start, start + len(whole[start:end].rstrip("\n"))


def _tokens(tokenizer: Any, whole: str, spans: Sequence[Span]) -> Rendered:
    if not tokenizer.is_fast:
        return _piecewise(tokenizer, whole, spans)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts = [
        first < last and any(start <= first < end for start, end in spans)
        for first, last in found["offset_mapping"]
    ]
    return Rendered(list(found["input_ids"]), counts)


def _piecewise(tokenizer: Any, whole: str, spans: Sequence[Span]) -> Rendered:
    """By a tokenizer without offsets: the pieces between the spans' edges, each on its own."""
    ids: list[int] = []
    counts: list[bool] = []
    at = 0
    for start, end in [*spans, (len(whole), len(whole))]:
        for piece, counted in ((whole[at:start], False), (whole[start:end], True)):
            found = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            ids += found
            counts += [counted] * len(found)
        at = end
    return Rendered(ids, counts)
