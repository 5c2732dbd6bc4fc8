"""Races of forked processes for one output; prints one line of JSON. Run by `test_races`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from driver import digest
from jobs import ties

from mergekit_lr import merge, verify
from mergekit_lr.checkpoint import fs
from mergekit_lr.engine import lock
from mergekit_lr.errors import MergekitLrError


def break_the_lock() -> None:
    """As on a file system that grants every lock, with processes that cannot be asked."""
    fs.try_lock = lambda path: os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    lock.is_alive = lambda holder: False
    lock.FolderLock.release = _forget  # type: ignore[method-assign]


def _forget(self: lock.FolderLock) -> None:
    if self._fd is not None:
        os.close(self._fd)
        self._fd = None


def main(work: Path, times: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    inputs = work / "inputs"
    inputs.mkdir()
    recipe = ties(inputs)
    recipes = [{**recipe, "seed": i if options.get("different") else 0} for i in range(4)]
    wanted = []
    for i, one in enumerate(recipes):
        merge(one, work / f"alone{i}", device="cpu", threads=1, shard_size=25_000)
        wanted.append(digest(work / f"alone{i}"))
    if options.get("broken"):
        break_the_lock()
    counts = {"races": 0, "winners": 0, "content": 0, "refused": 0}
    random = Random(5)
    for race in range(times):
        folder = work / f"race{race}"
        folder.mkdir()
        out = folder / "out"
        count = random.choice([2, 3, 4])
        delays = [random.choice([0.0, random.uniform(0, 0.03)]) for _ in range(count)]
        pids = [_start(recipes[i], out, delays[i], folder / f"said{i}") for i in range(count)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
        said = [(folder / f"said{i}").read_text() for i in range(count)]
        # Refused (2) or overtaken (5): a clean error either way.
        assert set(codes) <= {0, 2, 5}, (race, codes, said)
        # One put it there. Another that was asked for the very same may come, see that it is there, and be content.
        won = [i for i in range(count) if said[i] == "put it there"]
        content = [i for i in range(count) if said[i] == "found it there"]
        assert len(won) == 1 and codes[won[0]] == 0, (race, codes, said)
        assert not (content and options.get("different")), (race, codes, said)
        assert digest(out) == wanted[won[0]], race
        assert not verify(out).problems, (race, verify(out).problems)
        if not options.get("broken"):
            assert not (folder / "out.partial").exists(), (race, codes, said, list((folder / "out.partial").iterdir()))
        counts["races"] += 1
        counts["winners"] += len(won)
        counts["content"] += len(content)
        counts["refused"] += count - len(won) - len(content)
        shutil.rmtree(folder)
    print(json.dumps(counts))


def _start(recipe: dict[str, Any], out: Path, delay: float, said: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code, renamed, rename = 0, [], fs.rename

    def watched(old: Path, new: Path) -> None:
        rename(old, new)
        renamed.extend([new] if new == out else [])

    fs.rename = watched
    try:
        time.sleep(delay)
        merge(recipe, out, device="cpu", threads=1, shard_size=25_000)
        said.write_text("put it there" if renamed else "found it there")
    except MergekitLrError as e:
        code = e.exit_code
        said.write_text(str(e))
    except BaseException:
        code = 1
        said.write_text(traceback.format_exc())
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
