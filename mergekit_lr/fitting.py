"""Fits the row scales of a `row_scales` recipe on text, one tensor's task vectors in memory at a time.

The merge ``W = base + sum_i s_i[r] D_i[r]`` is linear in s, so with ``G = d loss / d W`` the gradient is
``d loss / d s_i[r] = sum_c G[r, c] D_i[r, c]``. A step is an ordinary forward and backward pass of the merged model,
then Adam on the scales; task vectors are read from their files again at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.writer import Entry, FileWriter
from mergekit_lr.curvatures.estimate import sequences
from mergekit_lr.engine.memory import default_limit
from mergekit_lr.engine.plan import choose_device
from mergekit_lr.errors import CheckpointError, ResourceError, UsageError
from mergekit_lr.evaluation import load_for_evaluation
from mergekit_lr.lazy import torch
from mergekit_lr.recipe import Recipe, load_recipe
from mergekit_lr.recipe.parameters import Gradient
from mergekit_lr.sizes import format_size, parse_size

if TYPE_CHECKING:
    from torch import Tensor

BETAS, TINY = (0.8, 0.95), 1e-8
HELD_BACK = (
    4  # the last quarter of each text judges steps instead of making them: other documents, where it has several
)
BATCH = 8


@dataclass(frozen=True)
class Fitted:
    """What a fit gave. ``losses``: mean loss on the sequences held back, after every number of steps from 0 on."""

    files: tuple[Path, ...]
    scales: int
    losses: tuple[float, ...]
    steps: int

    def to_dict(self) -> dict[str, Any]:
        files = [str(f) for f in self.files]
        return {"files": files, "scales": self.scales, "losses": list(self.losses), "steps": self.steps}


def fit_scales(
    recipe: Any,
    text: Sequence[str | Path],
    *,
    samples: int = 128,
    sequence_length: int = 256,
    steps: int = 24,
    rate: float = 0.1,
    start: float | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    overwrite: bool = False,
    tell: Callable[[int, int, str], None] | None = None,
) -> Fitted:
    """Write the scale files that a `row_scales` recipe names.

    ``samples`` sequences are spread evenly over the texts, which count alike; the last quarter of each judges. Adam
    with ``rate`` takes ``steps`` steps from ``start`` (by default 1 / number of models); the scales after the step with
    the least loss on what was held back are kept. Text that a model was trained on will not do: it asks for more of
    itself.

    Raises:
        UsageError: another method's recipe, a file exists, a number is out of range.
        CheckpointError: the base does not load, or its parameters are not the merge's tensors.
        ResourceError: weights and gradients exceed ``max_memory``.
    """
    loaded = load_recipe(recipe)
    files = _files(loaded, overwrite)
    if not text:
        raise UsageError("there is no text to fit on", fix="add --text FILE")
    if steps < 1 or samples < HELD_BACK * len(text) or sequence_length < 2 or not rate > 0:
        fix = f"give at least 1 step, {HELD_BACK} samples for each text, 2 tokens and a rate above 0"
        raise UsageError("a number is out of range", fix=fix)
    assert loaded.base_model is not None
    checkpoints = [open_model(r) for r in (loaded.base_model, *(m.reference for m in loaded.models))]
    try:
        base, models = checkpoints[0], checkpoints[1:]
        if base.folder is None:
            raise CheckpointError("the base cannot be run", where=base.reference, why="it is not a model folder")
        network, tokenizer = load_for_evaluation(base.folder, choose_device(device))
        fit = Fit(network, base, models, 1 / len(models) if start is None else start)
        _check_memory(fit, max_memory)
        drawn = [list(sequences(tokenizer, [t], samples // len(text), sequence_length)) for t in text]
        losses = _descend(fit, drawn, steps, rate, tell or (lambda *_: None))
    finally:
        for checkpoint in checkpoints:
            checkpoint.close()
    facts = {"kind": "row scales", "steps": str(losses.index(min(losses))), "samples": str(samples)}
    for i, path in enumerate(files):
        fs.make_folder(path.parent, parents=True)
        with FileWriter(path, [Entry(f"{n}.scale", "F32", tuple(s.shape)) for n, s in fit.best[i].items()], facts) as w:
            for name, s in fit.best[i].items():
                w.write(f"{name}.scale", s.cpu())
    count = sum(s.numel() for one in fit.best for s in one.values())
    return Fitted(tuple(files), count, tuple(losses), losses.index(min(losses)))


def _files(recipe: Recipe, overwrite: bool) -> list[Path]:
    if recipe.merge_method != "row_scales" or recipe.slices:
        why = "it has slices" if recipe.slices else f"its method is {recipe.merge_method}"
        raise UsageError("not a recipe whose scales can be fitted", why=why, fix="write merge_method: row_scales")
    found = []
    for _, table in recipe.groups[0].table.models:
        values = [r.value for r in table.get("scales", ())]
        if len(values) != 1 or isinstance(values[0], Gradient):
            raise UsageError("a model needs one file of scales for all its tensors", fix="write scales: PATH")
        found.append(Path(str(values[0])))
    if len(set(found)) < len(found):
        raise UsageError("two models name the same file of scales", fix="give each a file of its own")
    present = [p for p in found if p.exists()]
    if present and not overwrite:
        raise UsageError(f"{present[0]} exists", fix="name another file, or overwrite it with --overwrite")
    return found


@dataclass
class Fit:
    """The merged model in memory, its task vectors on disk, and the scales.

    ``rows``: name to scale for each model; ``best`` those that judged best.
    """

    network: Any
    base: Checkpoint
    models: Sequence[Checkpoint]
    start: float
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    best: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.named = {n: p for n, p in self.network.named_parameters() if n in self.base.tensors}
        stray = [n for n, _ in self.network.named_parameters() if n not in self.base.tensors]
        unlike = [n for n, p in self.named.items() for m in (self.base, *self.models) if not _fits(m, n, p)]
        if stray or unlike:
            name = (stray or unlike)[0]
            why = "the loaded model has another name or shape for it, or a model lacks it"
            fix = "fit models whose files hold the parameters as transformers loads them"
            raise CheckpointError(f"{name!r} cannot be fitted", where=self.base.reference, why=why, fix=fix)
        where = self.network.device
        rows = {n: tuple(p.shape)[:1] for n, p in self.named.items()}
        self.rows = [{n: torch.full(s, self.start, device=where) for n, s in rows.items()} for _ in self.models]

    def task_vectors(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """The base's tensor and what each model adds to it, fp32."""
        p = self.named[name]
        base, *others = (
            c.read(name, 0, p.numel()).to(p.device).to(torch.float32).view(p.shape) for c in (self.base, *self.models)
        )
        return base, [x - base for x in others]

    def merge(self) -> None:
        """Put the merged weights into the network."""
        with torch.no_grad():
            for name, p in self.named.items():
                base, deltas = self.task_vectors(name)
                for rows, d in zip(self.rows, deltas, strict=True):
                    base += _widened(rows[name], d) * d
                p.copy_(base)

    def loss(self, batches: Sequence[Sequence[Tensor]], *, backward: bool) -> float:
        """Mean over texts of the mean loss of a token, in nats."""
        total: list[float] = []
        for one in batches:
            tokens = sum((len(ids) - 1) for ids in one) * len(batches)
            for first in range(0, len(one), BATCH):
                ids = torch.stack(list(one[first : first + BATCH])).to(self.network.device)
                with torch.set_grad_enabled(backward):
                    logits = self.network(input_ids=ids, use_cache=False).logits[:, :-1].float()
                    wanted = ids[:, 1:].flatten()
                    value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum") / tokens
                if backward:
                    value.backward()  # type: ignore[no-untyped-call]
                total.append(float(value.detach()))
        return math.fsum(total)

    def gradients(self) -> Iterator[tuple[int, str, Tensor]]:
        """(model, tensor, gradient by its scale); frees the weight's gradient."""
        for name, p in self.named.items():
            grad, p.grad = p.grad, None
            if grad is None:
                continue
            _, deltas = self.task_vectors(name)
            for i, d in enumerate(deltas):
                product = grad * d
                yield i, name, product.flatten(1).sum(1) if product.dim() > 1 else product


def _fits(checkpoint: Checkpoint, name: str, parameter: Tensor) -> bool:
    found = checkpoint.tensors.get(name)
    return found is not None and found.shape == tuple(parameter.shape)


def _widened(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *(1,) * (like.dim() - 1)) if like.dim() > 1 else scale


def _check_memory(fit: Fit, max_memory: str | int | None) -> None:
    limit = default_limit() if max_memory is None else parse_size(max_memory)
    sizes = [p.numel() for p in fit.named.values()]
    scales = sum(s.numel() for rows in fit.rows for s in rows.values())
    needed = 4 * (2 * sum(sizes) + (len(fit.models) + 3) * max(sizes) + 4 * scales)
    if needed > limit:
        raise ResourceError(
            "the fit does not fit in memory",
            why=f"weights and gradients take {format_size(needed)}, {format_size(limit)} are allowed",
            fix="allow more with --max-memory",
        )


def _descend(
    fit: Fit, drawn: Sequence[Sequence[Tensor]], steps: int, rate: float, tell: Callable[[int, int, str], None]
) -> list[float]:
    """Adam from the start on; keeps the best scales in ``fit`` and returns every judgement."""
    cuts = [len(one) - len(one) // HELD_BACK for one in drawn]
    learned = [one[:cut] for one, cut in zip(drawn, cuts, strict=True)]
    judged = [one[cut:] for one, cut in zip(drawn, cuts, strict=True)]
    first = [{n: torch.zeros_like(s) for n, s in rows.items()} for rows in fit.rows]
    second = [{n: torch.zeros_like(s) for n, s in rows.items()} for rows in fit.rows]
    losses: list[float] = []
    for step in range(1, steps + 2):
        fit.merge()
        losses.append(fit.loss(judged, backward=False))
        tell(step - 1, steps, f"loss {losses[-1]:.4f}")
        if losses[-1] <= min(losses):
            fit.best = [{n: s.clone() for n, s in rows.items()} for rows in fit.rows]
        if step > steps:
            break
        fit.loss(learned, backward=True)
        for i, name, g in fit.gradients():
            m, v = first[i][name], second[i][name]
            m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            root = (v / (1 - BETAS[1] ** step)).sqrt_().add_(TINY)
            fit.rows[i][name] -= rate / (1 - BETAS[0] ** step) * m / root
    return losses
