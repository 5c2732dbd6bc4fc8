"""Row scales: task vectors added up with one factor for every row of every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergekit_lr.method import Base, Call, Companion, Method, Missing, Parameters, Piece, Source, parameter

if TYPE_CHECKING:
    from torch import Tensor


class RowScales(Method):
    r"""Row scales: ``W[r] = base[r] + lambda * sum_i s_i[r] (W_i[r] - base[r])`` for every row r of every weight.

    ``s_i`` is a vector ``[m]`` for a weight ``[m, ..]`` (a vector has one factor for each entry), read from a file as
    ``NAME.scale``. `mergekit_lr.fit_scales` finds it on text: the merge is linear in its scales, so the gradient of
    a loss by ``s_i[r]`` is that by row r times the task vector's row. One scale for a whole model is task arithmetic.

    Elementwise in fp32; one look at each tensor.

    Source: ours; scales for each layer are AdaMerging's (Yang et al., ICLR 2024, arXiv:2310.02575), rows are new here.
    """

    name = "row_scales"
    summary = "task vectors added up with one factor for every row, fitted on text"
    source = Source("AdaMerging: adaptive model merging for multi-task learning", arxiv="2310.02575")
    base = Base.REQUIRED
    companion = Companion(
        parameter="scales",
        suffixes=(".scale",),
        make="make the files with: mergekit-lr fit-scales RECIPE --text FILE...",
        layout="rows",
    )

    class Merge(Parameters):
        lam: float = parameter(1.0, alias="lambda", allow_inf_nan=False, description="factor on the whole sum")
        missing: Missing = parameter(
            "error",
            description="what becomes of a tensor that no file has scales for: an error, the mean of the task vectors "
            "times lambda, or the base's tensor",
        )

    class PerModel(Parameters):
        scales: str = parameter(description="safetensors file with this model's factors, one vector for each weight")

    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        total = None
        for i, x in enumerate(piece.tensors):
            # Without entries (`missing: mean`) every model counts alike.
            part = x * (rows_of(call, piece, piece.extra[i]) if piece.extra else 1 / len(piece.tensors))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total if call.merge.lam == 1 else total.mul_(call.merge.lam)


def rows_of(call: Call, piece: Piece, scale: Tensor) -> Tensor:
    """The factor of every element of a piece: ``[n]``, from one for each row."""
    n = piece.tensors[0].numel()
    if n == 0:
        return scale.new_ones(n)
    width = call.numel // max(1, scale.numel())
    first, last = piece.start // width, (piece.start + n - 1) // width
    inside = piece.start - first * width
    spread = scale.reshape(-1)[first : last + 1].repeat_interleave(width)[inside : inside + n]
    return spread.view(piece.tensors[0].shape)
