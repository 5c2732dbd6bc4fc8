"""Held-out loss of what people build with mergekit recipes, from the recipes in ``configs``.

    python benchmarks/compat_quality.py      # measures, rewrites the result and the table in docs/quality_compat.md

Runs `frankenmerge`, `multi_stage`, `lora` and `moe_build` on the example models, with the names in the recipe replaced
by theirs. Needs ``examples/zoo/build/lora-{python,german}`` for the adapters (see examples/README.md).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import mergekit_lr

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
BUILT = ROOT / "examples" / "zoo" / "build"
TEXT = ROOT / "examples" / "text" / "heldout"
RESULT = ROOT / "benchmarks" / "results" / "compat-quality.json"
PAGE = ROOT / "docs" / "quality_compat.md"
START, END = "<!-- table -->", "<!-- end of the table -->"
DOMAINS = ("english", "python", "c", "german")
TOKENS = 12_000
RECIPES = ("frankenmerge", "multi_stage", "lora", "moe_build")
NAMES = {"./base": MODELS / "base", "./ft_a": MODELS / "python", "./ft_b": MODELS / "c", "./ft_c": MODELS / "german"}
NAMES |= {"./lora_a": BUILT / "lora-python", "./lora_b": BUILT / "lora-german"}
NAMES |= {f"./{name}": MODELS / name for name in ("python", "c", "german")}


def recipe_of(name: str) -> str:
    """The recipe with the example models in place of its names."""
    text = (ROOT / "configs" / f"{name}.yml").read_text()
    for written, path in NAMES.items():
        for end in ("\n", ",", "}", "+"):
            text = text.replace(f"{written}{end}", f"{path}{end}")
    return text


def loss(model: Path) -> dict[str, float]:
    """Nats per token on the held-out text of each domain."""
    files = [TEXT / f"{domain}.txt" for domain in DOMAINS]
    measured = mergekit_lr.evaluate(str(model), files, device="cpu", max_tokens=TOKENS)
    return {domain: measured["files"][str(file)]["loss"] for domain, file in zip(DOMAINS, files, strict=True)}


def table(data: dict[str, Any]) -> str:
    rows = ["| model | layers | MB | english | python | c | german | mean |", "|---|" + "---:|" * 7]
    for name, row in data["models"].items():
        values = [row["loss"][d] for d in DOMAINS]
        cells = [f"{v:.3f}" for v in (*values, sum(values) / len(values))]
        rows.append(f"| {name} | {row['layers']} | {row['bytes'] / 1e6:.1f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def described(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_bytes())
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return {"layers": config["num_hidden_layers"], "bytes": size, "loss": loss(folder)}


def renewed(page: str, data: dict[str, Any]) -> str:
    before, rest = page.split(START)
    return f"{before}{START}\n{table(data)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    models = {name: described(MODELS / name) for name in ("base", "python", "c", "german")}
    with tempfile.TemporaryDirectory(prefix="compat-") as work:
        for name in RECIPES:
            out = Path(work) / name
            mergekit_lr.merge(recipe_of(name), out, device="cpu")
            models[f"`configs/{name}.yml`"] = described(out)
    data = {"unit": "nats per token", "tokens": TOKENS, "models": models}
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(renewed(PAGE.read_text(), data))


if __name__ == "__main__":
    main()
