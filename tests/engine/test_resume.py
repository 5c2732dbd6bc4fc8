"""A merge killed at every single file operation, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_lr import merge
from mergekit_lr.errors import UsageError

from ..killing import killed_everywhere

ACTION = """
from mergekit_lr import merge

def act(out):
    merge({recipe!r}, out, device="cpu", threads=1, shard_size=25_000, overwrite={overwrite})
"""


@pytest.mark.parametrize("overwrite", ["fresh", "overwrite"])
def test_killed_at_every_operation_and_resumed(make, random_tensors, tmp_path, overwrite):
    shapes = {"a.weight": (40, 30), "b.weight": (200, 64), "c.weight": (300,)}
    models = [make(f"m{i}", random_tensors(i, shapes=shapes)) for i in range(3)]
    entries = [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.4}} for m in models[1:]]
    recipe = {"merge_method": "ties", "base_model": str(models[0]), "models": entries}
    again = overwrite == "overwrite"
    action = ACTION.format(recipe=recipe, overwrite=again)
    assert killed_everywhere(action, tmp_path / "work", overwrite=again) > 25


@pytest.fixture
def interrupted(make, random_tensors, tmp_path, monkeypatch):
    """A recipe and an output whose first run failed after three tensors."""
    from mergekit_lr.engine.execute import Worker

    a, b = make("a", random_tensors(0)), make("b", random_tensors(1))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in (a, b)],
    }
    original, ran = Worker.run, []

    def failing(self, unit):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(unit)
        original(self, unit)

    with monkeypatch.context() as m:
        m.setattr(Worker, "run", failing)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out", device="cpu", threads=1)
    assert not (tmp_path / "out").exists()
    return recipe, tmp_path / "out", a


def count_units(monkeypatch) -> list[object]:
    from mergekit_lr.engine.execute import Worker

    original, ran = Worker.run, []
    monkeypatch.setattr(Worker, "run", lambda self, unit: (ran.append(unit), original(self, unit))[1])
    return ran


def test_a_resumed_run_does_only_what_is_left(interrupted, monkeypatch, tmp_path, load):
    recipe, out, _ = interrupted
    ran = count_units(monkeypatch)
    merge(recipe, out, device="cpu")
    assert len(ran) == 4  # of 7
    merge(recipe, tmp_path / "whole", device="cpu")
    a, b = load(out), load(tmp_path / "whole")
    assert all(a[n].equal(b[n]) for n in b)


def test_damage_to_finished_work_is_noticed_and_done_again(interrupted, monkeypatch, tmp_path, load):
    recipe, out, _ = interrupted
    shard = tmp_path / "out.partial" / "model" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    data[header + 5] ^= 1  # inside the first tensor
    shard.write_bytes(data)
    ran = count_units(monkeypatch)
    merge(recipe, out, device="cpu")
    assert len(ran) == 5
    merge(recipe, tmp_path / "whole", device="cpu")
    a, b = load(out), load(tmp_path / "whole")
    assert all(a[n].equal(b[n]) for n in b)


def test_a_torn_journal_line_costs_one_unit(interrupted, monkeypatch, tmp_path):
    recipe, out, _ = interrupted
    journal = tmp_path / "out.partial" / "journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    ran = count_units(monkeypatch)
    merge(recipe, out, device="cpu")
    assert len(ran) == 5


@pytest.mark.parametrize("change", ["recipe", "input", "shards"])
def test_a_changed_run_is_not_resumed(interrupted, change):
    recipe, out, a = interrupted
    options = {}
    if change == "recipe":
        recipe["models"][0]["parameters"]["weight"] = 0.6
    elif change == "input":
        os.utime(a / "model.safetensors", ns=(1, 1))
    else:
        options["shard_size"] = 20_000
    with pytest.raises(UsageError, match=r"unfinished work.*changed since: .*--restart"):
        merge(recipe, out, device="cpu", **options)
    merge(recipe, out, device="cpu", resume=False, **options)
    assert not out.with_name("out.partial").exists()


def test_a_live_run_keeps_others_out(interrupted, tmp_path):
    recipe, out, _ = interrupted
    lock = tmp_path / "out.partial" / "lock"
    from mergekit_lr.engine.lock import began, this_process

    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        lock.write_text(json.dumps(this_process() | {"pid": holder.pid, "began": began(holder.pid)}))
        for resume in (True, False):
            with pytest.raises(UsageError, match=f"another run.*process {holder.pid}"):
                merge(recipe, out, device="cpu", resume=resume)
        assert lock.exists()
    finally:
        holder.kill()
        holder.wait()
    merge(recipe, out, device="cpu")  # its owner is dead: the lock does not count


def test_no_parent_and_no_permission(make, random_tensors, tmp_path: Path):
    from mergekit_lr.errors import ResourceError

    a = make("a", random_tensors(0))
    recipe = {"merge_method": "linear", "models": [{"model": str(a), "parameters": {"weight": 1.0}}]}
    with pytest.raises(ResourceError, match="parent folder does not exist"):
        merge(recipe, tmp_path / "no" / "out", device="cpu")
