"""Scales of each row, fitted by `mergekit_lr.fit_scales` on half of the held-out text; part of `dense_quality`.

Fitting scales is training, of few numbers, so this part splits by document: the held-out text of a domain is a sequence
of documents, scales are fitted on its first half, and every row here is measured on the whole second half. A control
scales the rows of the base itself, with no expert at all, on the same text: what is left over it is what the experts
bring.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import mergekit_lr

STEPS, SAMPLES = 12, 128
# what is scaled: (start, Adam's rate); starts are the lambdas of the unscaled merges
FITS = {"shares of ota power 1": (1.1, 0.1), "task vectors": (0.37, 0.04), "the base alone (control)": (0.0, 0.02)}


def row_scales(bench: Any, results: Any) -> None:
    """Everything that the table of rows needs."""
    from dense_quality import EXPERTS, WORK, windows_of
    from zoo.sources import DOMAINS
    from zoo.text import heldout_tokens

    half = {d: heldout_tokens(d) for d in DOMAINS}
    first, second = ({d: t[: len(t) // 2] if k == 0 else t[len(t) // 2 :] for d, t in half.items()} for k in (0, 1))
    measured = {d: windows_of(t, len(t) // 256) for d, t in second.items()}
    bench.tuning = {d: windows_of(t, 24) for d, t in first.items()}

    def add(name: str, task: dict[str, Tensor], factor: float = 1.0) -> None:
        results.get("rows", name, lambda: {k: round(v, 5) for k, v in bench.losses(task, factor, measured).items()})

    def of(folder: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        found = {n: v.float() for p in folder.glob("model*.safetensors") for n, v in load_file(p).items()}
        return {n: found[n] - b for n, b in bench.base.items()}

    add("base", bench.base, 0.0)
    for name in ("joint", *EXPERTS):
        add(name, of(WORK / name))
    for name, (method, shared, each, file) in {
        "task_arithmetic": ("task_arithmetic", {}, {"weight": 0.5}, None),
        "ota power 1.0 density 1.0 kept full": ("ota", {"power": 1.0}, {}, "full"),
    }.items():
        if name not in results.data.get("rows", {}):
            add(name, bench.merged(method, shared, each, file), results.data["lambda"][name])
    coarse(bench, results, add)
    texts = _texts(bench, first)
    for name in FITS:
        if f"row scales, {name}" not in results.data.get("rows", {}):
            add(f"row scales, {name}", of(fitted(bench, results, name, texts)))


def coarse(bench: Any, results: Any, add: Any) -> None:
    """The coarser grains of `dense_scales` on the same split."""
    from dense_scales import GRAINS, combined, fit, key_of, terms_of

    wanted = [g for g in GRAINS if f"ota power 1, scale per {g}" not in results.data.get("rows", {})]
    if not wanted:
        return
    terms = terms_of(bench, "ota", {"power": 1.0}, {}, "full")
    begin = {key_of("", i, "expert"): 1.1 for i in range(3)}
    for grain in GRAINS:
        scales = fit(bench, terms, begin, grain)
        begin = {k: float(v) for k, v in scales.items()}
        add(f"ota power 1, scale per {grain}", combined(terms, scales, grain))


def _texts(bench: Any, first: dict[str, Any]) -> list[Path]:
    from dense_quality import models
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.base_folder())
    paths = []
    for domain, tokens in first.items():
        path = bench.folder / f"first-half-{domain}.txt"
        path.write_text(str(tokenizer.decode(tokens.tolist())), encoding="utf-8")
        paths.append(path)
    return paths


def fitted(bench: Any, results: Any, name: str, texts: list[Path]) -> Path:
    """Fit, merge, and the folder of the merge."""
    from dense_quality import models

    start, rate = FITS[name]
    folder = bench.folder / ("rows-" + name.split()[0])
    entries = []
    for e, model in sources(bench, name).items():
        entries.append({"model": str(model), "parameters": {"scales": str(folder / f"{e}.safetensors")}})
    recipe = {
        "merge_method": "row_scales",
        "base_model": str(models.base_folder()),
        "models": entries,
        "out_dtype": "float32",
    }
    found = mergekit_lr.fit_scales(
        recipe, texts, samples=SAMPLES, steps=STEPS, rate=rate, start=start, device="cpu", overwrite=True
    )
    results.data.setdefault("fits", {})[name] = {
        "scales": found.scales,
        "steps": found.steps,
        "losses": [round(x, 5) for x in found.losses],
    }
    return mergekit_lr.merge(recipe, folder / "out", threads=1, overwrite=True).out


def sources(bench: Any, name: str) -> dict[str, Path]:
    """The models whose differences from the base are scaled."""
    from dense_quality import EXPERTS, WORK, models

    if name == "task vectors":
        return {e: WORK / e for e in EXPERTS}
    if name.startswith("the base"):
        folder = bench.folder / "doubled"
        if not folder.exists():
            folder.mkdir()
            save_file({n: (2 * b).contiguous() for n, b in bench.base.items()}, folder / "model.safetensors")
        return {"doubled": folder}
    found = {}
    for kept in EXPERTS:
        found[kept] = out = bench.folder / f"share-{kept}"
        if not out.exists():
            each = [
                {
                    "model": str(WORK / e),
                    "parameters": {"curvature": bench.files["full"][e], "scale": float(e == kept)},
                }
                for e in EXPERTS
            ]
            recipe = {"merge_method": "ota", "base_model": str(models.base_folder()), "models": each}
            recipe |= {"parameters": {"power": 1.0}, "out_dtype": "float32"}
            mergekit_lr.merge(recipe, out, threads=1)
    return found
