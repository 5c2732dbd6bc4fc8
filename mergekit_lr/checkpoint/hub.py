"""Models on the Hugging Face Hub: only the files that a merge needs, pinned to the commit they were taken at.

All traffic goes through huggingface_hub, which honours HF_HUB_OFFLINE, HF_HOME and HF_TOKEN; no token is read,
stored or printed here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_lr.checkpoint.model import SHARD_NAME, read_weight_map
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.retry import Interrupted, is_offline, patiently
from mergekit_lr.errors import CheckpointError, ResourceError

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
_BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of one file: its size, and the sha256 of a large one or git's own digest of a small one."""

    name: str
    size: int
    sha256: str | None = None
    git: str | None = None

    def matches(self, path: Path) -> str:
        """What is wrong with a local copy, in words; empty where nothing is."""
        size = path.stat().st_size
        if size != self.size:
            return f"it has {size} bytes, and on the Hub {self.size}"
        if self.sha256 is not None:
            return "" if digest_of(path, hashlib.sha256()) == self.sha256 else "its sha256 is not what the Hub says"
        if self.git is not None:
            found = digest_of(path, hashlib.sha1(b"blob %d\0" % size))
            return "" if found == self.git else "its content is not what the Hub says"
        return ""


def digest_of(path: Path, digest: hashlib._Hash) -> str:
    """Hex of ``digest`` after a file's bytes."""
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(
    place: Place,
    *,
    cache: Path | None = None,
    adapter: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    hint: str = "",
) -> tuple[Path, str]:
    """Download what is not in the cache yet; the snapshot folder and the commit it belongs to.

    Weights are what the index names, or ``model.safetensors``, or every safetensors file at the top level;
    pickled weights only if allowed and there are no others. With ``verify`` all of them are compared with the
    digests that the Hub states.

    Raises:
        CheckpointError: there is no such model or revision, or it is gated, or not in the cache of an offline machine.
        ResourceError: the Hub did not deliver; the same command goes on.
    """
    small = snapshot(place, SMALL_FILES, cache, hint)
    # The commit is pinned now: what comes after must be of the same one, even if the branch moves meanwhile.
    pinned = Place(place.path, small.name)
    for wanted in _weight_patterns(small, adapter, allow_pickle):
        folder = snapshot(pinned, wanted, cache, hint)
        found = sorted({p.name for pattern in wanted for p in folder.glob(pattern)})
        if found or (folder / INDEX).exists():
            _complete(folder, wanted, pinned)
            if verify:
                check_cached(pinned, folder, [*found, *_config_files(folder)], cache, hint)
            return folder, folder.name
    return small, small.name


def _config_files(folder: Path) -> list[str]:
    return [n for n in ("config.json", INDEX) if (folder / n).exists()]


def _complete(folder: Path, wanted: Iterable[str], place: Place) -> None:
    """Every file that was asked for by name must be there: huggingface_hub is content with a cache that lacks some."""
    missing = [name for name in wanted if "*" not in name and not (folder / name).exists()]
    if missing and is_offline():
        raise CheckpointError(
            f"{missing[0]!r} is not in the cache",
            where=str(place),
            why=f"HF_HUB_OFFLINE is set or --offline given, and {len(missing)} files are missing",
            fix="leave it out once to download",
        )
    if not missing or not SHARD_NAME.fullmatch(missing[0]):
        return
    absent = sorted(set(missing) - set(listing(place)))
    if absent:
        raise CheckpointError(
            f"shard {absent[0]!r} is missing on the Hub",
            where=str(place),
            why=f"{len(absent)} files that its index names are not in the repository",
            fix="choose another revision, or tell its owner",
        )
    raise ResourceError(
        f"{missing[0]!r} did not arrive",
        where=str(place),
        why=f"{len(missing)} files are missing in the cache",
        fix="run the same command again: what was fetched is kept",
    )


def check_cached(place: Place, folder: Path, names: Iterable[str], cache: Path | None, hint: str) -> None:
    """Compare cached files with the digests that the Hub states; fetch again, once, what differs.

    Offline, the cache itself says what a file's digest should be: a blob is called by it.

    Raises:
        CheckpointError: a file still differs.
    """
    stated = {} if is_offline() else listing(place, hint)
    for name in names:
        known = stated.get(name) or _called(folder / name)
        if known is None or not known.matches(folder / name):
            continue
        if not is_offline():
            snapshot(place, (name,), cache, hint, again=True)
        wrong = known.matches(folder / name)
        if wrong:
            raise CheckpointError(
                f"{name!r} is damaged",
                where=str(place),
                why=wrong,
                fix="remove it from the cache and download it again",
            )


def _called(path: Path) -> RemoteFile | None:
    """What a blob of the cache should hold by its name."""
    blob = path.resolve()
    digest, size = blob.name, blob.stat().st_size
    if len(digest) == 64:
        return RemoteFile(path.name, size, sha256=digest)
    return RemoteFile(path.name, size, git=digest) if len(digest) == 40 else None


def listing(place: Place, hint: str = "", *, nested: bool = False) -> Mapping[str, RemoteFile]:
    """The files at the top level of a repository, by name, from one request; with ``nested`` those in folders too."""
    from huggingface_hub import HfApi

    info = patiently(
        place,
        lambda: HfApi().model_info(place.path, revision=place.revision, files_metadata=True, timeout=60),
        hint=hint,
    )
    found = {}
    for f in info.siblings or []:
        if nested or "/" not in f.rfilename:
            sha256 = f.lfs.sha256 if f.lfs is not None else None
            git = f.blob_id if f.lfs is None else None
            found[f.rfilename] = RemoteFile(f.rfilename, -1 if f.size is None else f.size, sha256, git)
    return found


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


def snapshot(place: Place, patterns: Iterable[str], cache: Path | None, hint: str, *, again: bool = False) -> Path:
    """Folder of the cache that holds a commit's top-level files that match, fetched where they are missing.

    With ``again`` they are fetched although they are there.
    """
    from huggingface_hub import snapshot_download

    wanted = list(patterns)

    def get() -> Path:
        folder = Path(
            snapshot_download(
                place.path,
                revision=place.revision,
                cache_dir=cache,
                allow_patterns=wanted,
                ignore_patterns=["*/*"],
                force_download=again,
            )
        )
        if again and not is_offline() and not all((folder / n).exists() for n in wanted):
            raise Interrupted("the Hub did not deliver it again")
        return folder

    return patiently(place, get, hint=hint)
