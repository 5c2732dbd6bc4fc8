"""Workers as forked processes: the same bytes, errors brought home, nobody left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from mergekit_lr import merge
from mergekit_lr.engine import processes
from mergekit_lr.engine.execute import Worker
from mergekit_lr.errors import NonFiniteError, ResourceError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked workers are used on Linux only")


@pytest.fixture
def forked(monkeypatch):
    """Fork however little there is to do."""
    monkeypatch.setattr(processes, "FORK_FROM", 0)


@pytest.fixture
def recipe(make, random_tensors):
    shapes = {f"model.layers.{i}.w.weight": (200, 100) for i in range(12)}
    models = [str(make(f"m{i}", random_tensors(i, shapes=shapes))) for i in range(3)]
    entries = [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in models[1:]]
    return {"merge_method": "ties", "base_model": models[0], "models": entries}


def test_processes_write_the_bytes_that_threads_write(recipe, tmp_path, monkeypatch):
    merge(recipe, tmp_path / "threads", device="cpu", threads=2)
    monkeypatch.setattr(processes, "FORK_FROM", 0)
    for workers in (2, 5):
        seen = []
        out = tmp_path / f"processes-{workers}"
        report = merge(recipe, out, device="cpu", threads=workers, progress=seen.append).report
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "threads" / "model.safetensors").read_bytes()
        assert report["tensors"] == json.loads((tmp_path / "threads" / "merge_report.json").read_text())["tensors"]
        assert seen[-1].done_bytes == seen[-1].total_bytes


MODEL_WIDE = {"threshold_scope": "model"}


def test_model_wide_statistics_of_processes_give_the_bytes_of_threads(recipe, tmp_path, monkeypatch):
    recipe["parameters"] = MODEL_WIDE
    merge(recipe, tmp_path / "threads", device="cpu", threads=2)
    monkeypatch.setattr(processes, "FORK_FROM", 0)
    ran = []
    gather = processes.in_order
    monkeypatch.setattr(processes, "in_order", lambda *a: ran.append(a[3]) or gather(*a))
    for workers in (2, 5):
        out = tmp_path / f"processes-{workers}"
        merge(recipe, out, device="cpu", threads=workers)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "threads" / "model.safetensors").read_bytes()
    assert {2, 5} <= set(ran)


def test_a_failing_pass_is_reported_and_leaves_nobody_behind(recipe, tmp_path, forked, monkeypatch):
    from mergekit_lr.magnitudes import Collect

    recipe["parameters"] = MODEL_WIDE
    parent, look = os.getpid(), Collect.map

    def fail(self, call, piece):
        if ".7." in call.name and os.getpid() != parent:
            raise NonFiniteError("no good", where=call.name, fix="mend it")
        return look(self, call, piece)

    monkeypatch.setattr(Collect, "map", fail)
    with pytest.raises(NonFiniteError, match=r"layers\.7\.w.*no good.*mend it"):
        merge(recipe, tmp_path / "out", device="cpu", threads=2)
    monkeypatch.setattr(Collect, "map", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ResourceError, match="signal 9"):
        merge(recipe, tmp_path / "out", device="cpu", threads=2)
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "out").exists()


def test_workers_that_still_send_end_when_nobody_listens():
    class Idle:
        device, warnings = "cpu", ()

        def forked(self, stop):
            pass

    results = processes.in_order(Idle(), 50, lambda worker, i: bytes(1 << 20), 3)  # far more than a pipe holds
    assert len(next(results)) == 1 << 20
    results.close()
    assert multiprocessing.active_children() == []


def test_errors_of_a_worker_are_raised_here_as_they_are(recipe, make, random_tensors, tmp_path, forked):
    import torch

    shapes = {f"model.layers.{i}.w.weight": (200, 100) for i in range(12)}
    bad = random_tensors(5, shapes=shapes)
    bad["model.layers.7.w.weight"][3, 4] = torch.nan
    recipe["models"].append({"model": str(make("bad", bad)), "parameters": {"weight": 1.0}})
    with pytest.raises(NonFiniteError, match=r"bad: tensor 'model.layers.7.w.weight' holds 1 values.*index 304 ") as e:
        merge(recipe, tmp_path / "out", device="cpu", threads=2)
    assert e.value.fix
    assert not (tmp_path / "out").exists()
    recipe["nonfinite"] = "warn"
    report = merge(recipe, tmp_path / "out", device="cpu", threads=2, resume=False).report
    assert any("model.layers.7" in w for w in report["warnings"])


def test_a_killed_worker_is_an_error_that_can_be_resumed(recipe, tmp_path, forked, monkeypatch):
    original = Worker.run

    def dying(self: Worker, unit: object) -> None:
        if unit.sink == 5:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, unit)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Worker, "run", dying)
        with pytest.raises(ResourceError, match=r"worker process ended before its work \(signal 9\).*resumes"):
            merge(recipe, tmp_path / "out", device="cpu", threads=2)
    merge(recipe, tmp_path / "out", device="cpu", threads=2)
    merge(recipe, tmp_path / "undisturbed", device="cpu", threads=1)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "undisturbed" / "model.safetensors"
    ).read_bytes()


SLOWED = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
from mergekit_lr import merge
from mergekit_lr.checkpoint import fs
from mergekit_lr.engine import processes
processes.FORK_FROM = 0
fs.set_hook(lambda operation, path: time.sleep(0.2))
merge(json.loads(sys.argv[1]), sys.argv[2], device="cpu", threads=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_the_run(recipe, tmp_path, how):
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal"
    run = subprocess.Popen([sys.executable, "-c", SLOWED, json.dumps(recipe), str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(how)
    run.wait(timeout=30)
    time.sleep(0.3)
    before = journal.read_bytes()
    time.sleep(0.5)
    assert journal.read_bytes() == before
    assert not out.exists()
    merge(recipe, out, device="cpu", threads=1)
    merge(recipe, tmp_path / "undisturbed", device="cpu", threads=1)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "undisturbed" / "model.safetensors").read_bytes()
