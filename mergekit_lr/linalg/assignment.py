"""Cross-Grams and linear assignments: which rows of one matrix are which rows of another.

Every decision here is made in fp64 and does not depend on how many threads there are: a cross-Gram is cut into fixed
strips of rows, each of which is one product on one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lr.errors import LinalgError

ROWS = 1024
"""Rows of one strip of a cross-Gram."""
COLUMNS = 2048
"""Columns that are widened to fp64 at a time."""
TIE = 1e-9
"""Gains below this fraction of the sum of |gains| at stake are rounding: the old assignment is kept."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operations on one thread each: the order of their sums is then fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cross_gram(pairs: Iterable[tuple[Tensor, Tensor]], *, threads: int = 1, out: Tensor | None = None) -> Tensor:
    """``C = sum_k X_k Y_k^T`` in fp64, ``[n, m]``, from pairs ``X_k [n, d_k]``, ``Y_k [m, d_k]`` of any float dtype.

    ``2 n m d`` flops. ``out``: a table that the products are added to, and that is returned. At most `COLUMNS` columns
    are held in fp64, besides C. The result is the same to the bit for any ``threads``.

    Raises:
        LinalgError: there is no pair, shapes do not fit, or C is not finite.
    """
    with one_thread():
        for x, y in pairs:
            if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
                raise LinalgError(f"no cross-Gram of shapes {tuple(x.shape)} and {tuple(y.shape)}")
            if out is None:
                out = torch.zeros(x.shape[0], y.shape[0], dtype=torch.float64, device=x.device)
            _accumulate(out, x, y, threads)
    if out is None:
        raise LinalgError("no cross-Gram of nothing")
    if not bool(torch.isfinite(out).all()):
        raise LinalgError("a cross-Gram is not finite", why="an input holds NaN, infinity or numbers near the limit")
    return out


def _accumulate(out: Tensor, x: Tensor, y: Tensor, threads: int) -> None:
    strips = [(i, min(i + ROWS, out.shape[0])) for i in range(0, out.shape[0], ROWS)]
    for start in range(0, x.shape[1], COLUMNS):
        left = x[:, start : start + COLUMNS].double()
        right = y[:, start : start + COLUMNS].double().T
        if threads > 1 and len(strips) > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda s: out[s[0] : s[1]].addmm_(left[s[0] : s[1]], right), strips))  # noqa: B023
        else:
            for i, j in strips:
                out[i:j].addmm_(left[i:j], right)


def assign(gain: Tensor, keep: Tensor | None = None) -> Tensor:
    """The permutation p that maximises ``sum_i gain[i, p[i]]``, int64 ``[n]``.

    Exact (scipy's shortest augmenting paths, O(n^3)). The result differs from ``keep`` (the identity by default) in
    cycles; a cycle that gains no more than rounding is undone, so ties, dead and duplicate rows stay where they are.

    Raises:
        LinalgError: ``gain`` is not a square matrix of finite numbers.
    """
    from scipy.optimize import linear_sum_assignment

    if gain.ndim != 2 or gain.shape[0] != gain.shape[1]:
        raise LinalgError(f"no assignment for gains of shape {tuple(gain.shape)}", fix="give a square matrix")
    table = gain.detach().cpu().double().numpy()
    if not np.isfinite(table).all():
        raise LinalgError("no assignment for gains that are not finite")
    n = len(table)
    old = np.arange(n) if keep is None else keep.detach().cpu().numpy().astype(np.int64)
    new = linear_sum_assignment(table, maximize=True)[1].astype(np.int64) if n else old
    return torch.from_numpy(_without_ties(table, old, new)).to(gain.device)


def _without_ties(table: NDArray[np.float64], old: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.int64]:
    """``new``, with every cycle of ``new`` against ``old`` that does not pay set back to ``old``."""
    rows = np.arange(len(old))
    better = table[rows, new] - table[rows, old]
    at_stake = np.abs(table[rows, new]) + np.abs(table[rows, old])
    follows = np.empty_like(old)
    follows[old] = rows  # the row that holds a column under the old assignment
    result, seen = new.copy(), new == old
    for first in rows:
        cycle, row = [], int(first)
        while not seen[row]:
            seen[row] = True
            cycle.append(row)
            row = int(follows[new[row]])
        if cycle and better[cycle].sum() <= TIE * at_stake[cycle].sum():
            result[cycle] = old[cycle]
    return result
