"""What moving rows by token costs: merges of models with different tokenizers against the same merge without any.

    python benchmarks/token_rows.py

Two models of nothing but embeddings and head (128,000 x 1024 bf16 each, 524 MB a model), averaged on one thread within
256 MiB. Contestants, all in one process, in turns, planning and reading the tokenizers included:

``plain``   both have the same tokenizer, and the recipe says nothing of one
``same``    both have the same tokenizer, and the recipe says ``tokenizer_source: base``
``union``   the second has 8,000 tokens that the first has not, and lacks as many
``order``   the second has the same tokens in random order: every row is read from somewhere else

CPU seconds are compared, so that neighbours on the machine matter little. The result goes to ``results/``, the table
into ``docs/tokenizers.md``.
"""

from __future__ import annotations

import datetime
import json
import resource
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import machine
from report import conditions, table
from safetensors.torch import save_file

import mergekit_lr

HERE = Path(__file__).parent
TOKENS, WIDTH, NEW = 128_000, 1024, 8_000
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("alike", {}),
    "same": ("alike", {"tokenizer_source": "base"}),
    "union": ("more", {"tokenizer_source": "union"}),
    "order": ("shuffled", {"tokenizer_source": "base"}),
}


def write_model(folder: Path, words: list[str], seed: int) -> None:
    """Random embeddings and head, and a tokenizer that knows these words."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({n: torch.randn((TOKENS, WIDTH), generator=g).bfloat16() for n in names}, folder / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": TOKENS, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    model = {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def write_models(root: Path) -> None:
    words = [f"t{i}" for i in range(TOKENS)]
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0)).tolist()
    kinds = {
        "base": words,
        "alike": words,
        "more": words[: TOKENS - NEW] + [f"u{i}" for i in range(NEW)],
        "shuffled": [words[i] for i in order],
    }
    for seed, (name, known) in enumerate(kinds.items()):
        write_model(root / name, known, seed)


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def merge(root: Path, other: str, keys: dict[str, Any]) -> float:
    models = [{"model": str(root / m), "parameters": {"weight": 0.5}} for m in ("base", other)]
    recipe = {"merge_method": "linear", "base_model": str(root / "base"), "models": models, **keys}
    began = cpu_seconds()
    mergekit_lr.merge(recipe, root / "out", device="cpu", threads=1, max_memory="256MiB", overwrite=True)
    return cpu_seconds() - began


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of every contestant; the first round warms up and is not kept."""
    found: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for turn in range(repeats + 1):
            for name, (other, keys) in CONTESTANTS.items():
                seconds = merge(Path(folder), other, keys)
                print(turn, name, round(seconds, 2), flush=True)
                if turn:
                    found[name].append(round(seconds, 3))
    return found


def page(result: dict[str, Any]) -> str:
    """The table and what it was measured with."""
    plain = median(result["seconds"]["plain"])
    told = {
        "plain": "same tokenizer, no `tokenizer_source`",
        "same": "same tokenizer, `base`",
        "union": f"{NEW:,} tokens more and less, `union`",
        "order": "every token elsewhere, `base`",
    }
    rows = [[told[n], f"{median(s):.2f}", f"{median(s) / plain:.2f}"] for n, s in result["seconds"].items()]
    return f"{table(['second model', 'CPU s', 'ratio'], rows)}\n\n{conditions(result)}"


def main() -> None:
    """Measure, write the result file, write the table."""
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "software": {name: version(name) for name in ("torch",)},
        "settings": {"tokens": TOKENS, "width": WIDTH, "new": NEW, "threads": 1, "max_memory": "256MiB"},
        "seconds": measure(3),
    }
    (HERE / "results" / "tokenizers.json").write_text(json.dumps(result, indent=1) + "\n")
    doc = HERE.parent / "docs" / "tokenizers.md"
    before, _, rest = doc.read_text().partition("<!-- tokenizers:begin -->\n")
    after = rest.partition("<!-- tokenizers:end -->")[2]
    doc.write_text(f"{before}<!-- tokenizers:begin -->\n{page(result)}\n<!-- tokenizers:end -->{after}")


if __name__ == "__main__":
    main()
