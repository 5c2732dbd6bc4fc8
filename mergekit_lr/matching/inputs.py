"""The models of a recipe as alignment needs them: a permutation spec each, tensors that fit, and readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mergekit_lr.arch.spec import spec_for
from mergekit_lr.arch.symmetry import Axis, SymmetrySpec
from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.matching.member import Read
from mergekit_lr.matching.saved import saved_choice
from mergekit_lr.matching.soft import check_widths
from mergekit_lr.matching.vocabulary import ROWS, row_map, take_rows


def spec_of(permutations: str | None, model: Checkpoint) -> SymmetrySpec:
    """The spec that a recipe asks for, for one of its models."""
    choice = permutations or "auto"
    if choice.endswith(".safetensors"):
        choice = saved_choice(Path(choice))
    shapes = {n: t.shape for n, t in model.tensors.items()}
    return spec_for(choice, shapes, model.config, model.reference)


def specs_of(
    permutations: str | None, models: Sequence[Checkpoint], *, widths: bool = True
) -> tuple[SymmetrySpec, ...]:
    """One spec for each model: all the same where ``widths`` must agree.

    Raises:
        CheckpointError: with every misfit between the models.
    """
    first = spec_of(permutations, models[0])
    check_inputs(first, models, widths=widths)
    found = [first, *(first if widths else spec_of(permutations, m) for m in models[1:])]
    for spec, model in zip(found[1:], models[1:], strict=True):
        if not widths:
            check_widths(first, spec, model.reference)
            _check_fixed(first, spec, model, own_tokens=row_map(models[0], model) is not None)
    return tuple(found)


def _check_fixed(first: SymmetrySpec, spec: SymmetrySpec, model: Checkpoint, *, own_tokens: bool) -> None:
    """Where axes may differ in width, what does not move along them must still agree."""

    def fixed(axis: Axis) -> list[list[int]]:
        return [[f.size for f in section if f.group is None] for section in axis]

    for name, (entry, _) in first.of_tensor.items():
        for i, (a, b) in enumerate(zip(entry.axes, spec.of_tensor[name][0].axes, strict=True)):
            if fixed(a) != fixed(b) and not (own_tokens and i == 0 and name in ROWS):
                raise CheckpointError(
                    f"axis {i} of the tensor {name!r} has another length than in the first model",
                    where=model.reference,
                    why=f"{fixed(b)} places that no group moves, and {fixed(a)} there",
                    fix="merge models with the same inputs, outputs and heads; only neurons can be mixed",
                )


def check_inputs(spec: SymmetrySpec, models: Sequence[Checkpoint], *, widths: bool = True) -> None:
    """Every model must have the first one's tensors, in its shapes, and numbers that can be averaged.

    Without ``widths``, only as many axes.

    Raises:
        CheckpointError: with every misfit.
    """
    problems = []
    first = models[0]
    for model in models:
        for name in sorted(set(first.tensors) ^ set(model.tensors)):
            problems.append(f"{model.reference}: tensor {name!r} is in only one of it and {first.reference}")
        for name, info in first.tensors.items():
            found = model.tensors.get(name)
            rows = name in ROWS and model is not first and row_map(first, model) is not None
            shape = info.shape[rows:], None if found is None else found.shape[rows:]
            if found is not None and (shape[0] != shape[1] if widths else len(info.shape) != len(found.shape)):
                problems.append(
                    f"{model.reference}: tensor {name!r} has shape {list(found.shape)} where {first.reference} has "
                    f"{list(info.shape)}; permutations need equal widths and depths. Neurons of other widths can be "
                    "mixed by optimal transport: set the parameter `matching: transport`"
                )
            elif found is not None and found.dtype not in AVERAGED and spec.of_tensor[name][0].groups():
                problems.append(
                    f"{model.reference}: tensor {name!r} is stored as {found.dtype} and cannot be matched; "
                    "convert the checkpoint to float16, bfloat16 or float32 first"
                )
    if problems:
        raise join_problems(CheckpointError, problems[:50])


class Reader:
    """Whole tensors in their stored dtype; all of them are kept once read if the model has at most ``keep`` bytes.

    ``rows``: take token rows in this order, see `vocabulary.row_map`.
    """

    def __init__(self, model: Checkpoint, keep: int, rows: Tensor | None = None) -> None:
        self.model, self.rows = model, rows
        self._keeps = sum(t.nbytes for t in model.tensors.values()) <= keep
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        info = self.model.tensors[name]
        tensor = self.model.read(name, 0, info.numel).reshape(info.shape)
        if self.rows is not None and name in ROWS:
            tensor = take_rows(tensor, self.rows)
        if self._keeps:
            self._kept[name] = tensor
        return tensor


class Table(Mapping[str, Tensor]):
    """A model's tensors as a mapping that reads when asked."""

    def __init__(self, names: Sequence[str], read: Read) -> None:
        self.names, self._read = list(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
