"""Linear algebra of merging: Grams, subspaces, truncated SVDs with certificates, polar factors, rank policies.

Truncations promise ``||A - U S V||_F <= (1 + 1e-3) optimum``, certified after the solve, or escalate by
themselves; see `mergekit_lr.linalg.certificate` for the bounds and ``docs/linalg.md`` for the algorithms chosen
and their cost.
"""

from mergekit_lr.linalg.blocks import Blocks, Side
from mergekit_lr.linalg.certificate import Certificate
from mergekit_lr.linalg.eigh import largest_eigenpairs, symmetric_eigh
from mergekit_lr.linalg.exact import full_svd, singular_values
from mergekit_lr.linalg.gram import gram
from mergekit_lr.linalg.joint import (
    JointSubspace,
    joint_left_subspace,
    joint_left_subspaces,
    project_combine,
    weighted_sum,
)
from mergekit_lr.linalg.lowrank import concatenation_svd, sum_svd
from mergekit_lr.linalg.orthonormal import orthonormalize
from mergekit_lr.linalg.polar import polar_factor
from mergekit_lr.linalg.random_signs import rademacher
from mergekit_lr.linalg.rank import RankPolicy, energy, fixed, gavish_donoho, participation, ratio
from mergekit_lr.linalg.tasks import TaskComponents, task_components, task_gram
from mergekit_lr.linalg.truncated import TruncatedSVD, truncated_svd
from mergekit_lr.linalg.whitened import gram_root, joint_whitened_subspace, whitened_svd

__all__ = [
    "Blocks",
    "Certificate",
    "JointSubspace",
    "RankPolicy",
    "Side",
    "TaskComponents",
    "TruncatedSVD",
    "concatenation_svd",
    "energy",
    "fixed",
    "full_svd",
    "gavish_donoho",
    "gram",
    "gram_root",
    "joint_left_subspace",
    "joint_left_subspaces",
    "joint_whitened_subspace",
    "largest_eigenpairs",
    "orthonormalize",
    "participation",
    "polar_factor",
    "project_combine",
    "rademacher",
    "ratio",
    "singular_values",
    "sum_svd",
    "symmetric_eigh",
    "task_components",
    "task_gram",
    "truncated_svd",
    "weighted_sum",
    "whitened_svd",
]
