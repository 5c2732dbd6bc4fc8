"""Loss along the line between two models, before and after alignment, and the barrier on it.

The barrier is ``max_t L((1 - t) A + t B) - ((1 - t) L(A) + t L(B))`` (Frankle et al., arXiv 1912.05671; Entezari et
al., arXiv 2110.06296). Zero means that the two are linearly connected.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lr.checkpoint import fs
from mergekit_lr.errors import RecipeError, UsageError
from mergekit_lr.matching.many import interpolated
from mergekit_lr.matching.network import network_of
from mergekit_lr.matching.running import (
    ROWS,
    Samples,
    as_batches,
    check_labels,
    mean_loss,
    read_inputs,
    read_labels,
)
from mergekit_lr.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from mergekit_lr.matching.align import How

Tensors = dict[str, Tensor]
Tell = Callable[[int, int, str], None]


def barrier_height(losses: Sequence[float], ends: tuple[float, float] | None = None) -> float:
    """The barrier of losses at evenly spaced t from 0 to 1; negative rises do not count.

    ``ends``: the two models' own losses, where the line does not end in exactly these models.
    """
    n = len(losses) - 1
    first, last = ends or (losses[0], losses[-1])
    return max(0.0, *(loss - ((1 - i / n) * first + i / n * last) for i, loss in enumerate(losses)))


def loss_barrier(
    loss: Callable[[Tensors], float], a: Tensors, b: Tensors, points: int = 11
) -> tuple[float, list[float]]:
    """Barrier and losses at ``points`` even places from a to b, for any network: ``loss`` takes a state dict."""
    losses = [loss(interpolated(a, b, i / (points - 1))) for i in range(points)]
    return barrier_height(losses), losses


def barrier(
    recipe: Recipe | str | Path | dict[str, Any],
    *,
    text: Sequence[str | Path] = (),
    data: str | Path | None = None,
    points: int = 11,
    activation: str = "relu",
    max_tokens: int | None = None,
    device: str = "cpu",
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Loss between the two models of a ``weight_matching`` recipe, as they are and aligned.

    Every point is a real merge with this package, into a temporary folder. ``text``: files for language models
    (`mergekit_lr.evaluate`, nats per token, mean over the files); ``data``: ``inputs`` and ``labels`` in a safetensors
    file, for perceptrons and ResNets without a config and classifiers of transformers (mean cross-entropy). One of the
    two is needed.

    Returns:
        ``{"models", "t", "naive", "matched", "barrier_naive", "barrier_matched", "agreement_before",
        "agreement_after", "layers"}``; ``layers`` holds the agreements of each matrix before and after.

    Raises:
        UsageError: neither or both of text and data are given, or points is below 3.
        RecipeError: the recipe is for another method, or has not two models.
    """
    import mergekit_lr

    if bool(text) == (data is not None):
        raise UsageError("measure on text or on data, one of the two", fix="give --text FILE or --data FILE")
    if points < 3:
        raise UsageError(f"{points} points show no barrier", fix="ask for at least 3")
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    names = [str(m.reference) for m in loaded.input_models()]
    merge, _ = loaded.resolve("", 0.0)
    if loaded.merge_method != "weight_matching" or len(names) != 2 or loaded.base_model or merge.then:  # type: ignore[attr-defined]
        raise RecipeError(
            "there is no line to measure on", why="it takes weight_matching of two models, without base_model or `then`"
        )
    loss = _loss_of(text, data, activation, max_tokens, device)
    grid = [i / (points - 1) for i in range(points)]
    with TemporaryDirectory() as folder:
        here = Path(folder)
        aligned = mergekit_lr.merge(replace(loaded, text=""), here / "aligned", device=device)
        saved = here / "aligned" / "weight_matching" / "permutations.safetensors"
        rows: dict[str, list[float]] = {"naive": [], "matched": []}
        for i, t in enumerate(grid):
            for kind, losses in rows.items():
                if tell is not None:
                    tell(2 * i + (kind == "matched"), 2 * points, f"{kind}, t = {t:.2f}")
                out = here / f"{kind}-{i}"
                mergekit_lr.merge(_at(loaded, names, kind, t, saved), out, device=device)
                losses.append(loss(out))
                fs.remove_tree(out)
        layers = _layers(names, saved, merge.matching)  # type: ignore[attr-defined]
        return {
            "models": names,
            "t": grid,
            **rows,
            "barrier_naive": barrier_height(rows["naive"]),
            "barrier_matched": barrier_height(rows["matched"], ends=(rows["naive"][0], rows["naive"][-1])),
            "agreement_before": aligned.report["details"]["models"][0]["agreement_before"],
            "agreement_after": aligned.report["details"]["models"][0]["agreement_after"],
            "layers": layers,
        }


def _at(recipe: Recipe, names: Sequence[str], kind: str, t: float, saved: Path) -> dict[str, Any]:
    if kind == "naive":
        weights = (1 - t, t)
        models = [{"model": n, "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)]
        return {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    plain = recipe.canonical()
    return {**plain, "parameters": {**plain["parameters"], "t": t}, "permutations": str(saved)}


def _loss_of(
    text: Sequence[str | Path], data: str | Path | None, activation: str, max_tokens: int | None, device: str
) -> Callable[[Path], float]:
    if data is None:
        from mergekit_lr.evaluation import evaluate

        return lambda folder: float(evaluate(folder, text, device=device, max_tokens=max_tokens)["mean"])
    path = Path(data)
    inputs, labels = read_inputs(path), read_labels(path)

    def loss(folder: Path) -> float:
        tensors, config = _tensors(folder)
        network = network_of(tensors, config, str(folder), activation)
        samples = Samples(as_batches(inputs, config), None if labels is None else torch.split(labels, ROWS))
        return mean_loss(network, check_labels(network, samples, str(path)))

    return loss


def _tensors(folder: Path) -> tuple[Tensors, Mapping[str, Any] | None]:
    from mergekit_lr.checkpoint.model import open_folder
    from mergekit_lr.matching.inputs import Reader

    with open_folder(folder, str(folder)) as model:
        read = Reader(model, 0)
        return {n: read(n) for n in model.tensors}, model.config


def _layers(names: Sequence[str], saved: Path, matching: How) -> list[dict[str, Any]]:
    from mergekit_lr.checkpoint.open import open_model
    from mergekit_lr.checkpoint.reference import ModelReference
    from mergekit_lr.matching.align import Wanted, align
    from mergekit_lr.matching.diagnose import agreements

    with open_model(ModelReference.parse(names[0])) as a, open_model(ModelReference.parse(names[1])) as b:
        aligned = align([a, b], str(saved), Wanted(matching=matching, keep=1 << 31))
        matrices = [n for n in a.tensors if aligned.specs[0].of_tensor[n][0].groups()]
        before = agreements(matrices, *aligned.reads, top=True)
        after = agreements(matrices, aligned.reads[0], aligned.read(1), top=True)
    return [
        {
            "name": x.name,
            "weighted_before": x.weighted,
            "weighted_after": y.weighted,
            "top_before": x.top,
            "top_after": y.top,
        }
        for x, y in zip(before, after, strict=True)
    ]


def write_plot(result: Mapping[str, Any], path: Path) -> None:
    """The two curves, and every matrix's agreement before and after, as a PNG.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UsageError("a plot needs matplotlib", fix="pip install 'mergekit-lr[plot]', or leave --plot out") from e
    figure = Figure(figsize=(9, 3.4), dpi=110)
    curves, layers = figure.subplots(1, 2)
    curves.plot(result["t"], result["naive"], "o-", label=f"as they are: barrier {result['barrier_naive']:.3f}", ms=3)
    curves.plot(result["t"], result["matched"], "o-", label=f"matched: barrier {result['barrier_matched']:.3f}", ms=3)
    curves.set_xlabel("t")
    curves.set_ylabel("loss (nats)")
    curves.legend(fontsize=8)
    places = range(len(result["layers"]))
    layers.plot(places, [r["weighted_before"] for r in result["layers"]], ".", label="before")
    layers.plot(places, [r["weighted_after"] for r in result["layers"]], ".", label="after")
    layers.set_xlabel("matrix, in file order")
    layers.set_ylabel("agreement of singular directions")
    layers.legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:] or "png", metadata={"Software": None})
    fs.write_file(path, picture.getvalue())
