"""Where a tensor may be cut, and how a method's passes are driven over the pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lr.method import GRID, Call, Method, Pass, Piece, Slicing, Space, Statistics

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED_PLACES = 64


@dataclass(frozen=True)
class Span:
    """Elements ``start .. stop`` of a flattened tensor, and the shape in which a method gets them."""

    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.stop - self.start


def element_count(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def spans(shape: tuple[int, ...], slicing: Slicing, most: int, start: int = 0, stop: int | None = None) -> list[Span]:
    """Cut a tensor into pieces of at most about ``most`` elements, where ``slicing`` allows.

    ``start`` and ``stop`` choose a run of elements, ``start`` on the grid; only elementwise tensors have parts.
    Elementwise pieces are flat and start on multiples of `GRID`; rowwise pieces are ``[rows, columns]`` with
    every axis but the last as rows (a vector is one row); an uncut tensor keeps its shape.
    """
    n = element_count(shape)
    if slicing is Slicing.NONE:
        return [Span(0, n, shape)]
    if slicing is Slicing.ROWWISE:
        columns = shape[-1] if shape else 1
        rows = n // columns if columns else 0
        step = max(1, most // max(columns, 1))
        cuts = range(0, rows, step)
        return [Span(r * columns, min(rows, r + step) * columns, (min(rows, r + step) - r, columns)) for r in cuts] or [
            Span(0, n, (rows, columns))
        ]
    step = max(GRID, most // GRID * GRID)
    end = n if stop is None else stop
    edges = [(a, min(end, a + step)) for a in range(start, end, step)]
    return [Span(a, b, (b - a,)) for a, b in edges] or [Span(start, start, (0,))]


def sample_spans(shape: tuple[int, ...], size: int) -> list[Span]:
    """Short flat pieces at up to `SAMPLED_PLACES` places on the grid, evenly spread."""
    n = element_count(shape)
    blocks = -(-n // GRID)
    places = sorted({i * blocks // SAMPLED_PLACES for i in range(min(blocks, SAMPLED_PLACES))})
    starts = [p * GRID for p in places] or [0]
    return [Span(a, min(n, a + size), (min(n, a + size) - a,)) for a in starts]


def drive(statistics: Statistics | None, run: Callable[[Pass[Any, Any]], Any]) -> Any:
    """Run a method's passes through ``run`` and return its state (None where it has no passes)."""
    if statistics is None:
        return None
    try:
        wanted = next(statistics)
        while True:
            wanted = statistics.send(run(wanted))
    except StopIteration as end:
        return end.value


def fold_all(wanted: Pass[Any, Any], looks: Iterator[tuple[Call, Piece]]) -> Any:
    """One pass over ``looks``, in order."""
    total = None
    for call, piece in looks:
        total = wanted.fold(total, wanted.map(call, piece))
    return wanted.finish(total)


def apply(
    method: Method,
    tensors: list[Tensor],
    base: Tensor | None = None,
    *,
    merge: dict[str, Any] | None = None,
    models: list[dict[str, Any]] | None = None,
    name: str = "tensor",
    seed: int = 0,
    most: int | None = None,
    keys: Sequence[str] | None = None,
    extra: Sequence[Tensor] = (),
    facts: Sequence[Mapping[str, str]] | None = None,
) -> Tensor:
    """Merge tensors in memory: what the engine does to one tensor, without files.

    Args:
        tensors: weights of each model, one shape, any floating dtype.
        base: weights of the base model, for a method that takes one as its reference.
        merge: the method's `Merge` parameters, by the names that recipes use.
        models: its `PerModel` parameters, one mapping for each tensor.
        most: cut into pieces of about this many elements; None leaves the tensor whole.
        keys: names of the models for the random generator.
        extra: each model's companion, for a method that declares one; ``facts`` the metadata of their files.

    Returns:
        the merged weights, fp32.
    """
    import torch

    merge_parameters = method.Merge.model_validate(merge or {})
    per_model = tuple(method.PerModel.model_validate(m) for m in (models or [{} for _ in tensors]))
    call = Call(
        name=name,
        shape=tuple(tensors[0].shape),
        merge=merge_parameters,
        models=per_model,
        has_base=base is not None,
        seed=seed,
        keys=tuple(keys or (f"model {i}" for i in range(len(tensors)))),
        facts=tuple(tuple(sorted(f.items())) for f in facts or [{} for _ in extra]),
    )
    beside = [x.detach().to(torch.float32) for x in extra]
    entire = method.companion is not None and method.companion.layout != "same"
    delta = method.space(base is not None) is Space.DELTA
    flat = [t.detach().to(torch.float32).reshape(-1) for t in tensors]
    reference = None if base is None else base.detach().to(torch.float32).reshape(-1)

    def piece(span: Span) -> Piece:
        b = None if reference is None else reference[span.start : span.stop].reshape(span.shape)
        cut = [t[span.start : span.stop].reshape(span.shape) for t in flat]
        more = beside if entire else [x.reshape(-1)[span.start : span.stop].reshape(span.shape) for x in beside]
        return Piece([t - b for t in cut] if delta and b is not None else cut, b, span.start, extra=more)

    def look(wanted: Pass[Any, Any]) -> Any:
        chosen = sample_spans(call.shape, wanted.sample) if wanted.sample else whole
        return fold_all(wanted, ((call, piece(s)) for s in chosen))

    whole = spans(call.shape, method.slicing(merge_parameters), most or max(call.numel, 1))
    model_state = drive(method.model_statistics([call]), look)
    state = drive(method.statistics(call, model_state), look)
    out = torch.empty_like(flat[0])
    for span in whole:
        p = piece(span)
        merged = method.merge(call, p, state)
        out[span.start : span.stop] = (merged + p.base if delta and p.base is not None else merged).reshape(-1)
    return out.reshape(call.shape)
