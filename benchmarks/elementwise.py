"""Elementwise merges against the floor and against mergekit 0.1.5, in one run, interleaved and repeated.

    python benchmarks/elementwise.py --peer $(python tests/peer/environment.py)

Makes Llama-shaped bf16 checkpoints (four of 1.28 GB by default), then measures for each method, in turn:

``floor``       every input byte read, one output written and synced, one thread (see ``floor.py``)
``early``       the least that was found for the same, two threads; for information
``in_process``  ``mergekit_lr.merge`` in a warm interpreter
``whole``       the ``mergekit-lr merge`` command from start to end
``small``       the same with ``--max-memory 256MiB``, for its memory
``mergekit``    ``mergekit-yaml`` from start to end (``--peer``; it does not sync its output)

Inputs are in the page cache, dirty pages are written back before each run, and the free memory is the same and warm
for everyone (see ``measure.Ballast``). The result goes to ``results/`` and, as a table, into ``docs/performance.md``.

With ``--methods`` a part is measured; methods that today's result file of the same machine and software already holds
stay in it, so that a long run may be cut into short ones. All of a method's samples come from one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from checkpoints import LlamaShape, make_family
from measure import Ballast, Sample, machine, read_into_cache, run
from report import write_table

HERE = Path(__file__).parent
FINE_TUNES = 3
SMALL_MEMORY = "256MiB"
MEMORY_IN_SIZES = (
    5  # free memory for a run, in checkpoint sizes: mergekit needs 3, its output in the page cache included
)
CONTESTANTS = ["floor", "in_process", "whole", "small", "early", "mergekit"]
START_UPS = {"--help": ["--help"], "check": ["check", "ties.yml"]}
TINY = LlamaShape(hidden=16, intermediate=32, layers=2, heads=2, vocabulary=32, shards=1)


def recipes() -> dict[str, dict[str, Any]]:
    """The six merges, as a user would write them."""
    tuned = [f"./ft_{number}" for number in range(1, FINE_TUNES + 1)]
    equal = [{"model": name, "parameters": {"weight": 0.4}} for name in tuned]
    half = [{"model": name, "parameters": {"weight": 0.4, "density": 0.5}} for name in tuned]
    plain = [{"model": name} for name in tuned]
    return {
        "linear": {"models": equal[:2]},
        "slerp": {"models": [{"model": "./base"}, plain[0]], "base_model": "./base", "parameters": {"t": 0.4}},
        "task_arithmetic": {"models": equal, "base_model": "./base"},
        "model_stock": {"models": plain, "base_model": "./base"},
        "dare_ties": {"models": half, "base_model": "./base"},
        "ties": {"models": half, "base_model": "./base"},
    }


@dataclass(frozen=True)
class Setting:
    """Where everything lies, and what each contestant's command is."""

    root: Path
    peer: Path | None
    ballast: Ballast

    def inputs(self, method: str) -> list[str]:
        """Names of the model folders that a method reads."""
        recipe = recipes()[method]
        named = [entry["model"] for entry in recipe["models"]]
        return sorted({*named, recipe["base_model"]} if "base_model" in recipe else named)

    def command(self, contestant: str, method: str) -> list[str]:
        """The command line of one contestant for one method, run in ``root``."""
        ours = str(Path(sys.executable).parent / "mergekit-lr")
        recipe, out = f"{method}.yml", "out"
        if contestant in ("floor", "early"):
            kind = "plain" if contestant == "floor" else "early"
            return [sys.executable, str(HERE / "floor.py"), kind, "out.bin", *self.inputs(method)]
        if contestant == "in_process":
            return [sys.executable, str(HERE / "in_process.py"), recipe, out, f"tiny/{recipe}", "warm"]
        if contestant == "whole":
            return [ours, "merge", recipe, out, "--device", "cpu", "--quiet"]
        if contestant == "small":
            return [ours, "merge", recipe, out, "--device", "cpu", "--quiet", "--max-memory", SMALL_MEMORY]
        assert self.peer is not None
        return [
            str(self.peer / "mergekit-yaml"),
            recipe,
            out,
            "--no-copy-tokenizer",
            "--no-write-model-card",
            "--quiet",
        ]

    def clear(self) -> None:
        """Remove outputs of an earlier run."""
        for name in ("out", "out.partial", "warm", "warm.partial"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "out.bin").unlink(missing_ok=True)

    def measure(self, contestant: str, method: str) -> Sample:
        """One run on settled ground."""
        self.clear()
        os.sync()
        read_into_cache([self.root / name for name in self.inputs(method)])
        self.ballast.trim()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        sample = run(self.command(contestant, method), self.root, environment)
        self.clear()
        return sample


def prepare(root: Path, shape: LlamaShape) -> None:
    """Checkpoints and recipes, and tiny ones for warming up."""
    make_family(root, shape, FINE_TUNES)
    make_family(root / "tiny", TINY, FINE_TUNES)
    for method, body in recipes().items():
        recipe = {"merge_method": method} | body | {"dtype": "bfloat16"}
        (root / f"{method}.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        warm = json.loads(json.dumps(recipe))
        for entry in warm["models"]:
            entry["model"] = entry["model"].replace("./", "./tiny/")
        if "base_model" in warm:
            warm["base_model"] = "./tiny/base"
        (root / "tiny" / f"{method}.yml").write_text(yaml.safe_dump(warm, sort_keys=False))


def measure_all(
    setting: Setting, methods: list[str], order: list[str], repeats: int, repeats_of: dict[str, int]
) -> dict[str, Any]:
    """method -> contestant -> samples; contestants take turns, and their order turns from round to round."""
    samples: dict[str, dict[str, list[dict[str, float]]]] = {method: {} for method in methods}
    for turn in range(max(repeats, *repeats_of.values())):
        for method in methods:
            for contestant in order[turn % len(order) :] + order[: turn % len(order)]:
                if turn >= repeats_of.get(contestant, repeats):
                    continue
                sample = setting.measure(contestant, method)
                samples[method].setdefault(contestant, []).append(sample.to_dict())
                print(
                    f"{turn} {method:16s} {contestant:10s} {sample.seconds:8.2f} s {sample.cpu:8.2f} CPU-s", flush=True
                )
    return samples


def start_ups(setting: Setting, repeats: int) -> dict[str, list[float]]:
    """Whole-process seconds of commands that must not import torch."""
    ours = str(Path(sys.executable).parent / "mergekit-lr")
    return {
        name: [round(run([ours, *arguments], setting.root, os.environ).wall, 4) for _ in range(repeats)]
        for name, arguments in START_UPS.items()
    }


def joined(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """``result`` with the methods that only ``earlier`` holds, where both were measured under the same conditions."""
    same = all(result[key] == earlier.get(key) for key in ("date", "machine", "software", "checkpoint"))
    samples = (earlier["samples"] if same else {}) | result["samples"]
    return result | {"samples": {method: samples[method] for method in recipes() if method in samples}}


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="for checkpoints, kept and reused (default: a temporary folder)")
    parser.add_argument("--peer", type=Path, help="folder with mergekit's commands; without it mergekit is left out")
    parser.add_argument("--methods", nargs="+", choices=list(recipes()), default=list(recipes()))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument("--side-repeats", type=int, default=1, help="of `whole`, `small` and `early`")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "performance.md")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/performance.md alone")
    return parser.parse_args()


def main() -> None:
    """Measure, write the result file, write the table."""
    options = parse()
    shape = LlamaShape(options.hidden, options.intermediate, options.layers)
    repeats_of = {
        "whole": options.side_repeats,
        "early": options.side_repeats,
        "mergekit": options.peer_repeats if options.peer else 0,
        "small": options.side_repeats,
    }
    root = options.workdir or Path(tempfile.mkdtemp(prefix="mergekit_lr-benchmark-"))
    try:
        prepare(root, shape)
        setting = Setting(root.resolve(), options.peer, Ballast(MEMORY_IN_SIZES * 2 * shape.parameters()))
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "software": {name: version(name) for name in ("mergekit-lr", "torch")} | {"mergekit": "0.1.5"},
            "checkpoint": {"parameters": shape.parameters(), "bytes": 2 * shape.parameters(), "dtype": "bfloat16"},
            "start_up": start_ups(setting, options.repeats),
            "samples": measure_all(setting, options.methods, options.contestants, options.repeats, repeats_of),
        }
    finally:
        if options.workdir is None:
            shutil.rmtree(root)
    options.results.mkdir(exist_ok=True)
    path = options.results / f"elementwise-{result['date']}.json"
    if path.exists():
        result = joined(result, json.loads(path.read_text()))
    path.write_text(json.dumps(result, indent=1) + "\n")
    if not options.no_docs:
        write_table(options.docs, "elementwise", path)


if __name__ == "__main__":
    main()
