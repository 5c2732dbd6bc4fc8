"""Methods that decide themselves which tensors the output has: fewer experts, packed bundles, permuted neurons.

Where a `Method` merges one tensor of every model into one of the same shape, a `Rewrite` says what is written
(`Rewrite.outline`, from headers alone) and computes it task by task (`Rewrite.compute`). What must be found out
first, by running a model on text or by looking at all weights, it does once in `Rewrite.prepare` and keeps in files.
The engine still does everything else: reading, slicing, dtypes, journal, resume, digests, commit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from mergekit_lr.method import Declared

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergekit_lr.bundle.manifest import Manifest
    from mergekit_lr.checkpoint.model import Checkpoint
    from mergekit_lr.graph.nodes import Sink, Task
    from mergekit_lr.recipe.schema import Recipe

Kind = Literal["model", "bundle", "adapter"]
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Preparation:
    """What `Rewrite.prepare` works with.

    ``inputs``: every model of the recipe, opened, by the text that the recipe calls it. ``folder``: where decisions
    are kept; whatever is written there must be complete when it has its name (`checkpoint.writer`, `fs.write_file`
    through a rename), must not depend on threads or interruptions, and is found again when the run is resumed.
    ``limit``: bytes of tensors that may be held. ``tell(done, total, stage)`` reports
    progress. Warnings are kept with the decisions and said by the outline, so that a resumed run says them too.
    """

    recipe: Recipe
    inputs: Mapping[str, Checkpoint]
    folder: Path
    device: str
    limit: int
    threads: int
    tell: Tell


@dataclass(frozen=True)
class Outline:
    """The output of a `Rewrite` before anything is computed.

    ``models``: names of the opened inputs by the index that `Source`s use; the first is the one whose config and
    tokenizer the output gets. ``extra``: opened files beside the recipe's models (statistics, prepared tensors), by
    name; they may be used in ``models``. ``sinks``, ``tasks``, ``dropped``: as in `MergeGraph`. ``config``: the whole
    config.json of the output, None for the first model's. ``files``: small files to write beside the tensors.
    ``tokenizer``: the opened input whose tokenizer the output gets, where that is not the first.
    ``kind``: a ``bundle`` keeps config and tokenizer under ``shared/`` and no model at its root; an ``adapter`` is one
    file of tensors, and has neither. ``details``: plain data for ``merge_report.json``. ``card``: Markdown at the end
    of the model card. ``bundle``: what ``bundle.json`` says, but for the digests. ``libraries``: bytes that preparing
    leaves behind by what it imports.
    """

    models: tuple[str, ...]
    sinks: tuple[Sink, ...]
    tasks: tuple[Task, ...] = ()
    dropped: tuple[tuple[str, str, str], ...] = ()
    config: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    extra: Mapping[str, Checkpoint] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""
    bundle: Manifest | None = None
    tokenizer: str | None = None
    libraries: int = 0


class Desk(Protocol):
    """What the engine gives to `Rewrite.compute`: one task's inputs and outputs, and no files.

    ``step``: elements of one tensor that the budget lets a task hold at a time, a multiple of `GRID`.
    """

    step: int
    device: str

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of input ``index``."""
        ...

    def read(
        self, index: int, start: int | None = None, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Input ``index``: whole, in its own shape, or elements ``start .. stop`` of it flattened.

        fp32 unless ``dtype`` is given. Raises NonFiniteError where the recipe forbids NaN and infinity.
        """
        ...

    def room(self, index: int, start: int, stop: int) -> Tensor:
        """Elements ``start .. stop`` to fill and then give to `write`, in the output's dtype: its own place in memory
        where it has one, so that nothing is copied."""
        ...

    def write(self, index: int, tensor: Tensor, start: int = 0) -> None:
        """Elements of output ``index`` from ``start`` on, cast once to its dtype. Ascending, without a hole."""
        ...

    def note(self, facts: Mapping[str, Any]) -> None:
        """Plain data about this task, kept in ``merge_report.json`` under the task's key."""
        ...


class Rewrite(Declared):
    """A method that lays out its own output.

    ``kind``: what it writes. ``prepares``: whether `prepare` does anything. ``reads_bundles``: its models are bundles.
    ``aligns_tokens``: it brings the token rows of models with different tokenizers in one order itself; other methods
    are refused such models.
    """

    kind: ClassVar[Kind] = "model"
    prepares: ClassVar[bool] = False
    aligns_tokens: ClassVar[bool] = False
    reads_bundles: ClassVar[bool] = False

    def prepare(self, work: Preparation) -> None:
        """Find out what must be known before the output can be laid out or computed; keep it in ``work.folder``.

        Called again after an interruption, and again although everything is there: it then does nothing.
        """

    @abstractmethod
    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        """What will be written, from headers and from what was prepared.

        ``prepared`` is None when a merge is only planned: what is not known yet must then be said in a warning.

        Raises:
            CheckpointError: the inputs do not fit each other or the method.
        """

    @abstractmethod
    def compute(self, task: Task, desk: Desk) -> None:
        """Write every element of every output of one task. Must not depend on ``desk.step``."""

    def files(self, recipe: Recipe, report: Mapping[str, Any]) -> dict[str, bytes]:
        """Small files that can only be written when all tensors are; ``report`` is the finished merge report."""
        return {}


def model_order(recipe: Recipe) -> list[str]:
    """Every model of a recipe by name, the one that config and tokenizer come from first."""
    names = [str(recipe.config_source), *(str(r) for r in recipe.references())]
    return list(dict.fromkeys(names))
