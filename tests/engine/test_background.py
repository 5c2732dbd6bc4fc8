"""What is fetched and sent while a batch is merged, and what is looked at before a file leaves the disk."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import save_file

from mergekit_lr import merge
from mergekit_lr.engine import streaming
from mergekit_lr.engine.plan import planned
from mergekit_lr.engine.progress import ProgressEvent
from mergekit_lr.engine.streaming import _Beside, _check_disk, _Progress, check_shard
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import ResourceError, VerificationError

EVENT = ProgressEvent(1, 2, "merging")


def test_it_begins_with_the_first_event_and_is_waited_for():
    began, go, seen = threading.Event(), threading.Event(), []

    def fetch(check: Any) -> None:
        began.set()
        assert go.wait(20)
        seen.append("fetched")

    beside = _Beside([fetch, lambda check: seen.append("sent")])
    tick = beside.at_first(lambda event: None)
    assert not began.is_set()
    tick(EVENT)
    assert began.wait(20)
    tick(EVENT)  # once is enough
    assert seen == []
    go.set()
    beside.join()
    assert seen == ["fetched", "sent"]


def test_without_any_event_it_is_done_at_the_end():
    """A batch of which nothing was left to merge tells nothing, and its files must go all the same."""
    where: list[threading.Thread] = []
    _Beside([lambda check: where.append(threading.current_thread())]).join()
    assert where == [threading.current_thread()]


@pytest.mark.parametrize("ticks", [0, 1])
def test_its_failure_is_the_runs(ticks: int):
    later = []

    def fail(check: Any) -> None:
        raise ResourceError("the Hub is gone", fix="try again")

    beside = _Beside([fail, lambda check: later.append(1)])
    tick = beside.at_first(lambda event: None)
    for _ in range(ticks):
        tick(EVENT)
    with pytest.raises(ResourceError, match="the Hub is gone"):
        beside.join()
    assert later == []


def test_when_the_run_fails_it_leaves_off_and_says_nothing():
    began, sent = threading.Event(), []

    def send(check: Any) -> None:
        for number in range(100_000):
            began.set()
            check()
            sent.append(number)
            threading.Event().wait(0.001)

    beside = _Beside([send])
    beside.at_first(lambda event: None)(EVENT)
    assert began.wait(20)
    beside.stop()
    done = len(sent)
    assert done < 100_000
    threading.Event().wait(0.02)
    assert len(sent) == done
    beside.join()  # no error of its own


def test_stopping_what_never_began_is_nothing():
    ran = []
    beside = _Beside([lambda check: (check(), ran.append(1))])
    beside.stop()
    beside.join()
    assert ran == []


def test_progress_of_fetching_adds_up_over_batches():
    seen: list[ProgressEvent] = []
    tell = _Progress(seen.append)
    tell.fetching(10)
    tell.merging(EVENT)
    tell.fetching(5)
    assert seen == [ProgressEvent(10, 10, "fetching"), EVENT, ProgressEvent(15, 15, "fetching")]
    silent = _Progress(None)
    silent.fetching(10)
    silent.merging(EVENT)


def test_a_file_that_holds_something_else_is_not_sent(make, random_tensors, tmp_path):
    model = str(make("m", random_tensors(0)))
    recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
    merge(recipe, tmp_path / "out", device="cpu")
    with planned(recipe, device="cpu") as plan:
        check_shard(plan, tmp_path / "out", 0, plan.units)
        tensors = random_tensors(0)
        del tensors["model.norm.weight"]
        save_file(tensors, tmp_path / "out" / "model.safetensors")
        with pytest.raises(VerificationError, match=r"does not hold what was planned.*--restart") as e:
            check_shard(plan, tmp_path / "out", 0, plan.units)
        assert str(tmp_path / "out" / "model.safetensors") in str(e.value)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_smaller_than_the_budget_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Workspace(tmp_path / "out")
    space.root.mkdir()
    held = space.root / "a.safetensors"
    held.write_bytes(bytes(1 << 20))
    allocated = held.stat().st_blocks * 512
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**6))
    assert streaming.shutil is shutil
    _check_disk(space, 10**6 + allocated)  # what is there already need not be found again
    with pytest.raises(ResourceError, match=r"the run needs .* of disk.*are free.*--disk-budget"):
        _check_disk(space, 10**6 + allocated + 1)
