"""What a merge method is: parameters, a declared space, optional passes of statistics, one tensor function.

A method never opens a file, never casts to the output dtype and never knows how a tensor was cut. The engine
hands it *pieces* (fp32, contiguous): 1-D runs of the flattened tensor for an elementwise method, 2-D blocks of
whole rows for a rowwise one, the tensor in its own shape when it may not be cut. Pieces start on a fixed grid
(`GRID` elements, or whole rows), so a result cannot depend on how many pieces there were.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticUndefined

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRID = 65_536
"""Elements between the places where an elementwise tensor may be cut."""


class Space(StrEnum):
    """What numbers a method works on."""

    WEIGHT = "weight"  # absolute weights
    DELTA = "delta"  # task vectors: the base subtracted
    FACTOR = "factor"  # low-rank pairs


class Slicing(StrEnum):
    """How a tensor may be cut before the method sees it."""

    ELEMENTWISE = "elementwise"
    ROWWISE = "rowwise"
    NONE = "none"


class Base(StrEnum):
    """What ``base_model`` is to a method."""

    REQUIRED = "required"  # the reference that deltas are taken from; not itself an input
    OPTIONAL = "optional"  # a reference when given: the method then works on deltas
    OPERAND = "operand"  # the first of the inputs
    FRAME = "frame"  # gives everything that the models do not; not an input unless it is listed too
    UNUSED = "unused"  # no reference: one input among others, whose config and tokenizer the output gets


class Parameters(BaseModel):
    """Resolved parameters of one kind: for the whole merge, or for one model, at one tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=False)


def parameter(default: Any = PydanticUndefined, *, description: str, alias: str | None = None, **limits: Any) -> Any:
    """A method parameter: a pydantic field that must carry a description. No default means required."""
    return Field(default=default, description=description, alias=alias, **limits)


Missing = Literal["error", "mean", "base"]
"""What becomes of a tensor for which no model's companion file has an entry: an error that lists them all, a merge
without companions (the method says what that is), or the base's tensor, copied."""

Facts = tuple[tuple[str, str], ...]
"""What a companion file says of itself: its metadata as sorted (key, value) pairs."""


@dataclass(frozen=True)
class Companion:
    """Tensors that a method reads beside each model's weights, from a file that a parameter names.

    ``parameter``: the `PerModel` parameter (a text) with the path. ``suffixes``: the entry for weight W is called W
    plus one of these, the first that is there. ``layout``: ``same``, the weight's own shape, or its row and column sums
    (``.row``, ``.col``), cut as the weight is cut; ``gram``, ``[n, n]`` for a weight ``[.., n]``; ``rows``, one number
    for each row of the weight, ``[m]`` for ``[m, ..]``. The last two are given whole. ``nonnegative``: negative values
    are refused. ``make`` says how such a file is made.
    """

    parameter: str
    suffixes: tuple[str, ...]
    make: str
    layout: Literal["same", "gram", "rows"] = "same"
    nonnegative: bool = False

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an entry for a weight of this shape."""
        if self.layout == "gram":
            return (weight[-1],) * 2
        return weight[:1] if self.layout == "rows" else weight


@dataclass(frozen=True)
class Call:
    """One application of a method: everything but the tensor data.

    ``merge`` holds the method's `Merge` parameters and ``models`` one `PerModel` each, resolved for this tensor;
    ``keys`` names each model for the random generator (the reference as the recipe writes it). ``facts`` is what
    each model's companion file says of itself; empty where this tensor has no companions.
    """

    name: str
    shape: tuple[int, ...]
    merge: Any
    models: tuple[Any, ...]
    has_base: bool
    seed: int = 0
    keys: tuple[str, ...] = ()
    facts: tuple[Facts, ...] = ()

    @property
    def numel(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    def values(self, attribute: str) -> list[Any]:
        """One per-model parameter of every model, in model order."""
        return [getattr(m, attribute) for m in self.models]

    def philox_key(self, model: int, purpose: str = "mask") -> int:
        """128-bit key of the counter-based generator for one model's copy of this tensor."""
        text = "\0".join((str(self.seed), self.keys[model], self.name, purpose))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


@dataclass
class Piece:
    """A part of one tensor across all inputs.

    ``tensors``: fp32, one per model, deltas if the method's space is delta. ``base``: the same part of the base
    in fp32, when there is one. ``start``: index of the first element in the flattened tensor. ``counts``: what
    ``merge`` wants said of this piece in the report, by name; added up over the tensor and over the model. ``extra``:
    each model's companion in fp32, the same part as ``tensors`` or whole (`Companion.layout`); empty where the tensor
    has none.
    """

    tensors: list[Tensor]
    base: Tensor | None
    start: int
    counts: dict[str, int] = field(default_factory=dict)
    extra: list[Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


Partial = TypeVar("Partial")
Result = TypeVar("Result")


class Pass(ABC, Generic[Partial, Result]):
    """One streaming look at a tensor (or, for model-wide statistics, at all of them).

    ``map`` is called on pieces, in any order; ``fold`` combines partials in piece order; ``finish`` gives what
    the method asked for. The result must not depend on where the pieces were cut: sums go over fixed blocks
    (`mergekit_lr.statistics`), counts are integers. A pass that sets ``sample`` sees only that many elements at a
    few places spread over each tensor; it may guide later passes but must not decide a result.
    """

    sample: ClassVar[int | None] = None

    @abstractmethod
    def map(self, call: Call, piece: Piece) -> Partial: ...

    @abstractmethod
    def fold(self, total: Partial | None, partial: Partial) -> Partial: ...

    @abstractmethod
    def finish(self, total: Partial) -> Result: ...


Statistics = Generator[Pass[Any, Any], Any, Any]
"""A method yields passes and is sent their results; what it returns is the ``state`` given to `merge`."""


@dataclass(frozen=True)
class Source:
    """Where a method comes from."""

    title: str
    arxiv: str | None = None
    url: str | None = None

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else (self.url or "")


class Declared(ABC):
    """What a recipe and the registry know of a method, whatever it does with tensors.

    Class attributes: ``name`` (as recipes say it), ``summary`` (one line), ``source``, ``base``, ``min_models``
    and ``max_models`` (counted without a base that is only a reference), ``commutes`` (the order of models does
    not matter), ``stochastic``, ``settings`` (keys of a recipe that only some methods use, and this one does:
    ``calibration``, ``names``, ``permutations``) and ``required_settings`` (those it cannot do without),
    ``followed_by`` (the parameter that may name a method to run afterwards, whose parameters stand beside this one's
    own), ``Merge`` and ``PerModel`` (parameter models).

    A concrete method is a `Method` (one function on pieces of one tensor of every model) or a
    `mergekit_lr.rewrite.Rewrite` (it decides itself which tensors the output has).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[Source]
    base: ClassVar[Base]
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    commutes: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    settings: ClassVar[frozenset[str]] = frozenset()
    required_settings: ClassVar[frozenset[str]] = frozenset()
    followed_by: ClassVar[str | None] = None

    class Merge(Parameters):
        """Parameters of the whole merge."""

    class PerModel(Parameters):
        """Parameters of each model."""

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        """Combinations of parameters that make no sense, in words; checked before any tensor is read."""
        return []


class Method(Declared):
    """A merge method that works on one tensor of every model at a time. Subclasses live one to a file in ``methods/``.

    ``exposes_nonfinite``: every NaN or infinity of an input reaches the output, so the engine may check the output
    alone. ``companion``: files that are read beside the weights.
    """

    exposes_nonfinite: ClassVar[bool] = False
    companion: ClassVar[Companion | None] = None

    def space(self, has_base: bool) -> Space:
        """The space the method takes and gives."""
        if self.base is Base.REQUIRED or (self.base is Base.OPTIONAL and has_base):
            return Space.DELTA
        return Space.WEIGHT

    def slicing(self, merge: Any) -> Slicing:
        """How tensors may be cut, given the `Merge` parameters."""
        return Slicing.ELEMENTWISE

    def model_statistics(self, calls: Sequence[Call]) -> Statistics | None:
        """Passes over *all* merged tensors, before any is written; None where the method needs none.

        ``calls`` holds one call for every tensor that the method will merge, in output order; the passes see
        them in that order.
        """
        return None

    def statistics(self, call: Call, model_state: Any) -> Statistics | None:
        """Passes over this tensor; None where one look is enough. Returns the ``state`` of `merge`."""
        return None

    def coefficients(self, call: Call, state: Any) -> list[float] | None:
        """c where the merge is nothing but ``sum_i c_i x_i`` with one number for each model; else None.

        The engine then forms the sum itself, in one pass over all inputs, in the space that the method declares.
        """
        return None

    @abstractmethod
    def merge(self, call: Call, piece: Piece, state: Any) -> Tensor:
        """The merged piece, fp32, same shape, in the declared space. Inputs must not be changed."""

    def wants_companion(self, call: Call) -> bool:
        """Whether the tensor should have companions at all; asked only of a method that declares some."""
        return True

    def misfits(self, call: Call) -> list[str]:
        """What is wrong with one call now that its base, shape and companions are known, in words."""
        return []

    def remarks(self, calls: Sequence[Call]) -> list[str]:
        """What a user should know of a merge that is legal; one line each, shown as warnings."""
        return []
