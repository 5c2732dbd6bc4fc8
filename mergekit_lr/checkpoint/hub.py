"""Models on the Hugging Face Hub: only the files that a merge needs, pinned to the commit they were taken at.

All traffic goes through huggingface_hub, which honours HF_HUB_OFFLINE, HF_HOME and HF_TOKEN; no token is read,
stored or printed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_lr.checkpoint.model import read_weight_map
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.errors import CheckpointError

SMALL_FILES = (
    "*.json",
    "tokenizer*",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
)
"""Everything of a model but its weights. Code, images and other formats are never fetched."""

INDEX = "model.safetensors.index.json"
_PICKLE_INDEX = "pytorch_model.bin.index.json"


def fetch(
    place: Place, *, cache: Path | None = None, adapter: bool = False, allow_pickle: bool = False, hint: str = ""
) -> tuple[Path, str]:
    """Download what is not in the cache yet; the snapshot folder and the commit it belongs to.

    Weights are what the index names, or ``model.safetensors``, or every safetensors file at the top level;
    pickled weights only if allowed and there are no others.

    Raises:
        CheckpointError: the Hub cannot be reached and the cache has not got it, or there is no such model or
            revision, or it is gated.
    """
    small = snapshot(place, SMALL_FILES, cache, hint)
    # The commit is pinned now: what comes after must be of the same one, even if the branch moves meanwhile.
    pinned = Place(place.path, small.name)
    for wanted in _weight_patterns(small, adapter, allow_pickle):
        folder = snapshot(pinned, wanted, cache, hint)
        if any(next(folder.glob(pattern), None) for pattern in wanted):
            return folder, folder.name
    return small, small.name


def _weight_patterns(folder: Path, adapter: bool, allow_pickle: bool) -> Iterable[tuple[str, ...]]:
    if adapter:
        yield ("adapter_model.safetensors",)
        if allow_pickle:
            yield ("adapter_model.bin",)
        return
    if (folder / INDEX).exists():
        yield tuple(read_weight_map(folder / INDEX))
        return
    yield ("model.safetensors",)
    yield ("*.safetensors",)
    if allow_pickle:
        if (folder / _PICKLE_INDEX).exists():
            yield tuple(read_weight_map(folder / _PICKLE_INDEX, "bin"))
        else:
            yield ("pytorch_model.bin",)


def snapshot(place: Place, patterns: Iterable[str], cache: Path | None, hint: str) -> Path:
    """Folder of the cache that holds a commit's top-level files that match, fetched where they are missing."""
    from huggingface_hub import snapshot_download

    with explained(place, hint):
        folder = snapshot_download(
            place.path,
            revision=place.revision,
            cache_dir=cache,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    return Path(folder)


@contextmanager
def explained(place: Place, hint: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a CheckpointError that says what to do."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def failed(why: str, fix: str) -> CheckpointError:
        return CheckpointError(
            "cannot get the model", where=str(place), why=f"no such local path, and {why}{hint}", fix=fix
        )

    try:
        yield
    except GatedRepoError as e:
        raise failed("on the Hub it is gated", "ask for access on its page, and set HF_TOKEN") from e
    except RevisionNotFoundError as e:
        raise failed(f"the Hub has no revision {place.revision!r} of it", "check the revision") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise failed("the Hub has no such model, or shows it only to some", "check the name, or set HF_TOKEN") from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:
        if constants.HF_HUB_OFFLINE:
            raise failed("HF_HUB_OFFLINE is set and the cache has not got it", "unset it once to download") from e
        raise failed("the Hub cannot be reached and the cache has not got it", "check the connection") from e
    except (HfHubHTTPError, errors.HTTPError) as e:  # type: ignore[attr-defined]
        raise failed(f"the Hub did not deliver it ({type(e).__name__})", "try again later") from e
    except OSError as e:
        raise failed(f"its files could not be stored ({e.strerror or type(e).__name__})", "check the cache") from e
