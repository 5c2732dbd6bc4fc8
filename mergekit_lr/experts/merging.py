"""From the experts of a group to one expert: averages, with neurons aligned or not, and projections of averages.

Merging works on matrices in fp32 (fp64 where the inputs are); `Expert` says what the matrices are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergekit_lr.experts.storage import MATRICES, Expert, weighted_mean
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.linalg import RankPolicy


def shares(weights: Sequence[float]) -> list[float]:
    """Weights that add up to 1; equal ones if all are 0 (experts that no token was sent to)."""
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else [1 / len(weights)] * len(weights)


def rank_of(rank: str | int | float, rows: int, columns: int) -> int | None:
    """The rank that ``full``, a number or a share of ``min(rows, columns)`` asks for; None for full rank."""
    full = min(rows, columns)
    if rank == "full":
        return None
    wanted = rank if isinstance(rank, int) else round(float(rank) * full)
    return None if wanted >= full else max(1, wanted)


def union_merge(
    experts: Sequence[Expert],
    weights: Sequence[float],
    rank: RankPolicy | int | float | str,
    grams: Sequence[dict[str, Tensor]] | None = None,
    name: str = "",
) -> Expert:
    """Sub-MoE's union decomposition of each matrix: ``U_r U_r^T sum_i f_i W_i``, ``sum f_i = 1``.

    U_r: the r leading left singular vectors of ``[W_1 ... W_n]`` (arXiv 2506.23266, eq. 5-8). At full rank it is the
    weighted mean, ``U S sum f_i V_i^T = sum f_i W_i``, and no decomposition is made. With ``grams`` (for each expert,
    by matrix, the Gram of its inputs ``X_i^T X_i`` ``[in, in]``) U_r is that of the whitened union ``[W_1 S_1 ... W_n
    S_n]``, ``S_i S_i^T`` the Gram (eq. 11-12): the ``S_i^-1`` cancel, so only the subspace changes. Biases are
    averaged.

    ``rank``: ``full``, a whole number, or a share of ``min(out, sum of in)``.
    """
    from mergekit_lr.linalg import joint_left_subspace, joint_whitened_subspace, project_combine

    f = shares(weights)
    mean = weighted_mean(experts, f)
    found: dict[str, Tensor] = {}
    for m in MATRICES:
        matrices = [getattr(e, m).contiguous() for e in experts]
        out, inputs = matrices[0].shape
        r = rank_of(rank, out, inputs * len(matrices)) if isinstance(rank, str | int | float) else rank
        if r is None or len(experts) == 1:
            found[m] = getattr(mean, m)
            continue
        where = f"{name} {m}".strip()
        if grams is None:
            joint = joint_left_subspace(matrices, r, name=where)
        else:
            seen = [i for i, g in enumerate(grams) if bool(g[m].any())]  # an expert without tokens says nothing
            if not seen:
                joint = joint_left_subspace(matrices, r, name=where)
            else:
                joint = joint_whitened_subspace([matrices[i] for i in seen], [grams[i][m] for i in seen], r, name=where)
                joint = replace(joint, widths=tuple(w.shape[1] for w in matrices))
        found[m] = project_combine(joint, matrices, f)
    return Expert(**found, gate_bias=mean.gate_bias, up_bias=mean.up_bias, down_bias=mean.down_bias)


def aligned(reference: Expert, other: Expert, activations: tuple[Tensor, Tensor] | None = None) -> Expert:
    """``other`` with its neurons in the order in which they best match those of ``reference``.

    One assignment over all neurons (`mergekit_lr.matching.neurons`), by weights, and by activations too where they
    are given (hidden activations ``[tokens, I]`` of both on the same tokens).
    """
    from mergekit_lr.matching.neurons import match_neurons

    return other.neurons(match_neurons(_block(reference), _block(other), activations))


def _block(expert: Expert) -> GatedMLP:
    from mergekit_lr.matching.neurons import GatedMLP

    return GatedMLP(expert.up, expert.down, expert.gate, expert.up_bias, expert.gate_bias)


def aligned_mean(experts: Sequence[Expert], weights: Sequence[float], centre: int) -> Expert:
    """The weighted mean after every expert's neurons were aligned, by weights, with those of ``experts[centre]``."""
    reference = experts[centre]
    moved = [e if i == centre else aligned(reference, e) for i, e in enumerate(experts)]
    return weighted_mean(moved, shares(weights))


def least_squares_down(hidden_gram: Tensor, cross: Tensor, ridge: float, towards: Tensor | None = None) -> Tensor:
    """``D`` ``[H, I]`` that minimises ``sum_t |D p_t - T_t|^2 + lam |D - towards|^2``.

    ``hidden_gram``: ``sum p p^T`` ``[I, I]``; ``cross``: ``sum T p^T`` ``[H, I]``; ``lam`` is ``ridge`` times the mean
    of the Gram's diagonal. Solved in fp64 from the normal equations; with ``ridge`` 0 by the pseudoinverse.
    """
    from mergekit_lr.linalg import gram_root

    a, b = hidden_gram.double(), cross.double()
    if ridge <= 0:
        _, inverse = gram_root(a, where="least squares of down_proj")
        return b @ inverse.T @ inverse
    lam = ridge * float(a.diagonal().mean())
    a = a + lam * torch.eye(len(a), dtype=torch.float64)
    if towards is not None:
        b = b + lam * towards.double()
    solved: Tensor = torch.linalg.solve(a, b.T)
    return solved.T


if TYPE_CHECKING:
    from mergekit_lr.matching.neurons import GatedMLP
