"""Held-out loss of mixtures built from the example fine-tunes, beside the fine-tunes and their mean.

``python benchmarks/moe_building.py [--max-tokens N]`` builds them from ``configs/moe_build.yml`` in a temporary folder,
measures each on every held-out text, and writes ``results/moe_building.json`` and the table of docs/moe_building.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from mergekit_lr import evaluate, merge

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "moe_building.json"
PAGE = ROOT / "docs" / "moe_building.md"
START, END = "<!-- moe table -->", "<!-- end -->"
TUNES = ("python", "c", "german")
MIXTURES: dict[str, dict[str, Any]] = {
    "mixture, `hidden`, 2 of 3": {"gate_mode": "hidden", "experts_per_token": 2},
    "mixture, `hidden`, 1 of 3": {"gate_mode": "hidden", "experts_per_token": 1},
    "mixture, `hidden_avg`, 2 of 3": {"gate_mode": "hidden_avg", "experts_per_token": 2},
    "mixture, `cheap_embed`, 2 of 3": {"gate_mode": "cheap_embed", "experts_per_token": 2},
    "mixture, `random`, 2 of 3": {"gate_mode": "random", "experts_per_token": 2},
}


def example(name: str) -> str:
    return str(ROOT / "examples" / "models" / name)


def built(folder: Path) -> dict[str, str]:
    """Every model that is measured, by what the table calls it."""
    found = {name: example(name) for name in ("base", *TUNES)}
    mean = {"merge_method": "linear", "models": [{"model": example(n)} for n in TUNES], "parameters": {"weight": 1}}
    recipe = yaml.safe_load((ROOT / "configs" / "moe_build.yml").read_text())
    recipe["base_model"] = example("base")
    for entry in recipe["models"]:
        entry["model"] = example(Path(entry["model"]).name)
    recipes = {"mean of the three (`linear`)": mean | {"dtype": "bfloat16"}}
    recipes |= {name: recipe | {"parameters": parameters} for name, parameters in MIXTURES.items()}
    for number, (name, asked) in enumerate(recipes.items()):
        merge(asked, folder / str(number), device="cpu")
        found[name] = str(folder / str(number))
    return found


def measured(max_tokens: int | None) -> dict[str, dict[str, float]]:
    """Loss in nats per token of each model on each text, and the mean over the texts."""
    texts = sorted((ROOT / "examples" / "text" / "heldout").glob("*.txt"))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in built(Path(folder)).items():
            found = evaluate(model, texts, device="cpu", max_tokens=max_tokens)
            losses = {Path(file).stem: result["loss"] for file, result in found["files"].items()}
            rows[name] = losses | {"mean": sum(losses.values()) / len(losses)}
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as Markdown."""
    columns = list(next(iter(rows.values())))
    head = [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*head, *(f"| {n} | {' | '.join(f'{r[c]:.3f}' for c in columns)} |" for n, r in rows.items())])


def show(rows: dict[str, dict[str, float]]) -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--max-tokens", type=int, help="tokens measured of each text (all; fewer are not written down)")
    arguments = parser.parse_args()
    rows = measured(arguments.max_tokens)
    if arguments.max_tokens is None:
        RESULT.write_text(json.dumps({"unit": "nats per token", "losses": rows}, indent=1) + "\n")
        show(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
