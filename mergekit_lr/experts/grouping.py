"""Who is like whom: partitions of a layer's E experts into ``count`` groups.

Outputs are never stored: the Gram ``G_ij = sum_l <y_i(l), y_j(l)>`` over calibration tokens l holds all inner products,
so K-means on the rows of any ``X`` with ``X X^T = G`` is exactly K-means on the outputs themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mergekit_lr.experts.partition import Group, Partition, partition
from mergekit_lr.experts.score import best, ranked
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]

LINKAGES = ("average", "complete", "ward", "single")


def embedding(gram: Tensor) -> Floats:
    """``X`` ``[E, E]`` with ``X X^T = G``: eigenvectors times roots of eigenvalues (negative ones are rounding: 0)."""
    from mergekit_lr.linalg import symmetric_eigh

    g = gram.double()
    values, vectors = symmetric_eigh(0.5 * (g + g.T), where="embedding of a Gram")
    x = vectors * values.clamp_min(0).sqrt()
    out: Floats = x.numpy()
    return out


def gram_distances(gram: Tensor) -> Tensor:
    """Euclidean distances ``[E, E]`` between the vectors of a Gram."""
    g = gram.double()
    squares = g.diagonal()
    return (squares[:, None] + squares[None, :] - g - g.T).clamp_min(0).sqrt()


def cosine_of(gram: Tensor) -> Tensor:
    """Cosines ``[E, E]`` between the vectors of a Gram; 0 with a zero vector, 1 with itself."""
    g = gram.double()
    norm = g.diagonal().clamp_min(0).sqrt()
    cosine = g / torch.outer(norm, norm).masked_fill(torch.outer(norm, norm) == 0, 1.0)
    return cosine.clamp(-1, 1).fill_diagonal_(1.0)


def centred(labels: Sequence[int], weights: Tensor) -> Partition:
    """The groups of equal labels, each with its heaviest member as the centre (the first of equal ones)."""
    groups = []
    for label in sorted(set(labels)):
        members = tuple(e for e, found in enumerate(labels) if found == label)
        groups.append(Group(members, members[int(torch.argmax(weights[list(members)]))]))
    return partition(groups, len(labels))


def kmeans_labels(gram: Tensor, count: int, seed: int, restarts: int = 10) -> list[int]:
    """K-means (k-means++ seeding, best of ``restarts``) on the vectors of a Gram; exactly ``count`` labels.

    Where fewer than ``count`` vectors are distinct, equal ones are separated, last index first.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    x = embedding(gram)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than groups: mended below
        found = KMeans(count, n_init=restarts, random_state=seed % 2**32).fit(x).labels_
    return _exactly(found.tolist(), x, count)


def _exactly(labels: list[int], x: Floats, count: int) -> list[int]:
    """Split groups until there are ``count``: the one with the largest spread loses its farthest member."""
    labels = list(labels)
    while len(set(labels)) < count:
        spread = {}
        for label in set(labels):
            members = [e for e, found in enumerate(labels) if found == label]
            if len(members) > 1:
                away = ((x[members] - x[members].mean(axis=0)) ** 2).sum(axis=1)
                spread[label] = (float(away.sum()), len(members), members[int(np.flatnonzero(away >= away.max())[-1])])
        label = max(spread, key=lambda k: (spread[k][0], spread[k][1], -k))
        labels[spread[label][2]] = max(labels) + 1
    return labels


def kmeans_cost(gram: Tensor, labels: Sequence[int]) -> float:
    """``sum_e |x_e - mean of its group|^2``, from the Gram alone."""
    g = gram.double()
    total = float(g.diagonal().sum())
    for label in set(labels):
        m = [e for e, found in enumerate(labels) if found == label]
        total -= float(g[m][:, m].sum()) / len(m)
    return max(total, 0.0)


def hierarchical_labels(distances: Tensor, count: int, linkage: str) -> list[int]:
    """Agglomerative clustering of points with Euclidean ``distances`` ``[E, E]``, cut at exactly ``count`` groups."""
    tree = linkage_tree(distances, linkage)
    n = len(distances)
    labels, members = list(range(n)), {e: [e] for e in range(n)}
    for step, (a, b, _, _) in enumerate(tree[: n - count]):
        members[n + step] = members.pop(int(a)) + members.pop(int(b))
    for label, found in enumerate(sorted(members.values(), key=min)):
        for e in found:
            labels[e] = label
    return labels


def linkage_tree(distances: Tensor, linkage: str) -> Floats:
    """scipy's tree of merges for a matrix of distances."""
    from scipy.cluster.hierarchy import linkage as scipy_linkage
    from scipy.spatial.distance import squareform

    d = distances.double()
    symmetric = (0.5 * (d + d.T)).fill_diagonal_(0)
    tree: Floats = scipy_linkage(squareform(symmetric.numpy(), checks=False), method=linkage)
    return tree


def around(centres: Sequence[int], similarity: Tensor) -> Partition:
    """Every other expert joins the centre that it is most similar to (the first of equal ones)."""
    members = {c: [c] for c in centres}
    index = list(centres)
    for e in range(len(similarity)):
        if e not in members:
            members[index[int(torch.argmax(similarity[e, index]))]].append(e)
    return partition([Group(tuple(sorted(m)), c) for c, m in members.items()], len(similarity))


def dominant(frequency: Tensor, router_gram: Tensor, count: int) -> Partition:
    """M-SMoE's groups: the ``count`` most used experts, the others at the one whose router logits are most like theirs.

    Similarity is the cosine between columns of the router's logits over tokens (Li et al., arXiv 2310.01334, section
    3.2).
    """
    return around(best(frequency, count), cosine_of(router_gram))


def ream_similarity(output_cosine: Tensor, gate_gram: Tensor) -> Tensor:
    """REAM's likeness: the mean of ``(1 + cos)/2`` of outputs and ``1 - d/d_max`` of normalised gate columns.

    ``d`` is the Euclidean distance between the columns of softmax gates over tokens, each divided by its norm; from
    their Gram, ``d^2 = 2 - 2 cos``.
    """
    d = (2 - 2 * cosine_of(gate_gram)).clamp_min(0).sqrt()
    largest = float(d.max())
    gates = 1 - d / largest if largest > 0 else torch.ones_like(d)
    return ((output_cosine.double() + 1) / 2 + gates) / 2


def greedy_groups(saliency: Tensor, similarity: Tensor, count: int, size: int = 16) -> Partition:
    """REAM's groups: in the order of saliency each centre takes its ``size - 1`` most similar free experts.

    The ``count`` most salient experts are the centres. So there are few large groups and many experts alone (arXiv
    2604.04356). Experts that no centre had room for join the centre most similar to them.
    """
    order = ranked(saliency)
    centres, free = order[:count], set(order[count:])
    members = {c: [c] for c in centres}
    for c in centres:
        near = sorted(free, key=lambda e: (-float(similarity[c, e]), e))[: size - 1]
        members[c] += near
        free -= set(near)
    for e in sorted(free):
        members[max(centres, key=lambda c: (float(similarity[e, c]), -c))].append(e)
    return partition([Group(tuple(sorted(m)), c) for c, m in members.items()], len(saliency))


def random_labels(experts: int, count: int, seed: int) -> list[int]:
    """A control: a random order cut into groups whose sizes differ by at most one."""
    order = np.random.default_rng(seed).permutation(experts)
    labels = [0] * experts
    for place, e in enumerate(order):
        labels[int(e)] = place % count
    return labels


def kept_only(kept: Sequence[int], experts: int) -> Partition:
    """Pruning: the kept experts alone, all others dropped."""
    return partition([Group((e,), e) for e in kept], experts)
