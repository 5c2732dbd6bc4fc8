"""MergeMany: three or more models, each aligned to the mean of the others until nothing moves.

Source: Ainsworth, Hayase, Srinivasa, "Git Re-Basin", arXiv 2209.04836, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.matching.ascent import Tell, match_weights
from mergekit_lr.matching.member import Member, Read, apply, compose, identity, inverse


@dataclass(frozen=True)
class Alignment:
    """``members[i]`` aligns model i; the first is the identity. ``rounds`` over all models were needed."""

    members: tuple[Member, ...]
    rounds: int


def match_many(
    spec: SymmetrySpec,
    reads: Sequence[Read],
    *,
    seed: int = 0,
    only: Sequence[str] = (),
    max_rounds: int = 50,
    threads: int = 1,
    tell: Tell | None = None,
) -> Alignment:
    """Align every model to the mean of the others, in an order drawn from ``seed``, until a round moves none.

    The sum of squared distances to the mean falls with every move, so this ends. All members are then composed with
    the inverse of the first one's, so that the first model stays as it is.
    """
    members = [identity(spec) for _ in reads]
    random = np.random.Generator(np.random.PCG64([seed, len(reads)]))
    rounds, moved = 0, True
    while moved and rounds < max_rounds:
        rounds, moved = rounds + 1, False
        for i in map(int, random.permutation(len(reads))):
            mean = _mean_of(spec, [(r, m) for j, (r, m) in enumerate(zip(reads, members, strict=True)) if j != i])
            found = match_weights(
                spec, mean, reads[i], seed=seed, only=only, threads=threads, start=members[i], tell=tell
            )
            moved = moved or bool(found.history)
            members[i] = found.member
    back = inverse(spec, members[0])
    return Alignment(tuple(compose(spec, m, back) for m in members), rounds)


def _mean_of(spec: SymmetrySpec, models: Sequence[tuple[Read, Member]]) -> Read:
    def read(name: str) -> Tensor:
        total: Tensor | None = None
        for source, member in models:
            x = apply(spec, member, source, name).double()
            total = x if total is None else total + x
        assert total is not None
        return total / len(models)

    return read


def mean_model(
    spec: SymmetrySpec, tensors: Sequence[dict[str, Tensor]], members: Sequence[Member]
) -> dict[str, Tensor]:
    """The mean of aligned models, in fp64, each tensor in its own dtype; integers are the first model's."""
    out = {}
    for name, first in tensors[0].items():
        if first.is_floating_point():
            read = _mean_of(spec, [(t.__getitem__, m) for t, m in zip(tensors, members, strict=True)])
            out[name] = read(name).to(first.dtype)
        else:
            out[name] = first.clone()
    return out


def interpolated(a: dict[str, Tensor], b: dict[str, Tensor], t: float) -> dict[str, Tensor]:
    """``a + t (b - a)`` in fp64, each tensor in its own dtype; integers are a's."""
    return {
        n: (x.double() + t * (b[n].double() - x.double())).to(x.dtype) if x.is_floating_point() else x.clone()
        for n, x in a.items()
    }
