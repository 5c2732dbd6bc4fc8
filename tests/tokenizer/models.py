"""Tiny models with tokenizers that are really trained: byte-level BPE, SentencePiece, WordPiece."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

TEXT = {
    "english": "the cat sat on the mat and the dog ran to the cat while the sun went down over the old town",
    "python": "def run(self): return self.value if self.value else None for item in items import os",
    "german": "die Katze lag auf der Matte und der Hund lief zur Katze als die Sonne unterging",
}
WIDTH = 16


def byte_level(text: str, size: int, added: Sequence[str] = ("<|end|>",)) -> Tokenizer:
    """A byte-level BPE tokenizer, like those of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def word_piece(text: str, size: int) -> Tokenizer:
    """A WordPiece tokenizer, like that of BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def sentence_piece(text: str, size: int) -> bytes:
    """A SentencePiece BPE model with byte fallback, like that of Llama 2."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 4),
        model_writer=out,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


def reordered(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokens under other ids: those of the vocabulary reversed."""
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    last = len(vocab) - 1
    content["model"]["vocab"] = {t: last - i for t, i in vocab.items()}
    for entry in content["added_tokens"]:
        if entry["content"] in vocab:
            entry["id"] = last - vocab[entry["content"]]
    return Tokenizer.from_str(json.dumps(content))


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def write_model(
    folder: Path,
    tokenizer: Tokenizer | bytes | None,
    rows: int,
    *,
    seed: int,
    tied: bool = False,
    config: dict[str, Any] | None = None,
    named: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A tiny Llama with ``rows`` rows of embeddings and the tokenizer's files; random weights of scale 0.2."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **(config or {}),
    }
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(LlamaConfig(**settings)).state_dict().items()}
    g = torch.Generator().manual_seed(seed)
    tensors = {n: (torch.randn(s, generator=g) * 0.2).to(dtype) for n, s in shapes.items()}
    if tied:
        del tensors["lm_head.weight"]
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = LlamaConfig(**settings).to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(written))
    write_tokenizer(folder, tokenizer, named or {})
    return folder


def write_tokenizer(folder: Path, tokenizer: Tokenizer | bytes | None, named: dict[str, str]) -> None:
    """tokenizer.json with a config, or a SentencePiece model with one."""
    if isinstance(tokenizer, bytes):
        (folder / "tokenizer.model").write_bytes(tokenizer)
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | named))
    elif tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | named))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def tokens_of(folder: Path) -> dict[str, int]:
    """What transformers itself says of a folder's tokenizer."""
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def common(*vocabularies: Iterable[str]) -> list[str]:
    return sorted(set.intersection(*map(set, vocabularies)))
