"""Orthogonal matching pursuit: each of many vectors as a combination of few atoms of one dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ENOUGH = 1e-6
"""Share of a target's norm below which what is left of it is rounding, and no further atom is taken."""


def orthogonal_matching_pursuit(targets: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Up to ``k`` of the ``atoms`` (``[n, d]``) for each of the ``targets`` (``[b, d]``), and their coefficients.

    Per target x, with residual r = x at first: take the atom a_j, not taken yet, with the largest ``|<r, a_j>|``
    (atoms are not normalised), project x on the span of those taken, let r be what is left, and again, k times. The
    coefficients are the least-squares solution on the atoms taken. Inner products with all atoms are in the dtype of
    ``atoms``; the orthonormal basis (Gram-Schmidt, done twice), residuals and coefficients are in float64.

    Returns indices ``[b, k]`` (int64) in the order in which atoms were taken and coefficients ``[b, k]`` (float64); a
    target that is met earlier to rounding has coefficients 0 from there on.

    Raises:
        ValueError: there are fewer than ``k`` atoms.

    Source: Pati, Rezaiifar and Krishnaprasad, Orthogonal matching pursuit, 1993; Tropp and Gilbert, 2007.
    """
    (count, width), n = targets.shape, atoms.shape[0]
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} atoms cannot be taken")
    x = targets.double()
    q = x.new_zeros((count, k, width))  # rows are the orthonormal basis
    r = torch.eye(k, dtype=x.dtype, device=x.device).repeat(count, 1, 1)  # where none is taken, coefficient 0
    along = x.new_zeros((count, k))
    indices = torch.zeros((count, k), dtype=torch.int64, device=x.device)
    taken = torch.zeros((count, n), dtype=torch.bool, device=x.device)
    every = torch.arange(count, device=x.device)
    residual, norms = x.clone(), x.norm(dim=1)
    for t in range(k):
        open_ = residual.norm(dim=1) > ENOUGH * norms
        scores = (residual.to(atoms.dtype) @ atoms.T).abs_().masked_fill_(taken, -1.0)
        chosen = scores.argmax(dim=1)
        indices[:, t] = chosen
        taken[every, chosen] = True
        atom = atoms[chosen].double()
        left, shares = _orthogonal_part(atom, q[:, :t])
        length = left.norm(dim=1)
        usable = open_ & (length > 1e-10 * atom.norm(dim=1))
        safe = torch.where(usable, length, 1.0)
        q[:, t] = torch.where(usable[:, None], left / safe[:, None], 0.0)
        r[:, :t, t] = torch.where(usable[:, None], shares, 0.0)
        r[:, t, t] = safe
        along[:, t] = (q[:, t] * residual).sum(dim=1)
        residual = residual - along[:, t, None] * q[:, t]
    coefficients = torch.linalg.solve_triangular(r, along[:, :, None], upper=True)[:, :, 0]
    return indices, coefficients


def _orthogonal_part(atom: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of ``atom`` (``[b, d]``) is orthogonal to ``basis`` (``[b, t, d]``), and its shares (``[b, t]``)."""
    total = atom.new_zeros(basis.shape[:2])
    left = atom
    for _ in range(2):  # once loses orthogonality where atoms are nearly dependent; twice is enough
        shares = torch.bmm(basis, left[:, :, None])[:, :, 0]
        left = left - torch.bmm(shares[:, None], basis)[:, 0]
        total = total + shares
    return left, total
