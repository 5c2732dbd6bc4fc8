"""A calibration killed at its file operations, and what the next run makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mergekit_lr
from mergekit_lr.checkpoint import fs
from mergekit_lr.errors import UsageError

# The models are built once, before the forks. Tokenizer threads would not survive a fork.
DRIVER = """
import json, os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch
from pathlib import Path
from transformers.utils import logging
from mergekit_lr import calibrate
from mergekit_lr.checkpoint import fs

model, texts, work, every = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "every"
logging.disable_progress_bar()
torch.set_num_threads(1)
os.fsync = lambda fd: None  # the process is killed, not the machine

def run(out, hook=None, progress=None):
    fs.set_hook(hook)
    calibrate(model, out, texts, samples=3, sequence_length=32, similarity_tokens=20, grams=["linear"],
              device="cpu", progress=progress)
    fs.set_hook(None)

def in_child(stop_at, out):
    pid = os.fork()
    if pid == 0:
        count = 0
        def hook(operation, path):
            nonlocal count
            count += 1
            if count == stop_at:
                os._exit(9)
        stages = []
        try:
            run(out, hook, lambda event: stages.append(event.stage))
        except BaseException as e:
            print(type(e).__name__, e, file=sys.stderr)
            os._exit(1)
        (work / "stages").write_text(json.dumps(stages))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

operations = []
reference = work / "reference.safetensors"
run(reference, lambda operation, path: operations.append((operation, Path(path).name)))
wanted = reference.read_bytes()
print(len(operations))
telling = {"rename", "rmtree", "mkdir", "create", "write"}
chosen = [k for k, o in enumerate(operations, 1) if every or o[0] in telling or k % 12 == 0]
skipped = set()
for k in chosen:
    out = work / f"out{k}.safetensors"
    assert in_child(k, out) == 9, k
    if out.exists():
        assert out.read_bytes() == wanted, k
    assert in_child(0, out) == 0, (k, operations[k - 1])
    assert out.read_bytes() == wanted, (k, operations[k - 1])
    assert not out.with_name(out.name + ".partial").exists(), k
    skipped.add(tuple(json.loads((work / "stages").read_text())))
print(json.dumps(sorted(skipped)))
"""


def killed(model: Path, texts: list[Path], work: Path, which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(model), json.dumps([str(t) for t in texts]), str(work), which],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, stages = done.stdout.splitlines()
    assert int(count) > 60
    # What was done is not done again: some runs went on at the second layer, some had none left.
    assert json.loads(stages) == [[], ["layer 1 of 2", "layer 2 of 2"], ["layer 2 of 2"]]


def test_killed_and_resumed(model: Callable[[str], Path], texts: list[Path], tmp_path: Path) -> None:
    """At every operation that makes, names or removes something, and at every twelfth of the others."""
    killed(model("mixtral"), texts, tmp_path, "some")


@pytest.mark.slow
def test_killed_at_every_operation_and_resumed(model: Callable[[str], Path], texts: list[Path], tmp_path: Path) -> None:
    killed(model("mixtral"), texts, tmp_path, "every")


class Stop(Exception):
    """Ends a run in the middle."""


@pytest.fixture
def unfinished(model: Callable[[str], Path], texts: list[Path], tmp_path: Path) -> Path:
    """An output whose run was stopped after the first layer."""
    out = tmp_path / "s.safetensors"

    def hook(operation: str, path: str) -> None:
        if operation == "rename" and path.endswith("layer-00001.safetensors"):
            raise Stop

    fs.set_hook(hook)
    try:
        with pytest.raises(Stop):
            mergekit_lr.calibrate(model("mixtral"), out, texts, samples=3, sequence_length=32, device="cpu")
    finally:
        fs.set_hook(None)
    assert not out.exists()
    return out


def test_another_run_is_refused_and_restart_discards(
    unfinished: Path, model: Callable[[str], Path], texts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="unfinished work there was for another run"):
        mergekit_lr.calibrate(model("mixtral"), unfinished, texts, samples=3, sequence_length=24, device="cpu")
    settings = {"samples": 3, "sequence_length": 24, "device": "cpu"}
    mergekit_lr.calibrate(model("mixtral"), unfinished, texts, **settings, resume=False)
    mergekit_lr.calibrate(model("mixtral"), tmp_path / "other.safetensors", texts, **settings)
    assert unfinished.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


def test_an_existing_output_is_kept_unless_told(
    model: Callable[[str], Path], texts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    out.write_bytes(b"precious")
    settings = {"samples": 3, "sequence_length": 32, "device": "cpu"}
    with pytest.raises(UsageError, match="exists already"):
        mergekit_lr.calibrate(model("mixtral"), out, texts, **settings)
    assert out.read_bytes() == b"precious"
    mergekit_lr.calibrate(model("mixtral"), out, texts, **settings, overwrite=True)
    assert out.read_bytes() != b"precious"
