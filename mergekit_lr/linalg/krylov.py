"""Block Krylov iteration with Rayleigh-Ritz, stopped by its certificate.

For ranks far below the order of a large matrix: each step costs two products with b = r + 8 columns where a Gram
costs n. Musco and Musco 2015 (arXiv 1504.05477): keeping every block reaches (1 + eps) tau_r in O(log n / sqrt(eps))
steps without any gap. Here no step count is trusted: the coupled Ritz bound decides (see `certificate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.linalg.blocks import Blocks, Side
from mergekit_lr.linalg.certificate import Certificate, certify, coupled_ritz_sum
from mergekit_lr.linalg.eigh import fix_signs
from mergekit_lr.linalg.gram import outer_product
from mergekit_lr.linalg.orthonormal import orthonormalize
from mergekit_lr.linalg.random_signs import rademacher
from mergekit_lr.linalg.subspace import Request, Subspace

OVERSAMPLING = 8
FIRST_CHECK = 3  # blocks before the first certificate: q = 2 power steps
MOST_BLOCKS = 16
LARGEST_SHARE = 3  # the whole space stays below a third of the order: beyond, the Gram is cheaper
LANCZOS_WIDTH = 8
LANCZOS_STEPS = 6
LANCZOS_SAFETY = 1.05
RITZ_ROUNDING = 2e-6
"""Relative error allowed to Ritz sums for fp32 products; fp64 products get its square."""


@dataclass(frozen=True)
class KrylovTruncation:
    """A certified Krylov answer with what it already computed.

    ``projected`` is the projection on the basis: ``basis^T M`` if the side is LEFT, ``(M basis)^T`` if RIGHT,
    ``[r, d]``, in the units of the blocks (their scale included); its rows are orthogonal because Ritz vectors
    diagonalise it.
    """

    subspace: Subspace
    projected: Tensor


def krylov_pays(request: Request, rank: int) -> bool:
    """The decision table: iterate when r is at most n/16 on the CPU, n/8 on CUDA, and n >= 2048."""
    if request.exact or request.order < 2048:
        return False
    share = 8 if request.blocks.device.type == "cuda" else 16
    return rank * share <= request.order


def krylov(request: Request, rank: int) -> KrylovTruncation | None:
    """Rank-``rank`` truncation by block Krylov, or None where it would cost more than the Gram.

    Products run in the blocks' dtype (fp32, or fp64), everything of order l = blocks x b in fp64. Memory: 3 l (n + d)
    numbers beyond the matrix.
    """
    blocks, side, n = request.blocks, request.side, request.order
    width = rank + OVERSAMPLING
    far = blocks.columns if side is Side.LEFT else blocks.rows
    start = rademacher(far, width, seed=request.seed, name=request.name, device=blocks.device, dtype=blocks.dtype)
    space = _Space.empty(request, n, far)
    block = blocks.towards(side, start)
    most = min(MOST_BLOCKS, n // (LARGEST_SHARE * width))
    check, history = FIRST_CHECK, list[tuple[int, float]]()
    for step in range(1, most + 1):
        fresh = orthonormalize(block, space.q if step > 1 else None, where=request.name)
        out = blocks.away(side, fresh)
        block = blocks.towards(side, out)
        space.append(fresh, out, block)
        if step == check:
            found = _ritz(request, rank, space, step)
            if found.subspace.certificate.holds:
                return found
            history.append((step, found.subspace.certificate.excess))
            check = _next_check(history, request.promise)
        if check > most:
            return None
    return None


@dataclass
class _Space:
    """The Krylov basis q ``[n, l]`` with ``away = M^T q`` and ``back = M away`` (for the side LEFT), in fp64."""

    q: Tensor
    away: Tensor
    back: Tensor
    norm_squared: float
    mu: float = math.inf

    @staticmethod
    def empty(request: Request, n: int, far: int) -> _Space:
        def none(rows: int) -> Tensor:
            return torch.empty(rows, 0, device=request.blocks.device, dtype=torch.float64)

        return _Space(none(n), none(far), none(n), _norm_squared(request.blocks))

    def append(self, q: Tensor, away: Tensor, back: Tensor) -> None:
        self.q = torch.cat((self.q, q.double()), dim=1)
        self.away = torch.cat((self.away, away.double()), dim=1)
        self.back = torch.cat((self.back, back.double()), dim=1)


def _next_check(history: list[tuple[int, float]], promise: float) -> int:
    """When the certified excess, shrinking as it did between the last two checks, will meet the promise."""
    if len(history) < 2:
        return history[-1][0] + 1
    (before, was), (now, excess) = history[-2:]
    if not math.isfinite(excess) or excess >= was:
        return MOST_BLOCKS + 1  # it never will
    if not math.isfinite(was):
        return now + 1
    rate = math.log(was / excess) / (now - before)
    return now + max(1, math.ceil(math.log(excess / promise) / rate))


def _ritz(request: Request, rank: int, space: _Space, step: int) -> KrylovTruncation:
    """Rayleigh-Ritz on the space so far, with its certificate."""
    projected_gram = space.away.T @ space.away
    theta, rotation = torch.linalg.eigh(projected_gram)
    theta, rotation = theta.flip(0).clamp(min=0.0), rotation.flip(1)
    residual = space.back - space.q @ projected_gram
    coupling = (rotation.T @ (residual.T @ residual) @ rotation).cpu()
    kept = float(theta[:rank].sum())
    skew = _skew(space.q)

    def certified(mu: float) -> Certificate:
        upper = coupled_ritz_sum(theta.cpu(), coupling, mu, rank)
        return _certificate(request, space, kept, upper, skew, step)

    certificate = certified(0.0)
    if certificate.holds:  # even an empty complement had to pass before its largest eigenvalue is worth finding
        # that of an earlier, smaller space still bounds this one's, because the complement shrank
        again = certified(space.mu) if math.isfinite(space.mu) else None
        if again is None or not again.holds:
            space.mu = min(space.mu, complement_bound(request, space.q))
            again = certified(space.mu)
        certificate = again
    basis = (space.q @ rotation[:, :rank]).to(request.blocks.dtype)
    projected = (rotation[:, :rank].T @ space.away.T).to(request.blocks.dtype)
    fix_signs(basis, projected)
    unit = 1.0 / request.blocks.scale
    subspace = Subspace(request.side, basis, theta[:rank].sqrt() * unit, certificate.in_units(unit))
    return KrylovTruncation(subspace, projected)


def _skew(q: Tensor) -> float:
    """``||Q^T Q - I||_2``."""
    gap = outer_product(q.T.contiguous())
    gap.diagonal().sub_(1.0)
    return float(torch.linalg.eigvalsh(gap).abs().max())


def _certificate(request: Request, space: _Space, kept: float, upper: float, skew: float, step: int) -> Certificate:
    """From ``residual^2 = tr G - kept`` and ``tau_r^2 >= tr G - upper``, with slack for rounding and an imperfect Q."""
    rounding = RITZ_ROUNDING if request.blocks.dtype == torch.float32 else RITZ_ROUNDING**2
    slack = (2.1 * skew + rounding) * upper
    return certify(
        norm_squared=space.norm_squared,
        tail=space.norm_squared - kept,
        slack=slack,
        loss=max(0.0, upper - kept) + slack,
        computed=request.blocks.dtype,
        returned=request.dtype,
        promise=request.promise,
        route=f"krylov {step} blocks of {space.q.shape[1] // step}",
    )


def complement_bound(request: Request, q: Tensor) -> float:
    """`LANCZOS_SAFETY` x the largest eigenvalue of G on the complement of ``span(q)``, by block Lanczos.

    Starts from signs independent of the range finder's. A Krylov space of `LANCZOS_STEPS` blocks of 8 under-estimates
    the top of a spectrum by less than 5 % with overwhelming probability (Kuczynski and Wozniakowski 1992); the bound
    only has to separate the complement from what was found.
    """
    blocks, side = request.blocks, request.side
    width = min(LANCZOS_WIDTH, request.order - q.shape[1])
    if width <= 0:
        return 0.0
    x = rademacher(
        request.order,
        width,
        seed=request.seed,
        name=request.name,
        purpose=f"complement {q.shape[1]}",
        device=blocks.device,
        dtype=blocks.dtype,
    )
    inside, start = q, q.shape[1]
    images: list[Tensor] = []
    for _ in range(LANCZOS_STEPS):
        if inside.shape[1] + width > request.order:
            break
        fresh = orthonormalize(x, inside)
        inside = torch.cat((inside, fresh.double()), dim=1)
        images.append(blocks.away(side, fresh).double())
        x = blocks.towards(side, images[-1].to(blocks.dtype))
    if inside.shape[1] == start:
        return 0.0
    span = torch.cat(images, dim=1)
    return LANCZOS_SAFETY * float(torch.linalg.eigvalsh(span.T @ span)[-1])


def _norm_squared(blocks: Blocks) -> float:
    total = torch.zeros((), dtype=torch.float64, device=blocks.device)
    for piece in blocks.pieces(Side.LEFT, torch.float64, 1 << 18):
        flat = piece.reshape(-1)
        total += torch.dot(flat, flat)
    return float(total)
