"""Held-out loss of merges of the example fine-tunes: curvature-weighted methods against the others.

    python benchmarks/dense_quality.py run [RESULT.json] [--part NAME]   measure what the file lacks, row by row
    python benchmarks/dense_quality.py report [RESULT.json]              write the tables of docs/quality_dense.md

Needs ``examples/zoo/build/{python,c,german,joint}`` (see examples/README.md). Every merge is a recipe run by the engine
with lambda 1 and float32 output; lambda, and nothing else, is then chosen for each row on calibration text (windows
of *training* text of all four domains): the parabola through the losses at 0, 0.6 and 1.2, its minimum within 0.05 ..
2. Windows of held-out text are spread evenly over it; rows of the comparison are measured on more of them.
Files that the rows need (curvatures, Grams) are kept beside the result file and not made twice.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]

from zoo import WORK, models  # noqa: E402
from zoo.sources import DOMAINS  # noqa: E402
from zoo.text import heldout_tokens, training_tokens  # noqa: E402

import mergekit_lr  # noqa: E402

EXPERTS = ("python", "c", "german")
RESULT = ROOT / "benchmarks" / "results" / "dense-quality.json"
DOC = ROOT / "docs" / "quality_dense.md"
WINDOW = 256
FISHER_ON, GRAMS_ON = 128, 64  # sequences
CALIBRATION, SWEPT, COMPARED_ON, TUNED_ON = 5, 8, 32, 12  # windows of each domain
LAMBDAS = (0.6, 1.2)
LIMITS = (0.05, 2.0)
Losses = dict[str, float]


def windows_of(tokens: Any, count: int, seed: int | None = None) -> Tensor:
    """Windows ``[count, 256]``: evenly spread ones, or at random places."""
    if seed is not None:
        starts = np.random.Generator(np.random.Philox(key=seed)).integers(0, len(tokens) - WINDOW, count)
    else:
        whole = len(tokens) // WINDOW
        starts = np.linspace(0, whole - 1, count).astype(int) * WINDOW
    return torch.from_numpy(np.stack([tokens[s : s + WINDOW].astype(np.int64) for s in starts]))


def unmeasured(tokens: Any, count: int) -> Tensor:
    """Evenly spread windows of held-out text that no row is measured on: what scales are chosen by."""
    whole = len(tokens) // WINDOW
    measured = {int(i) for n in (SWEPT, COMPARED_ON) for i in np.linspace(0, whole - 1, n).astype(int)}
    free = [i for i in range(whole) if i not in measured]
    chosen = [free[i] for i in np.linspace(0, len(free) - 1, count).astype(int)]
    return torch.from_numpy(np.stack([tokens[i * WINDOW : (i + 1) * WINDOW].astype(np.int64) for i in chosen]))


class Bench:
    """The base in memory, its experts on disk, and the texts."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model = models.load_base()
        self.base = {k: v.clone() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        self.calibration = {d: windows_of(training_tokens(d), CALIBRATION, seed=7) for d in DOMAINS}
        self.swept = {d: windows_of(heldout_tokens(d), SWEPT) for d in DOMAINS}
        self.compared = {d: windows_of(heldout_tokens(d), COMPARED_ON) for d in DOMAINS}
        self.tuning = {d: unmeasured(heldout_tokens(d), TUNED_ON) for d in DOMAINS}
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.at_base: float | None = None
        self.files = self._files()

    def _files(self) -> dict[str, dict[str, str]]:
        """Curvature and statistics files of each expert, by form."""
        found: dict[str, dict[str, str]] = {}

        def made(form: str, expert: str, make: Callable[[Path], object]) -> None:
            out = self.folder / f"{expert}-{form}.safetensors"
            if not out.exists():
                make(out)
            found.setdefault(form, {})[expert] = str(out)

        for e in EXPERTS:
            text = self.folder / f"{e}-{e}.txt"
            if not text.exists():
                text.write_text(_decoded(windows_of(training_tokens(e), 160, seed=11)), encoding="utf-8")
            optimizer = WORK / e / "optimizer.pt"
            made("full", e, lambda out: mergekit_lr.curvature(optimizer, out))  # noqa: B023
            made("rank1", e, lambda out: mergekit_lr.curvature(found["full"][e], out, form="rank1"))  # noqa: B023
            estimate = {"text": [text], "samples": FISHER_ON, "sequence_length": WINDOW}
            made("text", e, lambda out: mergekit_lr.curvature(WORK / e, out, **estimate))  # type: ignore[arg-type]  # noqa: B023
            grams = {"samples": GRAMS_ON, "sequence_length": WINDOW, "grams": ["linear"], "similarity_tokens": 0}
            made("grams", e, lambda out: mergekit_lr.calibrate(WORK / e, out, [text], **grams))  # type: ignore[arg-type]  # noqa: B023
        return found

    def merged(
        self, method: str, shared: dict[str, Any], each: dict[str, Any], file: str | None, per_expert: bool = False
    ) -> dict[str, Tensor]:
        """What a recipe gives, as task vectors in fp32. ``each``: every model's parameters, or each one's by name."""
        entries = []
        for e in EXPERTS:
            own = dict(each[e] if per_expert else each)
            if file is not None:
                own["statistics" if file == "grams" else "curvature"] = self.files[file][e]
            entries.append({"model": str(WORK / e), "parameters": own})
        recipe = {"merge_method": method, "models": entries, "parameters": shared, "out_dtype": "float32"}
        if method != "linear":
            recipe["base_model"] = str(models.base_folder())
        with tempfile.TemporaryDirectory() as folder:
            out = mergekit_lr.merge(recipe, Path(folder) / "out", threads=1).out
            found = {}
            for path in out.glob("*.safetensors"):
                found |= load_file(path)
        return {n: found[n].float() - self.base[n] for n in self.base}

    def losses(self, task: dict[str, Tensor], factor: float, windows: dict[str, Tensor]) -> Losses:
        """Mean next-token loss of ``base + factor * task`` on each domain's windows, in nats."""
        self.model.load_state_dict({n: b + factor * task[n] for n, b in self.base.items()}, strict=False)
        out = {}
        with torch.inference_mode():
            for domain, rows in windows.items():
                total = 0.0
                for part in rows.split(16):
                    logits = self.model(input_ids=part, use_cache=False).logits[:, :-1]
                    total += float(
                        torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
                    )
                out[domain] = total / (len(rows) * (WINDOW - 1))
        return out

    def best_factor(self, task: dict[str, Tensor]) -> float:
        """Lambda by the parabola through three calibration losses, that of the base among them."""
        if self.at_base is None:
            self.at_base = mean(self.losses(task, 0.0, self.calibration))
        points = (0.0, *LAMBDAS)
        values = [self.at_base, *(mean(self.losses(task, f, self.calibration)) for f in LAMBDAS)]
        a, b, _ = np.polyfit(points, values, 2)
        if a <= 0:
            return float(points[int(np.argmin(values))])
        return round(float(np.clip(-b / (2 * a), *LIMITS)), 3)


def _decoded(rows: Tensor) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.base_folder())
    return "".join(str(t) for t in tokenizer.batch_decode(rows.tolist()))


def mean(losses: Losses) -> float:
    return sum(losses.values()) / len(losses)


def rows() -> dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None]]:
    """Every merge by its name: method, merge parameters, model parameters, form of the files."""
    found: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None]] = {
        "linear": ("linear", {}, {"weight": 1.0}, None),
        "task_arithmetic": ("task_arithmetic", {}, {"weight": 0.5}, None),
        "fisher": ("fisher", {}, {}, "full"),
        "fisher rank1": ("fisher", {}, {}, "rank1"),
        "fisher text": ("fisher", {}, {}, "text"),
        "wudi soft": ("wudi", {"filter": "soft", "start": "mean"}, {}, None),
        "wudi automatic rank": ("wudi", {"filter": "soft_hard", "start": "mean"}, {}, None),
        "regmean": ("regmean", {}, {}, "grams"),
    }
    for density in (0.2, 0.5):
        found[f"ties {density}"] = ("ties", {}, {"weight": 1.0, "density": density}, None)
        found[f"dare_ties {density}"] = ("dare_ties", {}, {"weight": 0.5, "density": density}, None)
    for power in (0.5, 1.0, 0.0):
        for density in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1):
            name = f"ota power {power} density {density}"
            each = {"density": density}
            found[f"{name} kept full"] = ("ota", {"power": power}, each, "full")
            if density < 1 and power == 0.5:
                found[f"{name} all full"] = ("ota", {"power": power, "denominator": "all"}, each, "full")
            if power == 0.5:
                found[f"{name} kept rank1"] = ("ota", {"power": power}, each, "rank1")
    found["ota power 0.5 density 1.0 kept text"] = ("ota", {"power": 0.5}, {}, "text")
    found["ota power 0.5 density 1.0 normalized full"] = (
        "ota", {"power": 0.5, "normalize_curvature": "model"}, {}, "full",
    )  # fmt: skip
    return found


COMPARED = (
    "linear",
    "task_arithmetic",
    "ties 0.5",
    "dare_ties 0.5",
    "fisher",
    "wudi soft",
    "regmean",
    "ota power 0.5 density 1.0 kept full",
    "ota power 0.5 density 0.4 kept full",
    "ota power 0.5 density 1.0 kept rank1",
    "ota power 1.0 density 1.0 kept full",
    "ota power 0.5 density 1.0 kept text",
)
"""Rows that are measured on more of the held-out text as well, and first."""
FIXED = ("linear",)
"""Rows whose method has no lambda."""


class Results:
    """The result file, saved after every row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, section: str, name: str, make: Callable[[], Any]) -> Any:
        known = self.data.setdefault(section, {})
        if name not in known:
            began = time.monotonic()
            known[name] = make()
            self.save()
            print(f"{section}: {name}: {json.dumps(known[name])[:150]} ({time.monotonic() - began:.0f} s)", flush=True)
        return known[name]

    def save(self) -> None:
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def rounded(losses: Losses) -> Losses:
    return {k: round(v, 5) for k, v in losses.items()}


def run(path: Path, part: str) -> None:
    bench, results = Bench(path.parent / (path.stem + "-files")), Results(path)
    results.data["conditions"] = {
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
        "calibration_windows": CALIBRATION * len(DOMAINS), "sweep_windows": SWEPT * len(DOMAINS),
        "compared_windows": COMPARED_ON * len(DOMAINS),
    }  # fmt: skip
    zero = {n: torch.zeros_like(v) for n, v in bench.base.items()}
    tasks: dict[str, dict[str, Tensor]] = {"base": zero}
    for name in (*EXPERTS, "joint"):
        folder = WORK / name
        if (folder / "README.md").exists():
            found = {n: v.float() for p in folder.glob("model*.safetensors") for n, v in load_file(p).items()}
            tasks[name] = {n: found[n] - bench.base[n] for n in bench.base}
    for name, task in tasks.items():
        for section, text in (("swept", bench.swept), ("compared", bench.compared)):
            results.get(section, name, lambda t=task, w=text: rounded(bench.losses(t, 1.0, w)))  # type: ignore[misc]
    if part in ("all", "rows"):
        listed = sorted(rows().items(), key=lambda item: item[0] not in COMPARED)
        for name, (method, shared, each, file) in listed:
            one_row(bench, results, name, lambda: bench.merged(method, shared, each, file))  # noqa: B023
    if part in ("all", "agreement"):
        results.get("agreement", "log correlation", lambda: agreement(bench))
    if part in ("all", "scales"):
        from dense_scales import scaled_rows

        scaled_rows(bench, results)
    if part in ("all", "rows_fitted"):
        from dense_rows import row_scales

        row_scales(bench, results)


def one_row(bench: Bench, results: Results, name: str, make: Callable[[], dict[str, Tensor]]) -> None:
    """Choose lambda, measure; on more text too where the row is compared."""
    wanted = [s for s in ("swept", "compared") if name not in results.data.get(s, {})]
    if name not in COMPARED and "compared" in wanted:
        wanted.remove("compared")
    if not wanted:
        return
    task = make()
    factor = results.get("lambda", name, lambda: 1.0 if name in FIXED else bench.best_factor(task))
    for section in wanted:
        text = bench.swept if section == "swept" else bench.compared
        results.get(section, name, lambda w=text: rounded(bench.losses(task, factor, w)))  # type: ignore[misc]


def agreement(bench: Bench) -> dict[str, dict[str, float]]:
    """Correlation of log curvature between the saved second moments and each estimate, over all entries > 0."""
    found: dict[str, dict[str, float]] = {}
    for e in EXPERTS:
        saved = load_file(bench.files["full"][e])
        found[e] = {}
        for form in ("text",):
            other = load_file(bench.files[form][e])
            pairs = [(v.flatten(), other[n.replace("exp_avg_sq", "fisher")].flatten()) for n, v in saved.items()]
            a, b = (torch.cat(x) for x in zip(*pairs, strict=True))
            both = (a > 0) & (b > 0)
            logs = torch.stack([a[both].double().log(), b[both].double().log()])
            found[e][form] = round(float(torch.corrcoef(logs)[0, 1]), 4)
    return found


if __name__ == "__main__":
    arguments = [a for a in sys.argv[2:] if not a.startswith("--")]
    chosen = next((a.partition("=")[2] for a in sys.argv if a.startswith("--part=")), "all")
    where = Path(arguments[0]) if arguments else RESULT
    if sys.argv[1] == "run":
        run(where, chosen)
    else:
        from dense_report import report

        report(where, DOC)
