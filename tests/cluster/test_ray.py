"""Merges on a Ray cluster that loses nodes and drivers: the bytes of one process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lr import merge
from mergekit_lr.cluster import crew
from mergekit_lr.errors import CheckpointError, NonFiniteError, ResourceError, UsageError

from ..engine.conftest import draw
from ..experts.conftest import TEXTS, write_model
from ..experts.moe_models import tiny
from .conftest import Nodes

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the cluster of the tests is made of processes of this machine"),
    # Ray's own clients leave sockets, files and processes to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]

SHAPES = {f"model.layers.{i}.w.weight": (60, 100) for i in range(16)}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A dense merge with statistics of the whole model, a reduction that calibrates, a bundle."""
    work = tmp_path_factory.mktemp("models")
    models = [write(work / f"m{i}", draw(i, shapes=SHAPES)) for i in range(3)]
    mixture = write_model(tiny("qwen3_moe", vocab_size=1536), work / "mixture")
    return {
        "dense": {
            "merge_method": "ties",
            "base_model": models[0],
            "models": [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in models[1:]],
            "parameters": {"threshold_scope": "model"},
        },
        "moe": {
            "merge_method": "m_smoe",
            "models": [{"model": str(mixture)}],
            "parameters": {"num_experts": 3},
            "calibration": {"text": [str(TEXTS[0])], "samples": 4, "sequence_length": 32},
        },
        "bundle": {
            "merge_method": "tall_masks",
            "base_model": models[0],
            "models": [{"model": m, "name": f"t{i}"} for i, m in enumerate(models[1:])],
        },
    }


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task for every tensor, however small."""
    monkeypatch.setattr(crew, "LEAST", 1)


def files(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    report = json.loads(found["merge_report.json"])
    found["merge_report.json"] = {k: v for k, v in report.items() if k != "run"}
    return found


class Disaster:
    """Progress that replaces a node when the first task is done."""

    def __init__(self, nodes: Nodes, which: int) -> None:
        self.nodes, self.which, self.before, self.seen = nodes, which, None, False

    def __call__(self, event: Any) -> None:
        if self.before is None:
            self.before = event.done_bytes
        if event.done_bytes > self.before and not self.seen and event.done_bytes < event.total_bytes:
            self.seen = True
            self.nodes.replace_one(self.which)


def lose_a_node(nodes: Nodes, recipe: dict[str, Any], work: Path, which: int = 0) -> None:
    disaster = Disaster(nodes, which)
    merge(recipe, work / "out", device="cpu", shard_size=50_000, ray=nodes.address, progress=disaster)
    assert disaster.seen
    merge(recipe, work / "local", device="cpu", shard_size=50_000)
    assert files(work / "out") == files(work / "local")
    assert not (work / "out.partial").exists()


@pytest.mark.parametrize("kind", ["dense", "bundle", pytest.param("moe", marks=pytest.mark.slow)])
def test_a_node_dies_and_another_joins(nodes: Nodes, recipes: Any, tmp_path: Path, kind: str) -> None:
    lose_a_node(nodes, recipes[kind], tmp_path)


DRIVER = """
import json, sys, time
from mergekit_lr import merge
from mergekit_lr.checkpoint import fs
from mergekit_lr.cluster import crew
crew.LEAST = 1
fs.set_hook(lambda operation, path: time.sleep(0.3 if operation == "append" else 0))
merge(json.loads(sys.argv[1]), sys.argv[2], device="cpu", shard_size=50_000, ray=sys.argv[3])
"""


def lose_the_driver(nodes: Nodes, recipe: dict[str, Any], work: Path, lines: int = 3) -> None:
    out, journal = work / "out", work / "out.partial" / "journal"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(recipe), str(out), nodes.address], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(UsageError, match=f"another run is writing.*process {driver.pid}"):
        merge(recipe, out, device="cpu", shard_size=50_000, ray=nodes.address)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not out.exists()
    before = journal.read_bytes()
    merge(recipe, out, device="cpu", shard_size=50_000, ray=nodes.address)
    assert before.count(b"\n") < len(json.loads((out / "merge_report.json").read_bytes())["tensors"])
    merge(recipe, work / "local", device="cpu", shard_size=50_000)
    assert files(out) == files(work / "local")


def test_the_driver_is_killed_and_started_again(nodes: Nodes, recipes: Any, tmp_path: Path) -> None:
    lose_the_driver(nodes, recipes["dense"], tmp_path)


def test_what_keeps_a_node_out(nodes: Nodes, recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mergekit_lr

    def run(out: str = "early") -> None:
        merge(recipes["dense"], tmp_path / out, device="cpu", ray=nodes.address)

    with monkeypatch.context() as m:
        m.setattr(mergekit_lr, "__version__", "9.9")
        with pytest.raises(UsageError, match=r"node .*: nodes differ in mergekit_lr \(0\.1\.0 there, 9\.9 where"):
            run()
    with monkeypatch.context() as m:
        m.setattr(crew, "PROBE", "elsewhere")
        with pytest.raises(ResourceError, match=r"not shared with this node.*every node has under the same path"):
            run()
    with monkeypatch.context() as m:
        m.setattr(crew, "PROCESS", 1 << 60)
        with pytest.raises(ResourceError, match=r"no node of the cluster can run a task.*--max-memory"):
            run("out")
    with monkeypatch.context() as m:
        m.setattr(crew, "plan_digest", lambda plan: "another")
        with pytest.raises(CheckpointError, match=r"plans another merge than the driver.*same inputs"):
            run("out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "early.partial").exists()


def test_an_error_in_a_task_is_the_error_of_the_run(nodes: Nodes, tmp_path: Path) -> None:
    bad = draw(1, shapes=SHAPES)
    bad["model.layers.7.w.weight"][3, 4] = torch.nan
    models = [write(tmp_path / "good", draw(0, shapes=SHAPES)), write(tmp_path / "bad", bad)]
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models],
    }
    with pytest.raises(NonFiniteError, match=r"layers\.7\.w.*holds 1 values.*index 304") as e:
        merge(recipe, tmp_path / "out", device="cpu", ray=nodes.address)
    assert e.value.fix
    recipe["nonfinite"] = "warn"
    report = merge(recipe, tmp_path / "out", device="cpu", ray=nodes.address, resume=False).report
    assert any("model.layers.7" in w for w in report["warnings"])


def test_without_ray_and_with_what_does_not_go_with_it(
    recipes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        ({"part": "1/2", "workers": 2}, "not done on Ray"),
        ({"threads": 2, "ray": "auto"}, "one thread"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(UsageError, match=message):
            merge(recipes["dense"], tmp_path / "out", device="cpu", **options)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray is not installed; pip install 'mergekit-lr\[ray\]'"):
        merge(recipes["dense"], tmp_path / "out", device="cpu", workers=2)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(20))
def test_nodes_and_drivers_die(nodes: Nodes, recipes: Any, tmp_path: Path, turn: int) -> None:
    """Twenty runs: all three kinds, another node each time, or the driver after some records."""
    kind = ("dense", "moe", "bundle")[turn % 3]
    if turn % 4 == 3:
        lose_the_driver(nodes, recipes[kind], tmp_path, lines=2 + turn // 4)
    else:
        lose_a_node(nodes, recipes[kind], tmp_path, which=turn % 2)


@pytest.mark.slow
def test_workers_of_this_machine_listen_on_loopback_only(recipes: Any, tmp_path: Path) -> None:
    """In a process of its own: this one is connected to another cluster."""
    recipe = json.dumps(recipes["dense"])
    done = subprocess.run([sys.executable, "-c", LOCAL, recipe, str(tmp_path / "out")], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    listening = json.loads(done.stdout)
    assert listening and set(listening) <= LOOPBACK, listening
    merge(recipes["dense"], tmp_path / "local", device="cpu")
    assert files(tmp_path / "out") == files(tmp_path / "local")


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
"""127.0.0.1 as /proc/net/tcp writes it, and in its form in tcp6."""

LOCAL = """
import json, os, sys
from pathlib import Path
from mergekit_lr import merge

def children(pid):
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += children(int(child))
    return found

def listening():
    inodes = set()
    for pid in children(os.getpid()):
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            try: inodes.add(os.readlink(fd))
            except OSError: pass
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]

found = []
merge(json.loads(sys.argv[1]), sys.argv[2], device="cpu", workers=2, progress=lambda e: found.extend(listening()))
print(json.dumps(sorted(set(found))))
"""
