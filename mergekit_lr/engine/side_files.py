"""Everything in an output folder that is not weights: config, tokenizer, generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.arch.by_layer import relayered
from mergekit_lr.checkpoint.model import Checkpoint, inside
from mergekit_lr.errors import CheckpointError
from mergekit_lr.tokenizer.vocabulary import tokenizer_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
LARGEST_FILE = 64 << 20
TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def carried_over(reference: Checkpoint, tokenizer: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """Small files taken as they are, by an allow-list: (name -> bytes, warnings)."""
    files: dict[str, bytes] = {}
    warnings: list[str] = []
    for checkpoint, folder, names in (
        (reference, reference.folder, OTHER_FILES),
        (tokenizer, tokenizer_folder(tokenizer), TOKENIZER_FILES),
    ):
        for name in names if folder is not None else ():
            assert folder is not None
            path = folder / name
            if not path.is_file():
                continue
            if path.stat().st_size > LARGEST_FILE:
                warnings.append(f"{checkpoint.reference}: {name} is over 64 MiB and is not carried over")
                continue
            try:
                files[name] = inside(folder, name).read_bytes()
            except CheckpointError as e:  # a link out of the folder: not followed, and said
                warnings.append(f"{checkpoint.reference}: {name} is not carried over ({e})")
    return files, warnings


def merged_config(
    reference: Checkpoint,
    dtypes: set[str],
    layers: Mapping[str, Sequence[tuple[Checkpoint, int]]] | None = None,
    edited: Mapping[str, Any] | None = None,
) -> tuple[bytes | None, list[str]]:
    """config.json of the output: the reference's, its dtype set to what was written, code references dropped.

    ``layers``: for each part whose layers were picked, and each of them, the model and the layer it came from.
    ``edited``: a config to start from instead of the reference's.

    Raises:
        CheckpointError: the config cannot describe the picked layers.
    """
    if reference.config is None and edited is None:
        return None, []
    warnings: list[str] = []
    config: dict[str, Any] = dict(reference.config or {} if edited is None else edited)
    original = config
    for part, picked in (layers or {}).items():
        sources = [(c.config or original, c.reference, i) for c, i in picked]
        config = relayered(config, reference.reference, sources, part)
    if "auto_map" in config and edited is None:
        del config["auto_map"]
        warnings.append(
            f"{reference.reference}: its config points to Python files (auto_map); code is not carried over, "
            "so the output loads only where transformers knows the architecture"
        )
    floating = [d for d in dtypes if d in TORCH_NAMES]
    if len(floating) == 1:
        known = [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]
        for key in known:
            config[key] = TORCH_NAMES[floating[0]]
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(), warnings
