"""A byte-level BPE tokenizer of 1,536 tokens, trained on the four domains."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zoo import COMMITTED, WORK
from zoo.sources import DOMAINS

VOCABULARY = 1536
END_OF_TEXT = 0
CONTEXT = 256  # tokens that a model has ever seen at once: what `eval` takes for its window
_SPECIAL = ["<|endoftext|>", "<|pad|>"]
_BYTES_PER_DOMAIN = 2_000_000  # more does not change the merges that matter at this size


def train(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train on ``texts``. Byte-level: any input encodes, and decodes to the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[0],
        pad_token=_SPECIAL[1],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def sample(documents: Sequence[str]) -> list[str]:
    """The first documents that make up two megabytes."""
    chosen: list[str] = []
    total = 0
    for text in documents:
        if total >= _BYTES_PER_DOMAIN:
            break
        chosen.append(text)
        total += len(text)
    return chosen


def build(documents: Callable[[str], Sequence[str]]) -> None:
    """Train on a sample of each domain's ``documents`` and write the folder."""
    texts = [text for domain in DOMAINS for text in sample(documents(domain))]
    folder = WORK / "tokenizer"
    train(texts).save_pretrained(folder)
    # transformers 5 writes a class name that version 4 and other loaders do not know; both know this one.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    del settings["backend"]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def folder() -> Path:
    """The tokenizer built here, else the one that the committed base carries."""
    built = WORK / "tokenizer"
    return built if (built / "tokenizer.json").is_file() else COMMITTED / "base"


def digest(path: Path) -> str:
    """The sha256 of the tokenizer in folder ``path``."""
    return hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest()


@functools.lru_cache(maxsize=2)
def load(path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(path)


def encode(texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around them."""
    rows: list[list[int]] = load(folder())(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return rows
