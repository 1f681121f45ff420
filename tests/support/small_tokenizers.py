"""Tokenizers that a test trains in memory, and folders of them with a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

END = "<|endoftext|>"
MARKS = (END, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
WORDS = ("the quick brown fox jumps over the lazy dog\n", "what is a b c d? it is an e f g.\n")

# As most templates are: nothing marks what the assistant says.
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The last turn of the assistant has thoughts before it, earlier ones do not.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}(hm) {% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train(*, texts: Iterable[str] = WORDS, vocab: int = 300) -> object:
    """A byte-level BPE, so that every text has tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(list(texts), trainer)
    return made


def tokenizer_file(place: Path) -> Path:
    """A ``tokenizer.json``."""
    train().save(str(place))  # type: ignore[attr-defined]
    return place


def tokenizer_folder(folder: Path, *, template: str | None = PLAIN) -> Path:
    """What ``save_pretrained`` writes."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=train(), eos_token=END, pad_token=END)
    if template is not None:
        made.chat_template = template
    made.save_pretrained(str(folder))
    return folder
