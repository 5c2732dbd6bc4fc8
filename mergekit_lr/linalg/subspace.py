"""The dominant subspace of a block matrix, certified: decision table and escalation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lr.errors import LinalgError
from mergekit_lr.linalg.blocks import Blocks, Side
from mergekit_lr.linalg.certificate import (
    EXACT_PROMISE,
    PROBES,
    PROMISE,
    ROUNDING,
    Certificate,
    certify,
    coarse_loss,
    gram_rounding,
    perturbation,
    refined_loss,
    rounding_floor,
)
from mergekit_lr.linalg.eigh import fix_signs, symmetric_eigh
from mergekit_lr.linalg.exact import full_svd
from mergekit_lr.linalg.gram import Probe, gram, probe
from mergekit_lr.linalg.random_signs import rademacher
from mergekit_lr.linalg.rank import RankPolicy, as_policy

BATCH_BYTES = 2 << 30
"""Grams of one batched eigensolve are held together up to this many bytes."""


@dataclass(frozen=True)
class Subspace:
    """Orthonormal basis of the r dominant left (LEFT) or right (RIGHT) singular directions of M.

    Attributes:
        side: what the basis spans: columns of M (LEFT, n = rows) or rows of M (RIGHT, n = columns).
        basis: ``[n, r]``, in the dtype it was computed in: fp32, or fp64 where fp64 was asked for or needed.
        values: estimates of sigma_1 .. sigma_r, fp64, descending. From an fp32 Gram their relative error is about
            ``3e-7 (sigma_1 / sigma)^2``: useless below 3e-4 sigma_1.
        certificate: how far ``||M - P M||_F`` (LEFT; ``||M - M P||_F``, RIGHT; P the projector) is from the least.
    """

    side: Side
    basis: Tensor
    values: Tensor
    certificate: Certificate

    @property
    def rank(self) -> int:
        return self.basis.shape[1]


@dataclass(frozen=True)
class Request:
    """What is asked of one block matrix."""

    blocks: Blocks
    rank: RankPolicy
    promise: float
    exact: bool
    seed: int
    name: str

    @property
    def side(self) -> Side:
        return self.blocks.small_side

    @property
    def order(self) -> int:
        return self.blocks.order(self.side)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors returned."""
        return torch.float64 if self.exact else self.blocks.dtype

    def choose_rank(self, values: Tensor | None) -> int:
        sigma = None if values is None else values.double().clamp(min=0.0).sqrt().cpu().numpy()
        return self.rank(sigma, self.blocks.rows, self.blocks.columns)

    def look(self) -> Probe:
        b = self.blocks
        signs = rademacher(
            self.order,
            PROBES,
            seed=self.seed,
            name=self.name,
            purpose="certificate",
            device=b.device,
            dtype=torch.float64,
        )
        return probe(b, self.side, signs)


def make_request(
    blocks: Blocks,
    rank: int | RankPolicy,
    *,
    tolerance: float = PROMISE,
    exact: bool = False,
    seed: int = 0,
    name: str = "",
) -> Request:
    """A checked request; ``exact`` promises 1e-6 in fp64, else ``tolerance`` (at most 1e-3 is the contract)."""
    if not 0.0 < tolerance < 1.0:
        raise LinalgError(f"tolerance must be between 0 and 1, got {tolerance!r}", where=blocks.where)
    policy = as_policy(rank)
    if not policy.needs_spectrum:
        policy(None, blocks.rows, blocks.columns)  # an impossible rank fails before any work
    promise = min(tolerance, EXACT_PROMISE) if exact else tolerance
    return Request(blocks, policy, promise, exact, seed, name or blocks.where)


def solve(request: Request) -> Subspace:
    """The first certified answer of the Gram routes: fp32 Gram, fp64 Gram, full solve.

    Raises:
        LinalgError: not even the full solve certifies the promise (only possible with ``exact``).
    """
    return solve_many([request])[0]


def solve_many(requests: Sequence[Request]) -> list[Subspace]:
    """`solve` for many, the first eigenproblems of equal order in one batched call each."""
    answers: list[Subspace | None] = [None] * len(requests)
    for group in _batches(requests):
        members = [requests[i] for i in group]
        dtype = members[0].dtype
        looks = [r.look() for r in members]
        grams = [gram(r.blocks, r.side, dtype=dtype) for r in members]
        stack = grams[0].unsqueeze(0) if len(grams) == 1 else torch.stack(grams)
        values, vectors = symmetric_eigh(stack, where=members[0].name)
        for i, request, look, g, lam, u in zip(group, members, looks, stack, values, vectors, strict=True):
            first = _finish(request, look, g, lam, u)
            answers[i] = first if first.certificate.holds else _escalate(request, look, dtype)
    return [a for a in answers if a is not None]


def _batches(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Indices of requests whose first Grams share order, dtype and device, within `BATCH_BYTES`."""
    groups: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for i, r in enumerate(requests):
        groups.setdefault((r.order, r.dtype, r.blocks.device), []).append(i)
    for (order, dtype, device), members in groups.items():
        size = max(1, BATCH_BYTES // (order * order * dtype.itemsize)) if device.type == "cuda" else 1
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _finish(request: Request, look: Probe, g: Tensor, values: Tensor, vectors: Tensor) -> Subspace:
    """Cut an eigendecomposition of the Gram at the rank asked for, and certify the cut."""
    lam = values.clamp(min=0.0)
    rank = request.choose_rank(lam)
    certificate = _coarse(request, look, lam.double(), vectors, rank)
    if not certificate.holds:
        certificate = _refined(request, look, g, vectors, rank)
    basis = vectors[:, :rank].contiguous()
    if rank == request.order:
        # All that a complete basis can lose is orthonormality, and the eigensolver's 1e-6 is near the rounding floor.
        u = basis.double()
        basis = (1.5 * u - 0.5 * (u @ (u.T @ u))).to(basis.dtype)
    return _unscaled(request, basis, lam[:rank].double().sqrt(), certificate)


def _coarse(request: Request, look: Probe, lam: Tensor, vectors: Tensor, rank: int) -> Certificate:
    if rank == request.order:  # any complete basis loses nothing
        return _certificate(request, look, vectors, tail=0.0, slack=0.0, loss=0.0)
    h = perturbation(look, lam, vectors)
    tail = look.trace - float(lam[:rank].sum())
    return _certificate(request, look, vectors, tail, math.sqrt(rank) * h, coarse_loss(lam, rank, h))


def _refined(request: Request, look: Probe, g: Tensor, vectors: Tensor, rank: int) -> Certificate:
    rounding = gram_rounding(look, g)
    loss, kept = refined_loss(g, vectors, rank, rounding)
    return _certificate(request, look, vectors, look.trace - kept, math.sqrt(rank) * rounding, loss)


def _certificate(request: Request, look: Probe, vectors: Tensor, tail: float, slack: float, loss: float) -> Certificate:
    return certify(
        norm_squared=look.trace,
        tail=tail,
        slack=slack,
        loss=loss,
        computed=vectors.dtype,
        returned=request.dtype,
        promise=request.promise,
        route=f"gram {'fp64' if vectors.dtype == torch.float64 else 'fp32'}",
    )


def _unscaled(request: Request, basis: Tensor, sigma: Tensor, c: Certificate) -> Subspace:
    """Signs fixed, values and residuals back in the units of the input."""
    fix_signs(basis)
    unit = 1.0 / request.blocks.scale
    return Subspace(request.side, basis, sigma * unit, c.in_units(unit))


def _escalate(request: Request, look: Probe, done: torch.dtype) -> Subspace:
    """fp64 Gram unless that was it, then the full fp64 solve."""
    routes: list[Callable[[Request, Probe], Subspace]] = [_full]
    if done != torch.float64:
        routes.insert(0, _gram64)
    for route in routes:
        answer = route(request, look)
        if answer.certificate.holds:
            return answer
    raise LinalgError(
        f"no solver certifies an excess of {request.promise:g}",
        where=request.name,
        why=f"the full fp64 solve left a bound of {answer.certificate.excess:.1e}",
        fix="ask for a rank above or below the gap in the spectrum, or a larger tolerance",
    )


def _gram64(request: Request, look: Probe) -> Subspace:
    g = gram(request.blocks, request.side, dtype=torch.float64)
    return _finish(request, look, g, *symmetric_eigh(g, where=request.name))


def _full(request: Request, look: Probe) -> Subspace:
    """LAPACK on the fp64 matrix; certified by Mirsky: ``|tau_r(A) - tau_r(B)| <= ||A - B||_F``."""
    dense = request.blocks.dense(torch.float64)
    u, s, vh = full_svd(dense, where=request.name)
    rank = request.choose_rank(s * s)
    if request.side is Side.RIGHT:
        dense, u, vh = dense.T, vh.T, u.T
    signs = look.signs
    error = dense.T @ signs - vh.T @ (s.unsqueeze(1) * (u.T @ signs))
    backward = 3.0 * float(torch.linalg.vector_norm(error)) / math.sqrt(signs.shape[1])
    tau = float(torch.linalg.vector_norm(s[rank:]))
    rounding = ROUNDING[torch.float64, request.dtype] * math.sqrt(look.trace)
    residual = math.hypot(tau + backward, rounding)
    certificate = Certificate(
        excess=residual / (tau - backward) - 1.0 if tau > backward else math.inf,
        residual=math.hypot(tau, rounding),
        norm=math.sqrt(look.trace),
        promise=request.promise,
        floor=rounding_floor(request.dtype, request.promise),
        route="full fp64",
        bound_residual=residual,
    )
    return _unscaled(request, u[:, :rank].contiguous(), s[:rank].clone(), certificate)
