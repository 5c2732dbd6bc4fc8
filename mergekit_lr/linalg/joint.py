"""The joint left subspace of several matrices, and what merging does with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg.blocks import Blocks, Side
from mergekit_lr.linalg.certificate import PROMISE, Certificate
from mergekit_lr.linalg.checks import FLOATING, check_blocks, check_same_shape
from mergekit_lr.linalg.kernels import project_combine_kernel
from mergekit_lr.linalg.krylov import krylov, krylov_pays
from mergekit_lr.linalg.rank import RankPolicy
from mergekit_lr.linalg.subspace import Request, Subspace, make_request, solve_many

COLUMNS = 1024
"""Columns of the weighted sum formed at a time: it is never stored whole."""


@dataclass(frozen=True)
class JointSubspace:
    """The r dominant left singular directions U_r of ``M = [W_1 ... W_k]``, in the cheaper of two forms.

    LEFT (``d_out <= sum d_i``): ``basis = U_r [d_out, r]``. RIGHT: ``basis = V_r [sum d_i, r]``, the right
    singular vectors; ``U_r U_r^T M = M V_r V_r^T``, so U_r is neither formed nor divided by sigma. ``full``: r is
    the rank of any such M; then the projector does nothing and ``basis`` is None, because no decomposition was
    made.
    """

    side: Side
    rank: int
    basis: Tensor | None
    widths: tuple[int, ...]
    certificate: Certificate | None

    @property
    def full(self) -> bool:
        """Whether ``U_r U_r^T M = M`` for every M of this shape: callers should say so rather than decompose."""
        return self.basis is None


def joint_left_subspace(
    matrices: Sequence[Tensor],
    rank: int | RankPolicy,
    *,
    base: Tensor | None = None,
    exact: bool = False,
    tolerance: float = PROMISE,
    seed: int = 0,
    name: str = "",
) -> JointSubspace:
    """`JointSubspace` of k matrices ``[d_out, d_i]``, never concatenated.

    Promise: ``||M - U U^T M||_F <= (1 + tolerance) tau_r``, certified (see `truncated_svd` for arguments,
    escalation and errors). Cost: ``min(d_out, sum d_i)^2 max(d_out, sum d_i)`` flops for half a Gram and ``9 n^3``
    for its eigenproblem, or a few passes where r is small (block Krylov).
    """
    return joint_left_subspaces(
        [matrices], rank, bases=[base], exact=exact, tolerance=tolerance, seed=seed, names=[name]
    )[0]


def joint_left_subspaces(
    groups: Sequence[Sequence[Tensor]],
    rank: int | RankPolicy,
    *,
    bases: Sequence[Tensor | None] | None = None,
    exact: bool = False,
    tolerance: float = PROMISE,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[JointSubspace]:
    """`joint_left_subspace` of many groups; on CUDA, eigenproblems of equal order go in one batched call.

    Each group's result is the same as alone: nothing depends on what it is batched with, and test matrices are keyed
    by the group's name.
    """
    bases = bases or [None] * len(groups)
    names = names or [""] * len(groups)
    if not len(groups) == len(bases) == len(names):
        raise LinalgError(f"{len(groups)} groups, {len(bases)} bases, {len(names)} names", where="joint_left_subspaces")
    answers: dict[int, JointSubspace] = {}
    pending: list[tuple[int, Request]] = []
    for i, (matrices, base, name) in enumerate(zip(groups, bases, names, strict=True)):
        blocks = Blocks(matrices, base, where=name or "joint_left_subspace")
        request = make_request(blocks, rank, tolerance=tolerance, exact=exact, seed=seed, name=name)
        quick = _without_gram(request)
        if quick is None:
            pending.append((i, request))
        else:
            answers[i] = quick
    for (i, request), found in zip(pending, solve_many([r for _, r in pending]), strict=True):
        answers[i] = _as_joint(request, found)
    return [answers[i] for i in range(len(groups))]


def _without_gram(request: Request) -> JointSubspace | None:
    if request.rank.needs_spectrum:
        return None
    r = request.choose_rank(None)
    if r == request.order:
        return JointSubspace(request.side, r, None, tuple(request.blocks.widths), None)
    iterated = krylov(request, r) if krylov_pays(request, r) else None
    return None if iterated is None else _as_joint(request, iterated.subspace)


def _as_joint(request: Request, found: Subspace) -> JointSubspace:
    widths = tuple(request.blocks.widths)
    if found.rank == request.order:
        return JointSubspace(found.side, found.rank, None, widths, found.certificate)
    return JointSubspace(found.side, found.rank, found.basis.to(request.dtype), widths, found.certificate)


def project_combine(
    subspace: JointSubspace | Tensor,
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``scale U_r U_r^T sum_i f_i W_i``, ``[d_out, d_in]``; with ``base``: ``base + scale U_r U_r^T sum_i f_i (W_i
    - base)``.

    LEFT: ``U (U^T sum f_i W_i)``, the weighted sum formed `COLUMNS` columns at a time. RIGHT: ``(sum_i W_i V_i)
    C`` with V_i the rows of V_r that belong to W_i and ``C = sum_i f_i V_i^T``, ``[r, d_in]``. ``full``: ``sum f_i
    W_i`` exactly, no product. One rounding to the output dtype at the end; everything before is fp32 (fp64 if the
    basis or an input is).

    Args:
        subspace: from `joint_left_subspace` on the same matrices, or any orthonormal ``U [d_out, r]``.
        matrices: k tensors ``[d_out, d_in]``.
        weights: k coefficients f_i, used as given.
        base: what task vectors are relative to.
        scale: factor on the projected sum.
        out_dtype: by default that of the first matrix.

    Raises:
        LinalgError: shapes, devices or counts that do not fit.
    """
    where = "project_combine"
    check_blocks(matrices, base, where)
    check_same_shape(matrices, weights, where)
    joint = _as_left(subspace, matrices) if isinstance(subspace, Tensor) else subspace
    out_dtype = out_dtype or matrices[0].dtype
    if out_dtype not in FLOATING:
        raise LinalgError(f"cannot round to {out_dtype}", where=where)
    _check_fit(joint, matrices)
    inputs = [*matrices, *([] if joint.basis is None else [joint.basis]), *([] if base is None else [base])]
    dtype = torch.float64 if any(m.dtype == torch.float64 for m in inputs) else torch.float32
    fused = project_combine_kernel(joint.side, joint.basis, matrices, weights, base, scale, out_dtype, dtype)
    if fused is not None:
        return fused
    out = torch.empty(matrices[0].shape, dtype=out_dtype, device=matrices[0].device)
    left, right = _right_factors(joint, matrices, weights, base, dtype) if joint.side is Side.RIGHT else (None, None)
    for start in range(0, out.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        if left is not None and right is not None:
            part = left @ right[:, columns]
        else:
            part = _weighted(matrices, weights, base, columns, dtype)
            if joint.basis is not None:
                u = joint.basis.to(dtype)
                part = u @ (u.T @ part)
        part = part * scale
        if base is not None:
            part = part + base[:, columns].to(dtype)
        out[:, columns] = part.to(out_dtype)
    return out


def weighted_sum(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``sum_i f_i W_i`` (or ``base + sum_i f_i (W_i - base)``) in one pass, one rounding: the full-rank case alone."""
    check_blocks(matrices, base, "weighted_sum")
    widths = tuple(m.shape[1] for m in matrices)
    everything = JointSubspace(Side.LEFT, matrices[0].shape[0], None, widths, None)
    return project_combine(everything, matrices, weights, base=base, out_dtype=out_dtype)


def _as_left(u: Tensor, matrices: Sequence[Tensor]) -> JointSubspace:
    if u.ndim != 2 or u.dtype not in FLOATING:
        raise LinalgError(f"a basis must be a real matrix, got {tuple(u.shape)} {u.dtype}", where="project_combine")
    return JointSubspace(Side.LEFT, u.shape[1], u, tuple(m.shape[1] for m in matrices), None)


def _check_fit(joint: JointSubspace, matrices: Sequence[Tensor]) -> None:
    rows, widths = matrices[0].shape[0], tuple(m.shape[1] for m in matrices)
    if joint.side is Side.RIGHT and joint.widths != widths:
        raise LinalgError(
            f"the subspace belongs to matrices of widths {joint.widths}, got {widths}", where="project_combine"
        )
    if joint.basis is None:
        return
    expected = rows if joint.side is Side.LEFT else sum(widths)
    if joint.basis.shape[0] != expected or joint.basis.device != matrices[0].device:
        raise LinalgError(
            f"the basis is {tuple(joint.basis.shape)} on {joint.basis.device}",
            where="project_combine",
            why=f"the matrices need {expected} rows on {matrices[0].device}",
        )


def _weighted(
    matrices: Sequence[Tensor], weights: Sequence[float], base: Tensor | None, columns: slice, dtype: torch.dtype
) -> Tensor:
    reference = None if base is None else base[:, columns].to(dtype)
    total: Tensor | None = None
    for matrix, weight in zip(matrices, weights, strict=True):
        part = matrix[:, columns].to(dtype)
        if reference is not None:
            part = part - reference
        total = part * weight if total is None else total.add_(part, alpha=weight)
    assert total is not None  # the list was checked
    return total


def _right_factors(
    joint: JointSubspace, matrices: Sequence[Tensor], weights: Sequence[float], base: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    if joint.basis is None:
        return None, None
    v = joint.basis.to(dtype)
    coefficients = torch.zeros(v.shape[1], matrices[0].shape[1], dtype=dtype, device=v.device)
    for part, weight in zip(torch.split(v, list(joint.widths)), weights, strict=True):
        coefficients.add_(part.T, alpha=weight)
    blocks = Blocks(matrices, base, where="project_combine")
    return blocks.times(v) / blocks.scale, coefficients
