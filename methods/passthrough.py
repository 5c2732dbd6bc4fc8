"""Passthrough: the tensors of one model, perhaps scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lr.method import Base, Call, Method, Parameters, Piece, Source, parameter

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(Method):
    r"""One model's tensors as they are, or times ``scale``: ``scale * W``.

    Takes exactly one model: to copy it, to change its dtype or tokenizer, or to scale chosen tensors by a
    filter. Elementwise in fp32, any shape; without ``scale`` the values are not touched.

    Source: layers taken over unchanged are the building block of depth up-scaling: Kim et al., "SOLAR 10.7B:
    Scaling large language models with simple yet effective depth up-scaling", NAACL 2024, arXiv:2312.15166.
    """

    name = "passthrough"
    summary = "one model's tensors, unchanged or scaled"
    source = Source("SOLAR 10.7B (depth up-scaling)", arxiv="2312.15166")
    base = Base.UNUSED
    max_models = 1
    exposes_nonfinite = True

    class PerModel(Parameters):
        scale: float | None = parameter(
            None, allow_inf_nan=False, description="factor on every entry; absent: unchanged"
        )

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        scale = call.models[0].scale
        return piece.tensors[0].clone() if scale is None else piece.tensors[0] * scale
