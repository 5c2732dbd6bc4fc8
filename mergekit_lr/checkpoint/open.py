"""From a model reference to an opened checkpoint: folder, single file, Hub id, each with or without a LoRA adapter.

A local path wins over a Hub id of the same spelling. Nothing of a model is executed: no remote code, and a pickle
only if it is asked for, converted in a confined process of its own.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.checkpoint.model import Checkpoint, open_file, open_folder
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.checkpoint.small_files import inside
from mergekit_lr.errors import CheckpointError

if TYPE_CHECKING:
    from mergekit_lr.checkpoint.store import ShardStore

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER_CONFIG = "adapter_config.json"


def open_model(
    reference: ModelReference,
    *,
    allow_pickle: bool = False,
    cache: Path | None = None,
    headers_only: bool = False,
    store: ShardStore | None = None,
    verify: bool = False,
) -> Checkpoint:
    """Open what a reference names, reading headers only.

    ``cache`` is where Hub files and converted pickles are kept; by default the Hub's own cache, and for pickles a
    temporary folder that ``close`` removes. ``allow_pickle`` lets ``.bin``/``.pt`` weights be converted. With
    ``headers_only`` the weights of a Hub model are not downloaded, and reading them is an error; with a ``store`` they
    are when they are read, and kept there. ``verify``: what was downloaded is compared with the Hub's digests.

    Raises:
        CheckpointError: the model is missing, damaged, hostile or not available, or its adapter does not fit it.
        ResourceError: the Hub does not deliver.
    """
    base = None
    if (headers_only or store is not None) and _is_remote(reference.model):
        base = _open_remote(reference.model, str(reference), cache, None if headers_only else store)
    base = base or _open_place(reference.model, str(reference), allow_pickle, cache, verify)
    return adapted(base, reference, allow_pickle=allow_pickle, cache=cache, verify=verify)


def adapted(
    base: Checkpoint,
    reference: ModelReference,
    *,
    allow_pickle: bool = False,
    cache: Path | None = None,
    verify: bool = False,
) -> Checkpoint:
    """``base`` with the reference's adapter on it, or as it is where the reference names none.

    Raises:
        CheckpointError: the adapter is missing or does not fit; ``base`` is closed then.
    """
    if reference.adapter is None:
        return base
    try:
        return _adapted(base, reference.adapter, str(reference), allow_pickle, cache, verify)
    except CheckpointError:
        base.close()
        raise


def _open_remote(place: Place, reference: str, cache: Path | None, store: ShardStore | None) -> Checkpoint | None:
    """A Hub model that is not all in the cache: its headers, and its shards in the ``store`` if there is one."""
    from mergekit_lr.checkpoint.remote import look, open_headers

    if store is None:
        return open_headers(place, reference, cache=cache, hint=_hint(place))
    remote = look(place, cache=cache, hint=_hint(place))
    return None if remote is None else store.open(remote, reference)


def local_path(place: Place, *, cache: Path | None = None) -> Path:
    """The local folder or file that a place stands for, its Hub files fetched if it is a Hub id.

    Raises:
        CheckpointError: there is no such path, and it is no Hub id that can be had.
    """
    return _locate(place, cache, adapter=False, allow_pickle=False)[0]


def _locate(
    place: Place, cache: Path | None, *, adapter: bool, allow_pickle: bool, verify: bool = False
) -> tuple[Path, str | None]:
    """Local path and, for a Hub model, the commit it was taken at."""
    path = local(place)
    if exists(path):
        return path, None
    if not _is_remote(place):
        raise _missing(place, path)
    from mergekit_lr.checkpoint.hub import fetch

    return fetch(place, cache=cache, adapter=adapter, allow_pickle=allow_pickle, verify=verify, hint=_hint(place))


def _is_remote(place: Place) -> bool:
    """It names no local path, and is written like ``org/name``."""
    named = place.is_hub_id and "/" in place.path and not place.path.endswith(".safetensors")
    return named and not exists(local(place))


def local(place: Place) -> Path:
    """The local path that a place means if it means one; ``~`` is the home folder where there is one."""
    return Path(os.path.expanduser(place.path))  # noqa: PTH111 (Path.expanduser raises for an unknown user)


def exists(path: Path) -> bool:
    """Whether there is such a path; no error for one that is too long, or may not be looked at."""
    return os.path.exists(path)  # noqa: PTH110


def _hint(place: Place) -> str:
    beside = _neighbours(local(place))
    return f"; on this machine there is {beside[0]}" if beside else ""


def _missing(place: Place, path: Path) -> CheckpointError:
    near = _neighbours(path)
    fix = f"did you mean {' or '.join(near)}?" if near else "give a local path, or a Hub id written org/name"
    return CheckpointError("no such model", where=str(place), why="there is no such file or folder", fix=fix)


def _neighbours(path: Path) -> list[str]:
    """Paths that exist and are spelt almost like this one."""
    parent = next(p for p in path.parents if os.path.isdir(p))  # noqa: PTH112 (Path.is_dir raises for too long a name)
    wanted = path.relative_to(parent).parts[0]
    try:
        names = sorted(p.name for p in parent.iterdir())
    except OSError:  # it may be entered and not listed
        return []
    return [str(parent / n) for n in difflib.get_close_matches(wanted, names, n=2, cutoff=0.6)]


def _open_place(
    place: Place, reference: str, allow_pickle: bool, cache: Path | None, verify: bool = False
) -> Checkpoint:
    path, revision = _locate(place, cache, adapter=False, allow_pickle=allow_pickle, verify=verify)
    if path.is_dir():
        checkpoint = _open_local_folder(path, reference, allow_pickle, cache)
    elif path.suffix in PICKLE_SUFFIXES:
        checkpoint = _open_pickles(path.parent, [path.name], None, reference, allow_pickle, cache)
    else:
        checkpoint = open_file(path, reference)
    checkpoint.revision = revision
    if place.revision is not None and revision is None:
        checkpoint.warnings.append(f"{place}: a local path has no revisions; {place.revision!r} is ignored")
    return checkpoint


def _open_local_folder(folder: Path, reference: str, allow_pickle: bool, cache: Path | None) -> Checkpoint:
    has_safetensors = any(not p.name.startswith("adapter_") for p in folder.glob("*.safetensors"))
    if has_safetensors:
        return open_folder(folder, reference)
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            "this is a LoRA adapter, not a model",
            where=str(folder),
            fix=f"name the model it was trained on first: BASE_MODEL+{folder}",
        )
    from mergekit_lr.checkpoint.pickle import weight_files

    names = weight_files(folder) if folder.is_dir() else []
    if names and allow_pickle:
        return _open_pickles(folder, names, folder, reference, allow_pickle, cache)
    return open_folder(folder, reference)


def _open_pickles(
    parent: Path,
    names: list[str],
    folder: Path | None,
    reference: str,
    allow_pickle: bool,
    cache: Path | None,
) -> Checkpoint:
    if not allow_pickle:
        raise CheckpointError(
            "its weights are pickled, and a pickle can run code",
            where=str(parent / names[0]),
            fix="convert it to safetensors, or allow pickle for this run",
        )
    from mergekit_lr.checkpoint.pickle import open_converted

    return open_converted([inside(parent, n) for n in names], folder, reference, cache)


def _adapted(
    base: Checkpoint, place: Place, reference: str, allow_pickle: bool, cache: Path | None, verify: bool = False
) -> Checkpoint:
    from mergekit_lr.checkpoint.lora import adapt

    path, revision = _locate(place, cache, adapter=True, allow_pickle=allow_pickle, verify=verify)
    if not path.is_dir():
        raise CheckpointError(
            "a LoRA adapter is a folder",
            where=str(path),
            why="its adapter_config.json is needed for the scale",
            fix="point to the folder that holds adapter_config.json",
        )
    if not (path / ADAPTER_CONFIG).exists():
        raise CheckpointError("not a PEFT adapter", where=str(path), why=f"it has no {ADAPTER_CONFIG}")
    adapter = _open_adapter(path, reference, allow_pickle, cache)
    adapter.revision = revision
    try:
        return adapt(base, adapter, path, reference)
    except CheckpointError:
        adapter.close()
        raise


def _open_adapter(folder: Path, reference: str, allow_pickle: bool, cache: Path | None) -> Checkpoint:
    weights = inside(folder, "adapter_model.safetensors")
    if weights.exists():
        return open_file(weights, reference)
    if (folder / "adapter_model.bin").exists():
        return _open_pickles(folder, ["adapter_model.bin"], None, reference, allow_pickle, cache)
    raise CheckpointError("holds no adapter weights", where=str(folder), why="there is no adapter_model.safetensors")
