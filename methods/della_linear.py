"""DELLA with a weighted sum: drop entries at random, small ones more often, rescale, add up."""

from __future__ import annotations

from typing import Any, Literal

from mergekit_lr.method import Source, parameter
from mergekit_lr.sparsify import RandomByRank
from mergekit_lr.task_vectors import DensityParameters, RandomParameters, TaskVectorMethod


class RankDropParameters(RandomParameters):
    """DELLA's parameters of the whole merge."""

    epsilon_rule: Literal["half", "full"] = parameter(
        "half",
        description="half: epsilon is half the spread, probabilities density - epsilon .. density + epsilon "
        "(mergekit); full: epsilon is the whole spread, in steps of epsilon / n (the paper)",
    )


class RankDropDensity(DensityParameters):
    """DELLA's parameters of each model."""

    epsilon: float = parameter(
        0.15, ge=0, lt=1, description="spread of the probabilities of being kept, see epsilon_rule"
    )


def spread_problems(merge: Any, models: tuple[Any, ...]) -> list[str]:
    """Densities whose spread of probabilities would leave 0 .. 1."""
    out = []
    for m in models:
        half = m.epsilon if merge.epsilon_rule == "half" else m.epsilon / 2
        if 0 < m.density < 1 and not half <= m.density <= 1 - half:
            out.append(
                f"density {m.density:g} with epsilon {m.epsilon:g} asks for probabilities of "
                f"{m.density - half:g} .. {m.density + half:g}; keep them within 0 .. 1 by a smaller epsilon"
            )
    return out


class DellaLinear(TaskVectorMethod):
    r"""DELLA's MagPrune, then a weighted sum: ``base + lambda * sum_i w_i (m_i * D_i) / p_i``.

    ``D_i = W_i - base``. In each row (the last axis) of n entries, ``m ~ Bernoulli(p)`` entry by entry with
    ``p = density - epsilon + 2 epsilon r / (n - 1)``, r = 0 for the smallest magnitude and n - 1 for the
    largest (equal ones by index). ``epsilon_rule: full`` is the paper's: the drop probability is
    ``1 - density - epsilon / 2 + epsilon r' / n`` with r' = 0 for the largest. A vector is one row; a row of
    one entry keeps it with probability ``density``; density 1 keeps all and density 0 none. With
    ``normalize`` the sum is divided by ``sum_i w_i``. fp32, rows of any length; one look at each tensor, two
    with ``rescale_by: l1`` (mergekit's rule, see ``dare_linear``).

    Source: Deep, Bhardwaj and Poria, "DELLA-Merging: Reducing interference in model merging through
    magnitude-based sampling", 2024, arXiv:2406.11617, section 3.
    """

    name = "della_linear"
    summary = "drop entries at random, small ones more often, rescale, add them up"
    source = Source("DELLA-Merging", arxiv="2406.11617")
    stochastic = True
    rule = RandomByRank()

    class Merge(RankDropParameters):
        pass

    class PerModel(RankDropDensity):
        pass

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        return spread_problems(merge, models)
