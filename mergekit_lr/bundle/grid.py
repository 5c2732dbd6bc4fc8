"""Lambda by held-out loss: the recovered task models of the paper's grid, each run on text before anything is packed.

Masks are nested: a larger lambda keeps a subset. So one byte an entry and task, how many lambdas of the grid keep it,
holds the masks of all of them, and every input is read once for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.bundle.masking import Packing, Parts
from mergekit_lr.bundle.memory import FilePart, MemoryDesk
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.open import local_path
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import RecipeError
from mergekit_lr.evaluation import batch_loss, load_for_evaluation, text_of, windows
from mergekit_lr.lazy import torch
from mergekit_lr.localize import wanted
from mergekit_lr.method import GRID
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Preparation

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.bundle.learning import Course

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)
CHOSEN = "lambdas.json"
BATCH = 8


@dataclass(frozen=True)
class Open:
    """A tensor of the bundle and the tasks that have it, in the order of ``packing.lambdas``."""

    packing: Packing
    tasks: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]  # the base's first
    on_grid: tuple[str, ...] = ()  # tasks whose lambda is not chosen yet
    model_wide: bool = False  # trimmed where all tensors of a task vector compete
    course: Course | None = None  # how its masks are learned; None where they are thresholds'


def choose(work: Preparation, tensors: Sequence[Open], tasks: Sequence[str]) -> None:
    """For each of ``tasks`` the lambda of least loss, and all losses, into ``lambdas.json``."""
    if (work.folder / CHOSEN).exists():
        return
    _check(work.recipe)
    files = []
    for number, tensor in enumerate(tensors):
        path = work.folder / f"levels-{number:05d}.safetensors"
        if not path.exists():
            write_safetensors(path, _levels(tensor, LAMBDAS))
        files.append(path)
        work.tell(number + 1, len(tensors), "making masks")
    assert work.recipe.base_model is not None
    network, tokenizer = load_for_evaluation(local_path(work.recipe.base_model.model), work.device)
    found: dict[str, dict[str, Any]] = {}
    for done, task in enumerate(tasks):
        batches = batches_of(work.recipe, task, tokenizer)
        losses = []
        for rank in range(1, len(LAMBDAS) + 1):
            _put(network, tensors, files, task, rank)
            losses.append(sum(batch_loss(network, b) for b in batches) / sum(b[:, 1:].numel() for b in batches))
            work.tell(done * len(LAMBDAS) + rank, len(tasks) * len(LAMBDAS), "choosing lambda")
        best = min(range(len(LAMBDAS)), key=lambda i: losses[i])
        found[task] = {"lambda": LAMBDAS[best], "losses": dict(zip(map(str, LAMBDAS), losses, strict=True))}
    partial = work.folder / (CHOSEN + ".partial")
    fs.write_file(partial, json.dumps(found, indent=1).encode())
    fs.rename(partial, work.folder / CHOSEN)
    for path in files:
        fs.remove_file(path)


def chosen(prepared: Path | None) -> dict[str, dict[str, Any]]:
    """What `choose` found: task -> lambda and losses; nothing before."""
    if prepared is None or not (prepared / CHOSEN).exists():
        return {}
    found: dict[str, dict[str, Any]] = json.loads((prepared / CHOSEN).read_bytes())
    return found


def _levels(tensor: Open, grid: Sequence[float]) -> dict[str, Tensor]:
    """The base and tau as they are stored, and for each task how many of the grid's lambdas keep an entry."""
    job = tensor.packing
    read = MemoryDesk([FilePart(c, job.name) for c in tensor.checkpoints], torch.empty(0), job.out)
    parts = Parts(job, read)
    levels = {t: torch.zeros(job.numel, dtype=torch.uint8) for t in tensor.tasks}
    vector = torch.empty(job.numel, dtype=torch_dtype(job.out))
    base = torch.empty_like(vector)
    for start, raw in parts.blocks():
        for s in range(0, raw[0].numel(), GRID):
            e = min(raw[0].numel(), s + GRID)
            part = parts.part(raw, start, s, e)
            here = slice(start + s, start + e)
            vector[here], base[here] = part.narrow, raw[0][s:e]
            for t, d, lam in zip(tensor.tasks, part.deltas, job.lambdas, strict=True):
                for one in grid if lam is None else [lam] * len(grid):
                    levels[t][here] += wanted(d, part.vector, one)
    return {"base": base, "vector": vector} | {f"level/{t}": x for t, x in levels.items()}


def _put(network: Any, tensors: Sequence[Open], files: Sequence[Path], task: str, rank: int) -> None:
    """Give the network the task's weights as the ``rank``-th lambda would recover them."""
    places = network.state_dict(keep_vars=True)
    for tensor, path in zip(tensors, files, strict=True):
        job = tensor.packing
        if task not in tensor.tasks or job.name not in places:
            continue
        with open_file(path, "levels") as stored, torch.inference_mode():
            base, vector, level = (stored.read(n, 0, job.numel) for n in ("base", "vector", f"level/{task}"))
            moved = base.float() + vector.float() * (level >= rank)
            places[job.name].detach().copy_(moved.to(base.dtype).view(job.shape))


def _check(recipe: Recipe) -> None:
    """Refuse before anything is read."""
    if recipe.calibration is None or not recipe.calibration.text:
        raise RecipeError(
            "lambda: grid needs text files to measure on", where="calibration", fix="add `calibration: {text: [FILE]}`"
        )


def batches_of(recipe: Recipe, task: str, tokenizer: Any) -> list[Tensor]:
    """Windows of the task's text: of the files called like it, or of all where none is."""
    asked = recipe.calibration
    assert asked is not None
    own = [t for t in asked.text if Path(t).stem == task] or list(asked.text)
    every: list[Tensor] = []
    for file in own:
        ids = tokenizer(text_of(Path(file)), add_special_tokens=False, verbose=False)["input_ids"]
        found = windows(torch.tensor(ids, dtype=torch.int64), asked.sequence_length)
        every += [w for w in found if len(w) == asked.sequence_length + 1]
    if not every:
        raise RecipeError(
            f"the text for task {task!r} is shorter than one window of {asked.sequence_length} tokens",
            where="calibration",
            fix="give more text, or a smaller sequence_length",
        )
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    picked = [every[i] for i in sorted(order[: asked.samples])]
    return [torch.stack(picked[i : i + BATCH]) for i in range(0, len(picked), BATCH)]
