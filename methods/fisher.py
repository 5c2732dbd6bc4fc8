"""Fisher merging: a mean whose weights are each model's diagonal Fisher information."""

from __future__ import annotations

from mergekit_lr.curvature_weights import CurvatureWeighted, PerModelUnmasked, UnmaskedParameters
from mergekit_lr.method import Source


class Fisher(CurvatureWeighted):
    r"""Fisher-weighted averaging: ``sum_i w_i F_i W_i / sum_i w_i F_i``, entry by entry.

    F_i >= 0 is model i's diagonal Fisher information, the weight's shape: the mean squared gradient of the
    log-likelihood of labels drawn from the model, or Adam's second moments in its place. Where every F_i is zero the
    entry is the base's, without a base the mean weighted by w_i. Elementwise in fp32, any shape; one look at each
    tensor (one more for ``epsilon`` or ``normalize_curvature``).

    It is `ota` at power 1 without masks, over the same kernel.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022, arXiv:2111.09832,
    equation 4.
    """

    name = "fisher"
    summary = "average weighted entry by entry with each model's diagonal Fisher information"
    source = Source("Merging models with Fisher-weighted averaging", arxiv="2111.09832")

    class Merge(UnmaskedParameters):
        pass

    class PerModel(PerModelUnmasked):
        pass
