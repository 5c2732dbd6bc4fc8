"""A model to the Hub, file by file while it is made, visible all at once: content first, one commit at the end.

The repository is created private if there is none; one that exists keeps its visibility. Until the commit nobody can
load anything, and what was uploaded is found again by a resumed run through its sha256. All traffic goes through
huggingface_hub; the token is read by it alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.hub import RemoteFile, listing
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.remote import requested
from mergekit_lr.checkpoint.retry import patiently
from mergekit_lr.errors import UsageError

REPORT = "merge_report.json"
KEPT = frozenset({".gitattributes"})
"""What stays when a repository's content is replaced."""

DOING = "push to the Hub"


@dataclass(frozen=True)
class Uploaded:
    """A file whose content the Hub has, under no name yet."""

    file: str
    sha256: str
    size: int

    def record(self) -> dict[str, Any]:
        return {"file": self.file, "sha256": self.sha256, "size": self.size}


def parse_target(text: str) -> Place:
    """``org/name`` as a place to push to.

    Raises:
        UsageError: it is not written so.
    """
    place = Place(text)
    if not place.is_hub_id or text.count("/") != 1:
        raise UsageError(f"{text!r} is no repository to push to", fix="write it as org/name")
    return place


class Repository:
    """One model repository that a run writes to."""

    def __init__(self, place: Place) -> None:
        from huggingface_hub import HfApi

        self.place, self.api = place, HfApi()

    def claim(self, *, overwrite: bool, fingerprint: str) -> bool:
        """Create it, private, unless it exists; True where this very run has been committed to it before.

        Raises:
            UsageError: it holds something else already, and ``overwrite`` was not given.
            CheckpointError, ResourceError: the Hub refuses, or does not answer.
        """
        patiently(self.place, lambda: self.api.create_repo(self.place.path, private=True, exist_ok=True), doing=DOING)
        there = set(listing(self.place, nested=True)) - KEPT
        if REPORT in there and self.report().get("fingerprint") == fingerprint:
            return True
        if there and not overwrite:
            raise UsageError(
                "the repository holds something already",
                where=self.place.path,
                why=f"{len(there)} files, {min(there)!r} among them",
                fix="choose another name, or pass --overwrite to replace them",
            )
        return False

    def report(self) -> dict[str, Any]:
        """The merge report that is in the repository; empty where it is none of ours."""

        def get() -> bytes:
            with requested(self.place, REPORT, "bytes=0-") as response:
                return bytes(response.read())

        try:
            found = json.loads(patiently(self.place, get, doing=DOING))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def revision(self) -> str:
        """The commit that the repository is at."""
        info = patiently(self.place, lambda: self.api.model_info(self.place.path, timeout=60), doing=DOING)
        return str(info.sha)

    def upload(self, path: Path) -> Uploaded | None:
        """Send a large file's content; None where the Hub wants it within the commit, as it does small files."""
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path))
        patiently(self.place, lambda: self.api.preupload_lfs_files(self.place.path, additions=[operation]), doing=DOING)
        if operation._upload_mode != "lfs":
            return None
        return Uploaded(path.name, operation.upload_info.sha256.hex(), operation.upload_info.size)

    def has(self, files: Iterable[Uploaded]) -> set[str]:
        """The names of those whose content the Hub still has."""
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        asked = list(files)
        if not asked:
            return set()
        infos = [UploadInfo(sha256=bytes.fromhex(f.sha256), size=f.size, sample=b"") for f in asked]

        def ask() -> set[str]:
            actions, _, _ = post_lfs_batch_info(
                upload_infos=infos, token=None, repo_type="model", repo_id=self.place.path
            )
            return {a["oid"] for a in actions if not a.get("actions")}

        there = patiently(self.place, ask, doing=DOING)
        return {f.file for f in asked if f.sha256 in there}

    def commit(self, uploaded: Iterable[Uploaded], small: Mapping[str, bytes | Path], message: str) -> str:
        """Make all of it visible under its names, and nothing else, in one commit; returns the commit."""
        from huggingface_hub import CommitOperationDelete

        large = {f.file: f for f in uploaded}

        def make() -> str:
            before = listing(self.place, nested=True)
            if self._same(before, large, small):  # the answer to an earlier try was lost
                return self.revision()
            gone = sorted(set(before) - KEPT - large.keys() - small.keys())
            operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in gone]
            operations += [_known(f) for f in large.values()]
            operations += [_added(name, content) for name, content in small.items()]
            made = self.api.create_commit(self.place.path, operations=operations, commit_message=message)
            return str(made.oid)

        return patiently(self.place, make, doing=DOING)

    def _same(
        self, before: Mapping[str, RemoteFile], large: Mapping[str, Uploaded], small: Mapping[str, bytes | Path]
    ) -> bool:
        if set(before) - KEPT != {*large, *small}:
            return False
        return all(before[n].sha256 == f.sha256 for n, f in large.items()) and all(
            _matches(before[n], content) for n, content in small.items()
        )


def _matches(stated: RemoteFile, content: bytes | Path) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    if stated.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == stated.sha256
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == stated.git


def _known(file: Uploaded) -> Any:
    """An addition of content that the Hub has; what `preupload_lfs_files` leaves of one, made again from a record."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(path_in_repo=file.file, path_or_fileobj=b"")
    operation.upload_info = UploadInfo(sha256=bytes.fromhex(file.sha256), size=file.size, sample=b"")
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation


def _added(name: str, content: bytes | Path) -> Any:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(
        path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content)
    )
