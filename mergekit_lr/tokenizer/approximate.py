"""Rows for tokens that a model does not know, from where they lie among the tokens that a donor shares with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 128  # tokens at a time: part of what decides the bits
SMALL = 1e-6


def combination(
    targets: Tensor, shared: Tensor, *, method: str, k: int, cosine: bool, scheme: str
) -> tuple[Tensor, Tensor]:
    """For each target (``[b, d]``), rows of ``shared`` (``[n, d]``, the donor's) and their coefficients (``[b, k]``).

    ``omp``: `orthogonal_matching_pursuit`. ``common_interpolation``: the k nearest in Euclidean distance (or cosine),
    weighted by ``scheme``: ``distance_proportional`` (w = 1 / distance, or the cosine itself, over their sum),
    ``barycentric`` (least squares with weights that sum to 1) or ``least_squares``.
    """
    if method == "omp":
        from mergekit_lr.linalg.pursuit import orthogonal_matching_pursuit  # imports torch, which a recipe must not

        return orthogonal_matching_pursuit(targets, shared, k)
    x, points = targets.double(), shared.double()
    if cosine:
        lengths = (x.norm(dim=1)[:, None] * points.norm(dim=1)).clamp(min=SMALL)
        distance = 1 - x @ points.T / lengths
    else:
        distance = torch.cdist(x, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, indices = torch.topk(distance, k, dim=1, largest=False, sorted=True)
    if scheme == "distance_proportional":
        weights = 1 - nearest if cosine else 1 / nearest.clamp(min=SMALL)
        return indices, weights / weights.sum(dim=1, keepdim=True).clamp(min=SMALL)
    return indices, _fitted(x, points[indices], affine=scheme == "barycentric")


def _fitted(x: Tensor, points: Tensor, *, affine: bool) -> Tensor:
    """Least-squares weights of ``points`` (``[b, k, d]``) for ``x`` (``[b, d]``), of least norm; fp64.

    ``affine``: under the condition that they sum to 1, by the system ``[[P P^T, 1], [1^T, 0]] [w, mu] = [P x, 1]``.
    """
    if not affine:
        found: Tensor = torch.linalg.lstsq(points.transpose(1, 2), x[:, :, None], driver=_driver(x)).solution
        return found[:, :, 0]
    count, k = points.shape[:2]
    system = x.new_ones((count, k + 1, k + 1))
    system[:, :k, :k] = points @ points.transpose(1, 2)
    system[:, k, k] = 0
    right = torch.cat([(points @ x[:, :, None])[:, :, 0], x.new_ones((count, 1))], dim=1)
    solved: Tensor = torch.linalg.lstsq(system, right[:, :, None], driver=_driver(x)).solution
    return solved[:, :k, 0]


def _driver(x: Tensor) -> str:
    return "gels" if x.is_cuda else "gelsd"


def combined(indices: Tensor, coefficients: Tensor, rows: Tensor) -> Tensor:
    """``sum_j c_j rows[i_j]`` for each line of both, in fp64; ``[b, d]`` fp32."""
    out = torch.empty((indices.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    step = max(1, BATCH // 8)
    for start in range(0, indices.shape[0], step):
        part = slice(start, start + step)
        picked = rows[indices[part]].double()
        out[part] = torch.bmm(coefficients[part, None].double(), picked)[:, 0].float()
    return out


def misfit(targets: Tensor, indices: Tensor, coefficients: Tensor, shared: Tensor) -> Tensor:
    """How far each combination is from its target in the donor's space, over the target's norm."""
    x = targets.double()
    left: Tensor = (combined(indices, coefficients, shared).double() - x).norm(dim=1)
    return torch.div(left, x.norm(dim=1).clamp(min=SMALL))


def drawn(count: int, rows: Tensor, seed: int) -> Tensor:
    """``count`` rows from the normal distribution with mean and standard deviation of each column of ``rows``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((count, rows.shape[1]), generator=generator, dtype=torch.float64)
    wide = rows.double()
    return (wide.mean(dim=0) + values.to(rows.device) * wide.std(dim=0, unbiased=False)).float()
