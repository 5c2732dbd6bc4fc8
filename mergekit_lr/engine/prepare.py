"""What some methods must find out before their output can be laid out: done once, kept, resumed."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine.beside import files_beside
from mergekit_lr.engine.memory import available_cpus, default_limit
from mergekit_lr.engine.plan import Settings
from mergekit_lr.engine.progress import Progress, ProgressEvent
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Preparation, Rewrite

if TYPE_CHECKING:
    from mergekit_lr.cluster.crew import Crew

FOLDER = "prepared"


def preparation_of(recipe: Recipe, inputs: dict[str, Checkpoint], settings: Settings) -> dict[str, Any]:
    """What decides the prepared files. Under another fingerprint they are not used."""
    from mergekit_lr import __version__

    source = inspect.getsource(inspect.getmodule(type(recipe.method)) or type(recipe.method))
    return {
        "version": __version__,
        "recipe": recipe.digest(),
        "method": hashlib.sha256(source.encode()).hexdigest(),
        "inputs": {m: c.identity() for m, c in inputs.items()},
        "files": files_beside(recipe, inputs),
        "device": settings.device.partition(":")[0],
    }


def run_preparation(
    recipe: Recipe,
    inputs: dict[str, Checkpoint],
    settings: Settings,
    space: Workspace,
    progress: Progress | None,
    crew: Crew | None = None,
) -> Path:
    """Let the method prepare in the claimed ``space``, for its ``preparation``; the folder with what it found out.

    With a ``crew`` one of its nodes does it.

    Raises:
        UsageError: the folder holds what another run prepared.
    """
    folder = space.root / FOLDER
    space.match(space.root / "prepared.json", space.preparation, (folder,))
    fs.make_folder(folder)
    if crew is not None:
        return crew.prepare(folder)
    prepare_in(folder, recipe, inputs, settings, progress)
    return folder


def prepare_in(
    folder: Path,
    recipe: Recipe,
    inputs: dict[str, Checkpoint],
    settings: Settings,
    progress: Progress | None,
) -> None:
    """Let the method prepare in a folder that is there."""
    assert isinstance(recipe.method, Rewrite)

    def tell(done: int, total: int, stage: str) -> None:
        if progress is not None:
            progress(ProgressEvent(done, total, stage))

    recipe.method.prepare(
        Preparation(
            recipe=recipe,
            inputs=inputs,
            folder=folder,
            device=settings.device,
            limit=settings.limit or default_limit(),
            threads=settings.threads or available_cpus(),
            tell=tell,
        )
    )
