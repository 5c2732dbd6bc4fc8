"""Reversible Model Merging's problem, in closed form (Alipour and Amiri, arXiv:2510.14163).

At one *position* (a row of B, a column of A) the n tasks have vectors ``x_i`` of length r. They are replaced by a
mean, p basis vectors and p x n coefficients:

    min over mu, V, C of  sum_i ||x_i - mu - V c_i||^2,      x_i ~ mu + V c_i.

With ``mu = mean_i x_i`` and ``Y = [x_i - mu]`` the optimum (Eckart and Young) is ``V`` = the p leading left singular
vectors of Y, ``C = V^T Y``; the error is ``sum_{k>p} sigma_k^2``, zero from ``p = min(r, n - 1)`` on. Per position
``p (r + n) + r`` numbers are stored instead of ``r n``.

``group`` positions may share their coefficients: the vectors are then of length ``group * r`` and the share of numbers
stored is ``(p (group r + n) + group r) / (group r n)``, which tends to ``(p + 1) / n``. ``group = 1`` is the paper;
all positions in one group ("tensor") is cheapest where tasks share structure.

Arrays are ``[tasks, positions, r]``; fits are fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.errors import NonFiniteError
from mergekit_lr.linalg import symmetric_eigh

CHUNK = 1 << 21
"""Numbers of the centred array held in fp64 at a time, where the granularity lets it be cut."""

ABSENT = 1e-7
"""Directions with sigma_k up to this share of sigma_1 (the root of fp64's rounding of the Gram) count as absent."""


@dataclass(frozen=True)
class Packed:
    """``mean`` ``[positions, r]``, ``basis`` ``[p, positions, r]`` (orthonormal within each group of positions, or zero
    where there is nothing left to span), ``coef`` ``[p, tasks, groups]``; ``group`` positions share coefficients."""

    mean: Tensor
    basis: Tensor
    coef: Tensor
    group: int

    @property
    def numbers(self) -> int:
        """How many numbers are stored."""
        return self.mean.numel() + self.basis.numel() + self.coef.numel()


def count(positions: int, r: int, tasks: int, p: int, group: int) -> int:
    """Numbers that `pack` stores: a mean, p basis vectors, p coefficients for each task and group."""
    groups = -(-positions // group)
    return positions * r * (1 + p) + p * tasks * groups


def most(r: int, tasks: int, group: int) -> int:
    """The p from which on packing is exact: ``min(group r, tasks - 1)``."""
    return min(group * r, tasks - 1)


def pack(x: Tensor, p: int, group: int = 1) -> Packed:
    """The optimal mean, basis and coefficients of ``x`` ``[tasks, positions, r]``; everything fp64.

    p above ``most(...)`` is allowed and stores zeros. Signs are fixed by each coefficient vector's entry of largest
    modulus; a basis is unique only up to rotations among equal singular values: compare reconstructions, never bases.

    Raises:
        NonFiniteError: NaN or infinity in x.
    """
    tasks, positions, r = x.shape
    groups = -(-positions // group)
    mean = torch.empty(positions, r, dtype=torch.float64, device=x.device)
    basis = torch.zeros(p, positions, r, dtype=torch.float64, device=x.device)
    coef = torch.zeros(p, tasks, groups, dtype=torch.float64, device=x.device)
    for start, stop, centre, y in _centred(x, group):
        mean[start:stop] = centre
        k = min(p, y.shape[2], tasks)
        if k == 0:
            continue
        v, c = _leading(y, k)
        first = start // group
        spread = v.transpose(0, 1).reshape(k, -1, r)[:, : stop - start]
        basis[:k, start:stop] = spread
        coef[:k, :, first : first + y.shape[0]] = c.permute(1, 2, 0)
    return Packed(mean, basis, coef, group)


def unpack(packed: Packed, task: int) -> Tensor:
    """``mu + V c_task``, ``[positions, r]``, in the arrays' own dtype (widen them first)."""
    out = packed.mean.clone()
    positions = out.shape[0]
    for basis, coef in zip(packed.basis, packed.coef, strict=True):
        weights = coef[task].repeat_interleave(packed.group)[:positions]
        out += basis * weights.unsqueeze(1)
    return out


def spectrum(x: Tensor, group: int = 1) -> tuple[Tensor, float]:
    """``e_k = sum over groups of sigma_k^2``, fp64 ``[most(...)]``, and the energy ``sum_i ||x_i||^2``.

    Packing with p directions leaves ``sum_{k>p} e_k`` of that energy.
    """
    tasks, positions, r = x.shape
    out = torch.zeros(most(r, tasks, min(group, positions)), dtype=torch.float64, device=x.device)
    for _, _, _, y in _centred(x, group):
        values, _ = symmetric_eigh(_gram(y), where="spectrum")
        found = values.clamp(min=0.0).sum(0)[: out.numel()]
        out[: found.numel()] += found
    return out.cpu(), float(x.double().square().sum())


def _centred(x: Tensor, group: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """``(start, stop, mean [stop - start, r], centred [groups, tasks, group r])`` over runs of whole groups."""
    tasks, positions, r = x.shape
    step = max(1, CHUNK // (tasks * r * group)) * group
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        part = x[:, start:stop].double()
        if not bool(torch.isfinite(part).all()):
            raise NonFiniteError("a factor holds NaN or infinity", where="reversible")
        mean = part.mean(0)
        y = part - mean
        short = -(stop - start) % group  # zeros complete the last group and add nothing to any Gram
        if short:
            y = torch.cat([y, y.new_zeros(tasks, short, r)], 1)
        yield start, stop, mean, y.reshape(tasks, -1, group * r).transpose(0, 1)


def _gram(y: Tensor) -> Tensor:
    """The smaller of ``Y^T Y`` ``[tasks, tasks]`` and ``Y Y^T`` ``[length, length]``, for each group."""
    tasks, length = y.shape[1:]
    return y @ y.transpose(1, 2) if tasks <= length else y.transpose(1, 2) @ y


def _leading(y: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Directions ``[groups, p, length]`` and coefficients ``[groups, p, tasks]`` of each group.

    From the tasks' side ``v_k = z_k^T Y / sigma_k`` and ``c_k = sigma_k z_k``; sigma cancels in the reconstruction, and
    where it is absent both are zero instead of a division by nothing.
    """
    tasks, length = y.shape[1:]
    values, vectors = symmetric_eigh(_gram(y), where="pack")
    z = vectors[..., :p].transpose(1, 2)
    sigma = values[:, :p].clamp(min=0.0).sqrt()
    present = sigma > ABSENT * sigma[:, :1]
    if tasks <= length:
        safe = torch.where(present, sigma, 1.0)
        v = (z @ y) / safe.unsqueeze(2)
        c = z * sigma.unsqueeze(2)
    else:
        v = z.clone()
        c = z @ y.transpose(1, 2)
    pivot = c.abs().argmax(dim=2, keepdim=True)
    keep = torch.where(c.gather(2, pivot) < 0, -1.0, 1.0) * present.unsqueeze(2)
    return v * keep, c * keep
