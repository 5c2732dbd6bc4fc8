"""One shard from the Hub to a file of ours: what is gone on with, what is begun anew, what is never given its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from ..hub_server import SHA, Fault, Hub, Runner

PROGRAM = """
import hashlib, json, os, sys
from pathlib import Path
from mergekit_lr.checkpoint.hub import RemoteFile
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.transfer import download, is_whole
from mergekit_lr.errors import MergekitLrError
commit, size, sha256, listens = json.loads(sys.argv[1])
target, told = Path("shard"), []
file = RemoteFile("model.safetensors", size, sha256)
try:
    download(Place("org/name", commit), file, target, told.append if listens else None)
    print(json.dumps({"told": sum(told), "whole": is_whole(target, file, compare=True)}))
except MergekitLrError as e:
    print(json.dumps({"error": str(e), "code": e.exit_code, "fix": e.fix}))
"""

STORED = f"GET /org/name/{SHA}/model"
DATA = bytes(range(256)) * 2000


@pytest.fixture
def shard(hub: Hub) -> bytes:
    hub.add("org/name", {"model.safetensors": DATA})
    return DATA


def fetch(runner: Runner, home: Path, size: int = len(DATA), listens: bool = True) -> dict[str, Any]:
    question = json.dumps([SHA, size, hashlib.sha256(DATA).hexdigest(), listens])
    done = runner.run(home, PROGRAM, question)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def spans(hub: Hub) -> list[str | None]:
    return [r.span for r in hub.requests if r.storage]


def there(home: Path) -> list[str]:
    return sorted(p.name for p in home.iterdir() if p.name.startswith("shard"))


@pytest.mark.parametrize(
    ("left", "asked", "told"),
    [
        (DATA[:1000], ["bytes=1000-"], len(DATA) - 1000),  # gone on with
        (DATA, [], 0),  # whole, and only not yet compared and named when the run was stopped
        (DATA + b"more", ["bytes=0-"], len(DATA)),  # of another file
        (b"x" + DATA[1:], ["bytes=0-"], len(DATA)),  # whole and damaged
    ],
    ids=["begun", "whole", "too long", "damaged"],
)
def test_what_an_earlier_run_left(
    hub: Hub, runner: Runner, tmp_path: Path, shard: bytes, left: bytes, asked: list[str], told: int
) -> None:
    (tmp_path / "shard.incomplete").write_bytes(left)
    assert fetch(runner, tmp_path) == {"told": told, "whole": True}
    assert spans(hub) == asked
    assert there(tmp_path) == ["shard"] and (tmp_path / "shard").read_bytes() == shard


def test_a_server_that_ignores_ranges_sends_the_file_from_its_start(
    hub: Hub, runner: Runner, tmp_path: Path, shard: bytes
) -> None:
    hub.ranges = False
    (tmp_path / "shard.incomplete").write_bytes(b"y" * 1000)
    assert fetch(runner, tmp_path, listens=False)["whole"]
    assert spans(hub) == ["bytes=1000-"] and (tmp_path / "shard").read_bytes() == shard


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [(lambda data: data + data, 1, len(DATA)), (lambda data: data[:1000], 1000, 1000)],
    ids=["more", "less"],
)
def test_a_body_of_another_length_than_its_range_is_asked_for_again(
    hub: Hub, runner: Runner, tmp_path: Path, shard: bytes, change: Any, least: int, most: int
) -> None:
    """What came of the file is kept, and nothing beyond its end is written.

    Where a body is too long, all of the file may have come before that is seen.
    """
    hub.faults.append(Fault(STORED, change=change))
    assert fetch(runner, tmp_path)["whole"]
    assert there(tmp_path) == ["shard"] and (tmp_path / "shard").read_bytes() == shard
    first, *again = spans(hub)
    assert first == "bytes=0-" and len(again) <= 1 and (again or most == len(DATA))
    assert all(least <= int(r.removeprefix("bytes=").removesuffix("-")) <= most for r in again)


def test_a_body_that_is_never_whole_ends_resumable(hub: Hub, runner: Runner, tmp_path: Path, shard: bytes) -> None:
    hub.faults.append(Fault(STORED, times=100, change=lambda data: data[:7]))
    answer = fetch(runner, tmp_path)
    assert answer["code"] == 5 and f"the Hub sent 42 of the {len(shard)} bytes of model.safetensors" in answer["error"]
    assert "6 attempts" in answer["error"] and "run the same command again" in answer["fix"]
    assert there(tmp_path) == ["shard.incomplete"] and (tmp_path / "shard.incomplete").read_bytes() == shard[:42]


def test_a_file_of_another_size_than_was_stated_is_refused(
    hub: Hub, runner: Runner, tmp_path: Path, shard: bytes
) -> None:
    answer = fetch(runner, tmp_path, size=len(shard) + 1)
    assert answer["code"] == 4 and "'model.safetensors' has another size than the Hub states" in answer["error"]
    assert f"{len(shard)} and {len(shard) + 1} bytes" in answer["error"]
    assert len(spans(hub)) == 1  # another try would not help
    assert not (tmp_path / "shard").exists()
