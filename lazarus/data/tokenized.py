"""Opens the text that the configuration names, as samples of tokens by a tokenizer."""

from __future__ import annotations

from lazarus.config.train_config import TrainConfig
from lazarus.data.documents import open_documents
from lazarus.data.packing import Packed, Padded, token_stream
from lazarus.data.tokenizing import open_tokenizer

Samples = Packed | Padded


def tokenized(config: TrainConfig, *, seq_len: int) -> tuple[Samples, Samples | None]:
    """The training samples, and the held-out samples or None if none are left.

    Args:
        config: The run's configuration, with ``data.tokenizer`` set.
        seq_len: Tokens of a sample.

    Raises:
        DataError: The text or the tokenizer is missing or of no use, or there is too little text.
    """
    data = config.data
    assert data.tokenizer is not None
    tokenizer = open_tokenizer(data.tokenizer, model_folder=config.model.hf)
    documents = open_documents(data.path, column=data.text_key)
    rest: Samples | None = None
    if not data.packing:
        cut = _cut(len(documents), data.split)
        if cut < len(documents):
            rest = Padded(documents, tokenizer, seq_len=seq_len, first=cut)
        return Padded(documents, tokenizer, seq_len=seq_len, last=cut), rest
    stream, name = token_stream(documents, tokenizer, column=data.text_key), str(documents.path)
    total = len(stream) // seq_len
    cut = _cut(total, data.split)
    if cut < total:
        rest = Packed(stream, seq_len=seq_len, first=cut, name=name)
    return Packed(stream, seq_len=seq_len, last=cut, name=name), rest


def _cut(total: int, split: float) -> int:
    """Number of samples that are trained on."""
    return min(total, max(1, int(total * split)))
