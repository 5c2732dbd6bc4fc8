"""Every recorded method in float64, from its formula: the judge between mergekit's fp32 results and ours.

Each function takes the inputs of one tensor as float64 and returns a :class:`Reference`. Per-model weights are first
rounded to float32, as a merge in ``dtype: float32`` holds them, so that exact cancellations stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .resolve import OutputTensor

FP32_DIVERGENCE = 5e-7  # what fp32 may lose of the KL divergence of two softmaxes
EXACT_SIGN = 1e-6  # a sum below this part of its terms' size may take either sign in fp32


class Reference(NamedTuple):
    """The result, and where a tie at a threshold (or a sum within fp32 rounding of 0) leaves the choice open."""

    value: Tensor
    open_choice: Tensor


class Inputs(NamedTuple):
    """The inputs of one tensor: all of them in order, the base if any, and the others with their parameters."""

    all: list[Tensor]
    base: Tensor | None
    others: list[Tensor]
    all_settings: list[Mapping[str, Any]]
    settings: list[Mapping[str, Any]]
    shared: Mapping[str, Any]

    def weights(self, of_all: bool = False) -> list[float]:
        """Weights of the others (or of all inputs), rounded to float32."""
        settings = self.all_settings if of_all else self.settings
        return [float(torch.tensor(float(s["weight"]), dtype=torch.float32)) for s in settings]

    def deltas(self) -> list[Tensor]:
        """Task vectors."""
        assert self.base is not None
        return [other - self.base for other in self.others]


def decided(value: Tensor) -> Reference:
    """A result without open choices."""
    return Reference(value, torch.zeros_like(value, dtype=torch.bool))


def linear(x: Inputs) -> Reference:
    """sum w_i W_i, divided by sum w_i unless normalize is off."""
    weights = x.weights(of_all=True)
    total = sum(w * t for w, t in zip(weights, x.all, strict=True))
    assert isinstance(total, Tensor)
    return decided(total / sum(weights) if x.shared.get("normalize", True) else total)


def _arc(t: float, a: Tensor, b: Tensor, cosine: Tensor, straight: Tensor) -> Tensor:
    theta = torch.acos(torch.where(straight, 0.0, cosine))
    curved = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    along: Tensor = torch.where(straight, (1 - t) * a + t * b, curved)
    return along


def _unit(x: Tensor, dim: int, floor: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / norm.clamp(min=floor)


def slerp(x: Inputs) -> Reference:
    """Along the arc from the base to the other, over the whole tensor; linear where |cos| > 0.9995."""
    assert x.base is not None
    a, b = x.base.reshape(-1), x.others[0].reshape(-1)
    norms = [v.norm() if v.norm() > 1e-8 else torch.ones(()) for v in (a, b)]
    cosine = (a @ b / (norms[0] * norms[1])).clamp(-1, 1)
    return decided(_arc(float(x.shared["t"]), a, b, cosine, cosine.abs() > 0.9995).reshape(x.base.shape))


def nuslerp(x: Inputs) -> Reference:
    """Along the arc between two tensors (or task vectors), whole, per row (last axis) or per column (first axis)."""
    w = x.weights()
    t = 0.5 if abs(sum(w)) < 1e-6 else w[1] / sum(w)
    a, b = x.deltas() if x.base is not None else x.others
    shape = a.shape
    flat = x.shared.get("nuslerp_flatten", True) or not shape
    dim = 0 if x.shared.get("nuslerp_row_wise", False) and not flat else -1
    if flat:
        a, b = a.reshape(-1), b.reshape(-1)
    cosine = (_unit(a, dim, 1e-7) * _unit(b, dim, 1e-7)).sum(dim=dim, keepdim=True).clamp(-1, 1)
    # mergekit tests 1 - cos^2 <= 1e-16 on float32 values: the straight branch begins where that rounds to 0.
    out = _arc(t, a, b, cosine, 1 - cosine.square() <= 2.0**-24).reshape(shape)
    return decided(out if x.base is None else x.base + out)


def multislerp(x: Inputs) -> Reference:
    """One step in the tangent space at the weighted mean direction, times the weighted mean norm."""
    if len(x.others) == 1:
        return decided(x.others[0])
    eps = float(x.shared.get("eps", 1e-8))
    points = torch.stack([p.reshape(-1) for p in (x.deltas() if x.base is not None else x.others)])
    weights = torch.tensor(x.weights(), dtype=torch.float64)
    if x.shared.get("normalize_weights", True):
        weights = weights / weights.sum()
    norms = points.norm(dim=1)
    units = points / (norms + eps)[:, None]
    mean = weights @ units
    if mean.norm() < eps:
        if len(points) != 2:
            raise ValueError("directions cancel")
        out = weights @ points
    else:
        mean = mean / mean.norm()
        tangent = weights @ (units - (units @ mean)[:, None] * mean)
        angle = tangent.norm() + eps
        out = (mean * torch.cos(angle) + tangent * torch.sin(angle) / angle) * (weights @ norms)
    out = out.reshape(x.others[0].shape)
    return decided(out if x.base is None else x.base + out)


def karcher(x: Inputs) -> Reference:
    """Riemannian mean of the directions by fixed-point steps, times the mean norm."""
    tol, steps = float(x.shared.get("tol", 1e-5)), int(x.shared.get("max_iter", 10))
    points = torch.stack([p.reshape(-1) for p in x.all])
    norms = points.norm(dim=1)
    used = norms > tol
    if not used.any():
        return decided(torch.zeros_like(x.all[0]))
    units = points[used] / norms[used][:, None]
    mean = units.mean(dim=0)
    mean = units[0] if mean.norm() < tol else mean / mean.norm()
    for _ in range(steps):
        cosines = (units @ mean).clamp(-1, 1)
        angles = torch.acos(cosines)
        scales = torch.where(angles < tol, 0.0, angles / torch.sin(angles).clamp(min=1e-300))
        tangent = (scales[:, None] * (units - cosines[:, None] * mean)).mean(dim=0)
        length = tangent.norm()
        if length < tol:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * tangent / length
        mean = mean / mean.norm()
    return decided((norms.mean() * mean).reshape(x.all[0].shape))


def _ranks_kept(delta: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Keep ascending |delta| ranks first .. last-1; also where an equal magnitude at either edge leaves a choice."""
    size = delta.abs().reshape(-1)
    order = torch.argsort(size, stable=True)
    keep = torch.zeros(size.numel(), dtype=torch.bool)
    keep[order[first:last]] = True
    unclear = torch.zeros_like(keep)
    for edge in (first, last):
        if 0 < edge < size.numel() and 0 < size[order[edge]] == size[order[edge - 1]]:
            unclear |= size == size[order[edge]]
    return keep.reshape(delta.shape), unclear.reshape(delta.shape)


def _everything(delta: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(delta, dtype=torch.bool), torch.zeros_like(delta, dtype=torch.bool)


def largest(delta: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """TIES: the max(1, int(density N)) largest magnitudes; none at density 0, all at 1."""
    density, count = float(settings.get("density", 1.0)), delta.numel()
    if density >= 1:
        return _everything(delta)
    kept = 0 if density <= 0 else max(1, int(density * count))
    return _ranks_kept(delta, count - kept, count)


def without_outliers(delta: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Breadcrumbs: drop int(gamma N) from the top, then from the bottom until int(density N) are left."""
    density, gamma, count = float(settings.get("density", 1.0)), float(settings.get("gamma", 0.01)), delta.numel()
    if density >= 1:
        return _everything(delta)
    kept = int(density * count)
    first = max(0, count - kept - int(gamma * count))
    return _ranks_kept(delta, first, first + kept)


def all_or_none(delta: Tensor, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """DARE and DELLA where nothing is random: density 1 keeps all, density 0 nothing."""
    density = float(settings.get("density", 1.0))
    if 0 < density < 1:
        raise ValueError("random at this density")
    keep, unclear = _everything(delta)
    return keep & (density >= 1), unclear


Selection = Callable[[Tensor, Mapping[str, Any]], tuple[Tensor, Tensor]]


def _agreeing(deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Where each entry has the sign of the sum (a sum of 0 counts as plus); also where the sum's sign is unclear."""
    stacked = torch.stack(deltas)
    total = stacked.sum(dim=0)
    keep = stacked.sign() == torch.where(total >= 0, 1.0, -1.0)
    return keep, (total != 0) & (total.abs() <= EXACT_SIGN * stacked.abs().sum(dim=0))


def task_arithmetic_family(
    select: Selection | None, consensus: bool, normalize: bool, rescale: bool
) -> Callable[[Inputs], Reference]:
    """B + lambda sum w_i S(D_i), with or without selection S, sign consensus and division by the weights kept."""

    def method(x: Inputs) -> Reference:
        assert x.base is not None
        weights, open_choice = x.weights(), torch.zeros_like(x.base, dtype=torch.bool)
        scaled = []
        for delta, weight, settings in zip(x.deltas(), weights, x.settings, strict=True):
            keep, unclear = _everything(delta) if select is None else select(delta, settings)
            open_choice |= unclear
            masked = torch.where(keep, delta, 0.0)
            before, after = delta.abs().sum(), masked.abs().sum()
            partly = select is not None and float(settings.get("density", 1.0)) < 1
            if x.shared.get("rescale", rescale) and partly and before >= 1e-7 and after >= 1e-7:
                masked = masked * (before / after)
            scaled.append(weight * masked)
        column = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * x.base.dim())
        if consensus:
            keep, unclear = _agreeing(scaled)
            open_choice |= unclear
            divisor = (column * keep).sum(dim=0)
            divisor = torch.where(divisor == 0, 1.0, divisor)
        else:
            keep = torch.ones(len(scaled), *x.base.shape, dtype=torch.bool)
            total = float(sum(weights))
            divisor = torch.tensor(1.0 if abs(total) < 1e-8 else total, dtype=torch.float64)
        mixed = (torch.stack(scaled) * keep).sum(dim=0)
        if x.shared.get("normalize", normalize):
            mixed = mixed / divisor
        return Reference(x.base + float(x.shared.get("lambda", 1.0)) * mixed, open_choice)

    return method


def model_stock(x: Inputs) -> Reference:
    """t mean(W_i) + (1 - t) B with t = n c / (1 + (n - 1) c), c the mean pairwise cosine, per tensor or per row."""
    assert x.base is not None
    rows = bool(x.shared.get("filter_wise", False)) and x.base.dim() > 0
    deltas = [d if rows else d.reshape(-1) for d in x.deltas()]
    cosines = []
    for i, a in enumerate(deltas):
        for b in deltas[i + 1 :]:
            product = (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-6)
            cosines.append(((a * b).sum(dim=-1) / product).clamp(-1, 1))
    cosine, count = torch.stack(cosines).mean(dim=0), len(deltas)
    bottom = 1 + (count - 1) * cosine
    t = torch.where(bottom.abs() < 1e-6, 0.0, count * cosine / bottom)
    t = t[..., None] if rows else t
    mean = sum(x.others[1:], start=x.others[0]) / count
    return decided(t * mean + (1 - t) * x.base)


def sce(x: Inputs) -> Reference:
    """Select by variance, weigh by mean square, erase the minority signs."""
    assert x.base is not None
    deltas = torch.stack(x.deltas())
    density, open_choice = float(x.shared.get("select_topk", 1.0)), torch.zeros_like(x.base, dtype=torch.bool)
    if density < 1:
        variance = deltas.var(dim=0, unbiased=False)
        kept = int(int(torch.count_nonzero(variance)) * density) if density > 0 else 0
        keep, open_choice = _ranks_kept(variance, variance.numel() - kept, variance.numel())
        deltas = deltas * keep
    squares = deltas.square().reshape(len(deltas), -1).mean(dim=1)
    weights = squares / squares.sum() if squares.sum() >= 1e-6 else torch.full_like(squares, 1 / len(squares))
    agree, unclear = _agreeing(list(deltas))
    used = weights.reshape(-1, *[1] * x.base.dim()) * agree
    out = x.base + (used * deltas).sum(dim=0) / used.sum(dim=0).clamp(min=1e-6)
    return Reference(out, open_choice | unclear)


def nearswap(x: Inputs) -> Reference:
    """w other + (1 - w) base, w = min(1, t / max(|difference|, 1e-6))."""
    assert x.base is not None
    weight = (float(x.shared["t"]) / (x.others[0] - x.base).abs().clamp(min=1e-6)).clamp(max=1)
    return decided(weight * x.others[0] + (1 - weight) * x.base)


def arcee_fusion(x: Inputs) -> Reference:
    """The other's entries whose |difference| times the KL divergence of their row reaches median + 1.5 (Q3 - Q1)."""
    assert x.base is not None
    other = x.others[0]
    p, q = other.softmax(dim=-1) + 1e-8, x.base.softmax(dim=-1) + 1e-8
    score = (other - x.base).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ordered = score.reshape(-1).sort().values
    q1, median, q3 = (ordered[int(share * (ordered.numel() - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (q3 - q1)
    # mergekit's fp32 softmaxes leave about 1e-7 of noise in a divergence.
    noise = (other - x.base).abs() * FP32_DIVERGENCE + EXACT_SIGN * threshold
    unclear = ((score - threshold).abs() <= noise) & (other != x.base)
    return Reference(torch.where(score >= threshold, other, x.base), unclear)


def ram(scaled: bool) -> Callable[[Inputs], Reference]:
    """Mean of the task vectors over the models whose entry is beyond epsilon; RAM+ scales what one changed alone."""

    def method(x: Inputs) -> Reference:
        assert x.base is not None
        deltas = torch.stack(x.deltas())
        epsilon = float(x.shared.get("epsilon", 1e-5))
        mask = deltas.abs() > epsilon
        count = mask.sum(dim=0)
        factor = torch.ones(len(deltas), dtype=torch.float64)
        if scaled:
            shared = (mask & (count > 1)).reshape(len(deltas), -1).sum(dim=1)
            alone = (mask & (count == 1)).reshape(len(deltas), -1).sum(dim=1)
            overlap = (shared / alone.clamp(min=epsilon)).clamp(max=float(x.shared.get("alpha", 0.2)))
            factor = 1 + float(x.shared.get("r", 0.1)) * overlap
        column = factor.reshape(-1, *[1] * x.base.dim())
        kept = deltas * mask * torch.where(count == 1, column, 1.0)
        return decided(x.base + kept.sum(dim=0) / count.clamp(min=1))

    return method


def passthrough(x: Inputs) -> Reference:
    """The one input, times scale."""
    return decided(x.all[0] * float(x.all_settings[0].get("scale", 1.0)))


METHODS: dict[str, Callable[[Inputs], Reference]] = {
    "linear": linear,
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "task_arithmetic": task_arithmetic_family(None, consensus=False, normalize=False, rescale=False),
    "ties": task_arithmetic_family(largest, consensus=True, normalize=True, rescale=False),
    "dare_linear": task_arithmetic_family(all_or_none, consensus=False, normalize=False, rescale=True),
    "dare_ties": task_arithmetic_family(all_or_none, consensus=True, normalize=False, rescale=True),
    "della": task_arithmetic_family(all_or_none, consensus=True, normalize=True, rescale=True),
    "della_linear": task_arithmetic_family(all_or_none, consensus=False, normalize=False, rescale=True),
    "breadcrumbs": task_arithmetic_family(without_outliers, consensus=False, normalize=False, rescale=False),
    "breadcrumbs_ties": task_arithmetic_family(without_outliers, consensus=True, normalize=False, rescale=False),
    "model_stock": model_stock,
    "sce": sce,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "ram": ram(scaled=False),
    "ramplus_tl": ram(scaled=True),
    "passthrough": passthrough,
}


def merged(method: str, output: OutputTensor, loaded: Mapping[str, Mapping[str, Tensor]]) -> Reference:
    """The reference value of one output tensor, from models loaded as they lie on disk."""
    entries = [
        (loaded[model][name].double(), settings, model == output.base)
        for (model, name), settings in zip(output.inputs, output.per_input, strict=True)
    ]
    inputs = Inputs(
        all=[tensor for tensor, _, _ in entries],
        base=next((tensor for tensor, _, is_base in entries if is_base), None),
        others=[tensor for tensor, _, is_base in entries if not is_base],
        all_settings=[settings for _, settings, _ in entries],
        settings=[settings for _, settings, is_base in entries if not is_base],
        shared=output.shared,
    )
    return METHODS[method](inputs)
