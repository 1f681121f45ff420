"""Tokenizers: a file of the ``tokenizers`` library, or a folder that ``transformers`` reads.

Both libraries belong to the extra ``hf`` and are imported when a tokenizer is opened.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lazarus.data.chat import Rendered, rendered
from lazarus.data.documents import Message
from lazarus.errors import DataError

FOLDER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
# End-of-text tokens by common names; a folder's tokenizer names its own.
_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>", "[SEP]",
)  # fmt: skip


class Tokenizer(ABC):
    """Turns documents into token ids.

    Attributes:
        name: The file or folder, for messages.
        vocab: The highest token id + 1.
        end: Id of the token that ends a text; None: there is no such token.
        pad: Id that fills what is too short.
    """

    name: str
    vocab: int
    end: int | None
    pad: int

    @abstractmethod
    def encode(self, texts: Sequence[str], *, begins: bool = True) -> list[list[int]]:
        """Token ids of each text.

        Args:
            texts: The texts.
            begins: Add the tokens with which the tokenizer begins a text, if there are any.
        """

    @abstractmethod
    def converse(self, messages: Sequence[Message]) -> Rendered:
        """Token ids of a conversation, and which of them are the assistant's words.

        Raises:
            DataError: The tokenizer has no chat template, or the template refuses the messages.
        """

    @abstractmethod
    def digest(self) -> str:
        """A fingerprint of everything that decides which ids a document gets."""


class FileTokenizer(Tokenizer):
    """A ``tokenizer.json``. Its chat template is not in the file, so it reads texts only."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        self.name = str(file)
        try:
            self._loaded = Loaded.from_file(str(file))
        except Exception as problem:  # the library raises plain exceptions
            raise DataError(f"data.tokenizer = {file} cannot be read: {problem}") from problem
        self._loaded.no_padding()
        self._loaded.no_truncation()
        known = self._loaded.get_vocab(with_added_tokens=True)
        self.vocab = max(known.values(), default=-1) + 1
        self.end = next((known[name] for name in _ENDS if name in known), None)
        self.pad = self.end or 0
        self._bytes = file.read_bytes()

    def encode(self, texts: Sequence[str], *, begins: bool = True) -> list[list[int]]:
        found = self._loaded.encode_batch(list(texts), add_special_tokens=begins)
        return [one.ids for one in found]

    def converse(self, messages: Sequence[Message]) -> Rendered:
        raise DataError(
            f"data.tokenizer = {self.name} has no chat template, which conversations need; name "
            f"the folder of a model"
        )

    def digest(self) -> str:
        import tokenizers

        return hashlib.sha256(tokenizers.__version__.encode() + self._bytes).hexdigest()


class FolderTokenizer(Tokenizer):
    """The tokenizer of a model's folder, as ``transformers`` reads it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.name, self._folder = str(folder), folder
        try:
            self._loaded: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as problem:  # whatever files of this kind make the library raise
            reason = next(iter(str(problem).splitlines()), type(problem).__name__)
            raise DataError(f"the tokenizer in {folder} cannot be read: {reason}") from problem
        known = self._loaded.get_vocab()
        self.vocab = max(known.values(), default=-1) + 1
        self.end = self._loaded.eos_token_id
        pad = self._loaded.pad_token_id
        self.pad = pad if pad is not None else self.end or 0

    def encode(self, texts: Sequence[str], *, begins: bool = True) -> list[list[int]]:
        found: list[list[int]] = self._loaded(
            list(texts),
            add_special_tokens=begins,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return found

    def converse(self, messages: Sequence[Message]) -> Rendered:
        return rendered(self._loaded, messages, name=self.name)

    def digest(self) -> str:
        import transformers

        seen = hashlib.sha256(transformers.__version__.encode())
        for file in sorted(self._folder.iterdir()):
            if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt"):
                seen.update(file.name.encode() + b"\0" + file.read_bytes())
        return seen.hexdigest()


def open_tokenizer(name: str, *, model_folder: str | None = None) -> Tokenizer:
    """Open the tokenizer that ``data.tokenizer`` names.

    Args:
        name: "hf" for that of ``model_folder``, or the path of a file or folder.
        model_folder: The model's folder.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    place = Path(str(model_folder) if name == "hf" else name).expanduser()
    if place.is_dir() and (place / "tokenizer_config.json").is_file():
        return FolderTokenizer(place)
    file = place / "tokenizer.json" if place.is_dir() else place
    if file.is_file():
        return FileTokenizer(file)
    if place.is_dir() and any((place / n).is_file() for n in FOLDER_FILES):
        return FolderTokenizer(place)
    raise DataError(f"{place} has no tokenizer: neither tokenizer.json nor tokenizer_config.json")
