"""Everything in an output folder that is not weights: config, tokenizer, generation settings."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.arch.by_layer import relayered
from mergekit_lr.checkpoint.foreign_code import without_code
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import read_plain
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
_MAY_NAME_CODE = re.compile(rb"auto_map|custom_pipelines|_implementation|\\\\u")
TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def carried_over(
    reference: Checkpoint, tokenizer: Checkpoint, modules: Container[str] = ()
) -> tuple[dict[str, bytes], list[str]]:
    """Small files taken as they are, by an allow-list: (name -> bytes, warnings).

    References to code are taken out, but for classes of ``modules``, which the output has.
    """
    files: dict[str, bytes] = {}
    warnings: list[str] = []
    for checkpoint, folder, names in (
        (reference, reference.folder, OTHER_FILES),
        (tokenizer, tokenizer_folder(tokenizer), TOKENIZER_FILES),
    ):
        for name in names if folder is not None else ():
            assert folder is not None
            path = folder / name
            if not path.exists() and not path.is_symlink():
                continue
            try:
                files[name], told = _as_it_is(folder, name, modules)
                warnings += [f"{checkpoint.reference}: {t}" for t in told]
            except CheckpointError as e:  # not followed, not waited for, not read; and said
                if isinstance(e.__cause__, OSError):
                    raise  # the disk, not the file
                warnings.append(f"{checkpoint.reference}: {name} is not carried over ({e})")
    return files, warnings


def _as_it_is(folder: Path, name: str, modules: Container[str]) -> tuple[bytes, list[str]]:
    """The bytes of a small file, and what was taken out: nothing but references to code, which is not carried over.

    Raises:
        CheckpointError: it is a link out of the folder, no plain file, too large or cannot be read.
    """
    data = read_plain(folder, name, most=LARGEST_FILE)
    if not name.endswith(".json") or not _MAY_NAME_CODE.search(data):
        return data, []
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data, []
    cleaned, found = without_code(content, modules) if isinstance(content, dict) else (content, [])
    if not found:
        return data, []
    text = json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass"), [f"{name} named code ({', '.join(found)}), which is not carried over"]


def merged_config(
    reference: Checkpoint,
    dtypes: set[str],
    layers: Mapping[str, Sequence[tuple[Checkpoint, int]]] | None = None,
    edited: Mapping[str, Any] | None = None,
    modules: Container[str] = (),
) -> tuple[bytes | None, list[str]]:
    """config.json of the output: the reference's, its dtype set to what was written, code references dropped.

    ``layers``: for each part whose layers were picked, and each of them, the model and the layer it came from.
    ``edited``: a config to start from instead of the reference's. ``modules``: Python modules that the output has.

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
    own = config.get("auto_map") if edited is not None else None  # of a method that writes a model class of its own
    config, found = without_code(config, modules)
    if own and own != (reference.config or {}).get("auto_map"):
        config["auto_map"] = own
        found = [f for f in found if f.split(".")[0] != "auto_map"]
    if found:
        warnings.append(
            f"{reference.reference}: its config names code ({', '.join(found)}); code is not carried over, "
            "so the output loads only where transformers knows the architecture"
        )
    floating = [d for d in dtypes if d in TORCH_NAMES]
    if len(floating) == 1:
        known = [k for k in ("dtype", "torch_dtype") if k in config] or ["torch_dtype"]
        for key in known:
            config[key] = TORCH_NAMES[floating[0]]
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(), warnings
