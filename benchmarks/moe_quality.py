"""What reducing the experts of a mixture costs: every method on both example mixtures, one command.

    python examples/zoo/build.py qwen3-moe mixtral
    python benchmarks/moe_quality.py [--models ...] [--seeds 3] [--only METHOD ...]

For each model, at 25 % and 50 % fewer expert parameters, under several draws of calibration text and one that holds
German only: reduce with each method through `mergekit_lr.merge`, load the output with transformers, and measure the
loss on the committed held-out text (which no model was trained or calibrated on) in nats per token. Statistics are
collected once for each model and draw and shared by all methods that use them. Cases that the result file has are
not run again, so an interrupted run continues. The result goes to ``results/moe-quality.json`` and, as tables, into
``docs/quality_moe.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from measure import machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import WORK
from zoo.sources import DOMAINS
from zoo.text import heldout_tokens, training_tokens
from zoo.train import WINDOW, heldout_loss

import mergekit_lr
from mergekit_lr.checkpoint.model import open_folder

HERE = Path(__file__).resolve().parent
MODELS = ("qwen3-moe", "mixtral")
REDUCTIONS = (0.25, 0.5)
SHIFT = "german"
SAMPLES, LENGTH = 96, 256
TEXT_TOKENS = 60_000  # of each domain, from a place that the draw decides
WINDOWS = 24  # held-out windows of each domain
RESULT = HERE / "results" / "moe-quality.json"


@dataclass(frozen=True)
class Contestant:
    """A row of the table. ``parameters`` may hold ``E`` (experts kept) and ``K`` (share kept) to be filled in.

    ``axis``: what becomes fewer; ``kind``: ``peer``, ``refit`` (a peer's choice with our refit) or ``ours``; ``stock``:
    whether stock transformers and vLLM load the output; ``ablation``: measured with the first draw only.
    """

    name: str
    method: str
    parameters: dict[str, Any]
    axis: str = "experts"
    kind: str = "peer"
    stock: bool = True
    streams: bool = False
    ablation: bool = False


E, K = "E", "K"
TIED = {"router": "tied", "sidecar": True}


def _prune(score: str) -> Contestant:
    return Contestant(f"prune by {score}", "reap", {"num_experts": E, "score": score})


def _prune_refit(score: str) -> Contestant:
    own = {"num_experts": E, "score": score, "select": False}
    once = score == "frequency"
    return Contestant(
        f"prune by {score} + joint refit", "neuron_select", own, kind="refit", streams=True, ablation=once
    )


def _select(name: str, **options: Any) -> Contestant:
    own = {"num_experts": E, **options}
    return Contestant(name, "neuron_select", own, kind="ours", streams=True, ablation=bool(options))


def _width(name: str, **options: Any) -> Contestant:
    own = {"keep": K, **options}
    return Contestant(name, "width_shrink", own, axis="width", kind="ours", streams=True, ablation=bool(options))


CONTESTANTS = (
    Contestant("Sub-MoE, router tied", "sub_moe", {"num_experts": E, **TIED}, stock=False),
    Contestant("Sub-MoE, router mean", "sub_moe", {"num_experts": E}),
    Contestant("Sub-MoE, router select", "sub_moe", {"num_experts": E, "router": "select"}),
    Contestant("Sub-MoE, rank 50 %", "sub_moe", {"num_experts": E, "rank": 0.5}),
    Contestant("Sub-MoE, whitened, rank 50 %", "sub_moe", {"num_experts": E, "rank": 0.5, "whiten": True}),
    Contestant("M-SMoE, router tied", "m_smoe", {"num_experts": E, **TIED}, stock=False),
    Contestant("M-SMoE, router mean", "m_smoe", {"num_experts": E}),
    Contestant("HC-SMoE, router tied", "hc_smoe", {"num_experts": E, **TIED}, stock=False),
    Contestant("HC-SMoE, router mean", "hc_smoe", {"num_experts": E}),
    Contestant("MergeMoE, router tied", "mergemoe", {"num_experts": E, **TIED}, stock=False),
    Contestant("MergeMoE, router mean", "mergemoe", {"num_experts": E}, ablation=True),
    Contestant("REAM", "ream", {"num_experts": E}),
    Contestant("REAP", "reap", {"num_experts": E}),
    _prune("frequency"),
    _prune("ean"),
    _prune("gated_norm"),
    _prune("gated_square"),
    _prune_refit("reap"),
    _prune_refit("frequency"),
    _prune_refit("gated_norm"),
    _prune_refit("gated_square"),
    _select("neuron_select"),
    _select("neuron_select, one sweep", sweeps=1),
    _select("neuron_select, groups by output", likeness="output"),
    _select("neuron_select, centres by gated_norm", score="gated_norm"),
    _width("width_shrink"),
    _width("width_shrink, refit by blocks", refit="blocks"),
    _width("width_shrink, own refit", refit="own"),
    _width("width_shrink, no refit", refit="none"),
    _width("width_shrink by energy", selection="energy"),
    Contestant("moe_budget", "moe_budget", {"keep": K}, axis="both", kind="ours", streams=True),
)


@dataclass(frozen=True)
class Draw:
    """Calibration text: a seed, and which domains."""

    name: str
    seed: int
    domains: tuple[str, ...] = DOMAINS

    def texts(self, folder: Path, tokenizer: Any) -> list[str]:
        """Its files in ``folder``, made where they are not there."""
        paths = []
        for number, domain in enumerate(self.domains):
            path = folder / f"{self.name}-{domain}.txt"
            if not path.exists():
                tokens = training_tokens(domain)
                count = TEXT_TOKENS * len(DOMAINS) // len(self.domains)
                random = np.random.Generator(np.random.Philox(key=[self.seed, number]))
                start = int(random.integers(0, len(tokens) - count))
                path.write_text(tokenizer.decode(tokens[start : start + count].tolist()), encoding="utf-8")
            paths.append(str(path))
        return paths


def draws(seeds: int) -> list[Draw]:
    return [*(Draw(f"seed {s}", s) for s in range(seeds)), Draw(f"{SHIFT} only", 0, (SHIFT,))]


@dataclass(frozen=True)
class Case:
    """One cell: a model, a reduction, a draw and a contestant."""

    model: str
    reduction: float
    draw: Draw
    contestant: Contestant

    @property
    def key(self) -> str:
        return f"{self.model}|{self.reduction}|{self.draw.name}|{self.contestant.name}"

    def recipe(self, texts: list[str], statistics: Path) -> dict[str, Any]:
        """The recipe, as a user would write it."""
        experts = {"qwen3-moe": 16, "mixtral": 8}[self.model]
        keep = 1 - self.reduction
        filled = {E: round(experts * keep), K: keep}
        parameters = {k: filled.get(v, v) if isinstance(v, str) else v for k, v in self.contestant.parameters.items()}
        calibration: dict[str, Any] = {"text": texts, "samples": SAMPLES, "sequence_length": LENGTH}
        if not self.contestant.streams and self.contestant.method != "mergemoe":
            calibration["statistics"] = str(statistics)
        return {
            "merge_method": self.contestant.method,
            "models": [{"model": str(WORK / self.model)}],
            "parameters": {**parameters, "seed": self.draw.seed},
            "calibration": calibration,
            "dtype": "bfloat16",
        }


def cases(models: list[str], seeds: int, only: list[str]) -> Iterator[Case]:
    """Every cell; what the conclusions rest on comes first."""
    tables = [(draw, reduction) for draw in draws(seeds) for reduction in REDUCTIONS]
    tables.sort(key=lambda t: (t[1] != max(REDUCTIONS) and t[0].seed > 0, t[1] != max(REDUCTIONS), t[0].seed))
    for draw, reduction in tables:
        for model in models:
            for contestant in CONTESTANTS:
                measured = draw == draws(seeds)[0] or not contestant.ablation
                if measured and (not only or contestant.method in only):
                    yield Case(model, reduction, draw, contestant)


def losses(folder: Path) -> dict[str, float]:
    """Held-out loss by domain, nats per token, of a folder as transformers loads it (weights as float32)."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=(folder / "expert_map.json").exists()
    )
    if wrong := {k: v for k, v in info.items() if v}:
        raise SystemExit(f"{folder} does not load cleanly: {wrong}")
    model.eval()
    return {d: heldout_loss(model, _spread(heldout_tokens(d))) for d in DOMAINS}


def _spread(tokens: Any) -> Any:
    """`WINDOWS` windows, evenly over the text."""
    count = len(tokens) // WINDOW
    chosen = np.linspace(0, count - 1, min(WINDOWS, count)).astype(int)
    return tokens[: count * WINDOW].reshape(count, WINDOW)[chosen].reshape(-1)


def measure(case: Case, work: Path, base: dict[str, float], tokenizer: Any) -> dict[str, Any]:
    """Reduce and measure."""
    texts = case.draw.texts(work, tokenizer)
    statistics = work / f"{case.model}-{case.draw.name}.safetensors"
    if not statistics.exists():
        mergekit_lr.calibrate(
            WORK / case.model, statistics, texts, samples=SAMPLES, sequence_length=LENGTH, seed=case.draw.seed,
            grams=("input", "hidden"),
        )  # fmt: skip
    out = work / "out"
    began = time.perf_counter()
    mergekit_lr.merge(case.recipe(texts, statistics), out, device="cpu", threads=1)
    seconds = time.perf_counter() - began
    increase = {d: round(value - base[d], 6) for d, value in losses(out).items()}
    config = json.loads((out / "config.json").read_text())
    shapes = [t.shape for t in open_folder(out, "out").tensors.values()]
    shutil.rmtree(out)
    return {
        "increase": {**increase, "mean": round(sum(increase.values()) / len(increase), 6)},
        "parameters": sum(int(np.prod(shape)) for shape in shapes),
        "experts": config.get("num_experts", config.get("num_local_experts")),
        "width": config.get("moe_intermediate_size", config.get("intermediate_size")),
        "seconds": round(seconds, 1),
    }


def _shape(folder: Path) -> dict[str, int]:
    config = json.loads((folder / "config.json").read_text())
    return {
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "experts": config.get("num_experts", config.get("num_local_experts")),
        "width": config.get("moe_intermediate_size", config["intermediate_size"]),
        "per_token": config["num_experts_per_tok"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What reducing the experts of a mixture costs.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="methods to run, by their recipe name")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.result.parent.mkdir(exist_ok=True)
    found: dict[str, Any] = json.loads(options.result.read_text()) if options.result.exists() else {"cases": {}}
    found |= {"machine": machine(), "samples": SAMPLES, "sequence_length": LENGTH, "heldout_windows": WINDOWS}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bases = {m: losses(WORK / m) for m in options.models}
        found["base"] = found.get("base", {}) | bases
        found["models"] = found.get("models", {}) | {m: _shape(WORK / m) for m in options.models}
        for case in cases(options.models, options.seeds, options.only):
            if case.key in found["cases"]:
                continue
            tokenizer = AutoTokenizer.from_pretrained(WORK / case.model)
            row = measure(case, work, bases[case.model], tokenizer)
            found["cases"][case.key] = row
            print(f"{case.key:80s} {row['increase']['mean']:8.4f} {row['seconds']:6.1f} s", flush=True)
            partial = options.result.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n")
            partial.replace(options.result)
    if options.result == RESULT:
        from moe_tables import write

        write(RESULT)


if __name__ == "__main__":
    main()
