"""Ctrl-C on the real engine, from the outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

from mergekit_lr import merge
from mergekit_lr.engine import portion

# Every file operation takes 20 ms, so that there is a middle to interrupt.
SLOWED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
from mergekit_lr.checkpoint import fs
fs.set_hook(lambda operation, path: time.sleep(0.02))
from mergekit_lr.cli import main
sys.argv = ["mergekit-lr", "merge", *sys.argv[1:]]
main()
"""


def test_interrupted_runs_stop_all_workers_and_resume(make, random_tensors, tmp_path):
    shapes = {f"model.layers.{i}.w.weight": (100, 100) for i in range(60)}
    models = [str(make(f"m{i}", random_tensors(i, shapes=shapes))) for i in range(2)]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models],
    }
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe))
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "journal"
    for _ in range(3):
        run = subprocess.Popen(
            [sys.executable, "-c", SLOWED, str(path), str(out), "--threads", "2", "--device", "cpu"],
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines + 3:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, messages = run.communicate(timeout=60)
        assert run.returncode == 130, messages
        assert "run the same command again" in messages
        assert not out.exists()
        assert not (tmp_path / "out.partial" / "lock").exists()
    subprocess.run(
        [sys.executable, "-c", "from mergekit_lr.cli import main; main()", "merge", str(path), str(out), "--quiet"],
        check=True,
        timeout=60,
    )
    merge(recipe, tmp_path / "undisturbed", device="cpu")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "undisturbed" / "model.safetensors").read_bytes()


def test_no_worker_is_left_when_the_work_is_over(monkeypatch):
    """One that still frees its buffers while the interpreter ends takes the process down (exit code 134)."""
    ended = []

    def slow_to_leave(job, todo, failures, finished):
        finished.set()
        time.sleep(0.2)
        ended.append(threading.current_thread())

    monkeypatch.setattr(portion, "work", slow_to_leave)
    job = SimpleNamespace(stop=threading.Event(), done_bytes=0)
    portion.threads_drain(job, deque(), 3, lambda done: None)
    assert len(ended) == 3
    assert not any(thread.is_alive() for thread in ended)
