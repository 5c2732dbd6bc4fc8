"""Merges whose inputs are on the Hub shard by shard, and whose output goes there: the same bytes with less disk."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save

from mergekit_lr.lazy import torch

from ..hub_server import COMMAND, SHA, Fault, Hub, Runner

LAYERS, SHARDS = 6, 3
ELEMENTS = 40_000  # of a tensor, in float32: a shard of two layers has 640 kB, a model 1.9 MB
SHARD = 2 * 2 * 4 * ELEMENTS
OPTIONS = ("--device", "cpu", "--threads", "2", "--quiet", "--shard-size", "650kB")


def model(seed: int, shuffled: bool = False) -> dict[str, bytes]:
    """Six layers in three shards. ``shuffled``: layers lie in other shards than usual."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{i}.{name}.weight": torch.randn(ELEMENTS, generator=g).view(200, 200)
        for i in range(LAYERS)
        for name in ("up", "down")
    }
    weight_map = {}
    files: dict[str, bytes] = {"config.json": json.dumps({"model_type": "toy", "num_hidden_layers": LAYERS}).encode()}
    for s in range(SHARDS):
        name = f"model-{s + 1:05d}-of-{SHARDS:05d}.safetensors"
        layers = (s, s + SHARDS) if shuffled else (2 * s, 2 * s + 1)
        part = {n: t for n, t in tensors.items() if int(n.split(".")[2]) in layers}
        files[name] = save(part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


@pytest.fixture
def home(hub: Hub, tmp_path: Path) -> Path:
    """A folder with a recipe of two models on the Hub, one of them with its layers in other shards."""
    hub.add("org/base", model(1))
    hub.add("org/a", model(2))
    hub.add("org/b", model(3, shuffled=True))
    recipe = "merge_method: task_arithmetic\nbase_model: org/base\nmodels:\n"
    recipe += "".join(f"  - {{model: org/{m}, parameters: {{weight: 0.5}}}}\n" for m in "ab")
    (tmp_path / "recipe.yml").write_text(recipe)
    return tmp_path


def merge(runner: Runner, home: Path, *options: str, out: str = "out", **more: str) -> Any:
    return runner.run(home, COMMAND, "merge", "recipe.yml", out, *OPTIONS, *options, **more)


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {n: d for n, d in files.items() if n.endswith(".safetensors")}


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


def expected(runner: Runner, home: Path) -> dict[str, bytes]:
    """The output of a merge that downloads everything first."""
    done = merge(runner, home, out="whole", HF_HOME=str(home / "other"))
    assert done.returncode == 0, done.stderr
    return content(home / "whole")


def peak(home: Path, done: Any) -> int:
    return int((home / "peak").read_text())


WATCHED = """
import threading, time
from pathlib import Path
from mergekit_lr.checkpoint import fs
most = 0
def look(*_):
    global most
    here = 0
    for p in Path().rglob("*.safetensors*"):
        if "hub" in p.parts or "whole" in p.parts:
            continue
        try:
            here += p.stat().st_size
        except FileNotFoundError:
            pass
    most = max(most, here)
fs.set_hook(look)
try:
    from mergekit_lr.cli import main
    main()
finally:
    look()
    Path("peak").write_text(str(most))
"""


def test_shards_come_and_go_within_the_budget(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    out = sum(map(len, whole.values()))
    one = max(len(d) for d in weights(hub.repositories["org/base"].files).values())
    hub.requests.clear()
    budget = out + 4 * one  # two shards of b at worst, one of each of the others
    done = runner.run(home, WATCHED, "merge", "recipe.yml", "out", *OPTIONS, "--disk-budget", str(budget))
    assert done.returncode == 0, done.stderr
    assert content(home / "out") == whole
    assert out < peak(home, done) <= budget
    assert not (home / "out.partial").exists()
    assert not list((home / "hub").rglob("*.safetensors"))  # nothing in the cache
    report = json.loads((home / "out" / "merge_report.json").read_text())
    assert [i["revision"] for i in report["inputs"]] == [hub.repositories["org/base"].commit] * 3


def test_a_budget_that_is_too_small_says_what_is_needed(hub: Hub, runner: Runner, home: Path) -> None:
    done = merge(runner, home, "--disk-budget", "1MB")
    assert done.returncode == 5 and "the disk budget is too small" in done.stderr
    assert not (home / "out").exists()
    assert not any(
        r.storage and r.span is not None and r.span.startswith("bytes=0-") and not r.span.endswith("131071")
        for r in hub.requests
    )
    needed = int(done.stderr.split("--disk-budget ")[-1].split(",")[0])
    planned = json.loads(runner.run(home, COMMAND, "plan", "recipe.yml", "--shard-size", "650kB", "--json").stdout)
    assert planned["least_disk_budget"] == needed > planned["least_disk_budget_pushed"] > SHARD
    assert planned["download"] == sum(len(d) for r in hub.repositories.values() for d in weights(r.files).values())
    again = merge(runner, home, "--disk-budget", str(needed))
    assert again.returncode == 0, again.stderr
    assert merge(runner, home, "--disk-budget", str(needed - 1), out="less").returncode == 5


def test_what_is_cached_is_not_fetched(hub: Hub, runner: Runner, home: Path) -> None:
    cached = merge(runner, home, out="cached")
    assert cached.returncode == 0, cached.stderr
    hub.requests.clear()
    done = merge(runner, home, "--disk-budget", "10MB")
    assert done.returncode == 0, done.stderr
    assert not [r for r in hub.requests if r.storage]
    assert content(home / "out") == content(home / "cached")


def test_a_shard_that_arrives_damaged_is_fetched_again_once(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    hub.requests.clear()
    hub.faults.append(Fault(f"GET /org/a/{SHA}/model-00002.* bytes=0-$", flip=SHARD - 9))
    done = merge(runner, home, "--disk-budget", "10MB")
    assert done.returncode == 0, done.stderr
    spans = [r.span for r in hub.requests if r.storage and "org/a" in r.path and "model-00002" in r.path]
    assert spans.count("bytes=0-") == 2 and content(home / "out") == whole
    hub.faults.append(Fault(f"GET /org/a/{SHA}/model-00002.* bytes=0-$", times=9, flip=SHARD - 9))
    bad = merge(runner, home, "--disk-budget", "10MB", out="bad")
    assert bad.returncode == 4 and "arrives damaged" in bad.stderr and "fetched twice" in bad.stderr
    assert not (home / "bad").exists()


def test_a_connection_that_breaks_is_gone_on_with(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    hub.requests.clear()
    hub.faults.append(Fault(f"GET /org/base/{SHA}/model-00001", times=1, cut=1000))
    hub.faults.append(Fault(f"GET /org/base/{SHA}/model-00003.* bytes=\\d+-$", times=2, cut=200_000))
    done = merge(runner, home, "--disk-budget", "10MB")
    assert done.returncode == 0, done.stderr
    assert content(home / "out") == whole
    spans = [r.span for r in hub.requests if r.storage and "base" in r.path and "model-00003" in r.path]
    assert [s for s in spans if s != "bytes=0-131071"] == ["bytes=0-", "bytes=200000-", "bytes=400000-"]


def test_a_hub_that_is_gone_ends_the_run_resumable(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    hub.faults.append(Fault(f"GET /org/b/{SHA}/model-00003.* bytes=0-$", times=10_000, status=503))
    done = merge(runner, home, "--disk-budget", "4MB")
    assert done.returncode == 5 and "the Hub answered 503" in done.stderr
    assert (home / "out.partial").exists() and not (home / "out").exists()
    hub.faults.clear()
    again = merge(runner, home, "--disk-budget", "4MB")
    assert again.returncode == 0, again.stderr
    assert content(home / "out") == whole


def test_a_kill_at_any_moment_is_resumed(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    for pause in (0.05, 0.15, 0.3):
        pid = runner.start(home, COMMAND, "merge", "recipe.yml", "out", *OPTIONS, "--disk-budget", "4MB")
        time.sleep(pause)
        os.kill(pid, signal.SIGKILL)
        runner.finish()
    done = merge(runner, home, "--disk-budget", "4MB")
    assert done.returncode == 0, done.stderr
    assert content(home / "out") == whole


def test_statistics_of_the_whole_model_fetch_what_they_read(hub: Hub, runner: Runner, home: Path) -> None:
    recipe = (home / "recipe.yml").read_text().replace("task_arithmetic", "ties") + "parameters: {density: 0.3}\n"
    (home / "recipe.yml").write_text(recipe)
    whole = expected(runner, home)
    done = merge(runner, home, "--disk-budget", str(sum(map(len, whole.values())) + 4 * SHARD + 5000))
    assert done.returncode == 0, done.stderr
    assert content(home / "out") == whole


def test_the_output_is_pushed_in_one_commit(hub: Hub, runner: Runner, home: Path) -> None:
    done = merge(runner, home, "--push", "me/merged")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/merged"]
    assert repository.private and len(repository.commits) == 1
    assert done.stdout.split() == ["out", f"me/merged@{repository.commit}"]
    local = {p.name: p.read_bytes() for p in (home / "out").iterdir()}
    assert repository.files == local
    uploads = [r for r in hub.requests if r.method == "PUT"]
    assert len(uploads) == SHARDS and not any(r.token for r in uploads)
    # The same again finds its own output there; another one is refused.
    again = merge(runner, home, "--push", "me/merged", out="again")
    assert again.returncode == 0 and len(repository.commits) == 1 and content(home / "again") == content(home / "out")
    (home / "recipe.yml").write_text((home / "recipe.yml").read_text().replace("0.5", "0.4"))
    other = merge(runner, home, "--push", "me/merged", out="other")
    assert other.returncode == 2 and "holds something already" in other.stderr


def test_pushed_files_leave_the_disk(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    one = max(map(len, whole.values()))
    budget = 8 * one  # less than the four models that pass through it
    done = runner.run(
        home, WATCHED, "merge", "recipe.yml", "out", *OPTIONS, "--push", "me/m", "--disk-budget", str(budget)
    )
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/m"]
    assert weights(repository.files) == whole and len(repository.commits) == 1
    assert done.stdout.split() == [f"me/m@{repository.commit}"]
    assert not (home / "out").exists() and not (home / "out.partial").exists()
    assert peak(home, done) <= budget
    for name, data in repository.files.items():
        (home / name).write_bytes(data)
    with safe_open(home / "model-00001-of-00003.safetensors", "pt") as f:
        assert f.keys()


def test_a_push_that_is_killed_is_resumed_without_uploading_twice(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    options = ("--push", "me/m", "--disk-budget", "5MB")
    hub.faults.append(Fault("POST /api/models/me/m/commit", times=10_000, status=503))
    done = merge(runner, home, *options)
    assert done.returncode == 5 and "cannot push to the Hub" in done.stderr
    assert hub.repositories["me/m"].files == {}  # nothing is visible
    assert hub.count("PUT /upload/") == SHARDS
    hub.faults.clear()
    again = merge(runner, home, *options)
    assert again.returncode == 0, again.stderr
    assert hub.count("PUT /upload/") == SHARDS and weights(hub.repositories["me/m"].files) == whole


def test_an_upload_that_the_hub_lost_is_made_again(hub: Hub, runner: Runner, home: Path) -> None:
    whole = expected(runner, home)
    options = ("--push", "me/m", "--disk-budget", "5MB")
    hub.faults.append(Fault("POST /api/models/me/m/commit", times=10_000, status=503))
    assert merge(runner, home, *options).returncode == 5
    hub.faults.clear()
    hub.objects.pop(next(iter(hub.objects)))
    again = merge(runner, home, *options)
    assert again.returncode == 0, again.stderr
    assert weights(hub.repositories["me/m"].files) == whole


def test_a_repository_is_replaced_when_told_to(hub: Hub, runner: Runner, home: Path) -> None:
    hub.add("me/m", {".gitattributes": b"x", "old.safetensors": b"y", "README.md": b"z"})
    refused = merge(runner, home, "--push", "me/m")
    assert refused.returncode == 2 and "pass --overwrite" in refused.stderr
    done = merge(runner, home, "--push", "me/m", "--overwrite")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/m"].files
    assert "old.safetensors" not in files and files[".gitattributes"] == b"x" and len(weights(files)) == SHARDS


def test_usage(hub: Hub, runner: Runner, home: Path) -> None:
    for options, what in (
        (("--push", "merged"), "no repository to push to"),
        (("--push", "me/m", "--offline"), "cannot be pushed offline"),
        (("--part", "1/2", "--push", "me/m"), "a part has no disk budget and cannot push"),
        (("--disk-budget", "much"), "is not a size"),
    ):
        done = merge(runner, home, *options)
        assert done.returncode == 2 and what in done.stderr, done.stderr


def test_a_method_that_looks_at_all_weights_first(hub: Hub, runner: Runner, home: Path) -> None:
    """What is prepared reads in an order of its own, from several threads: shards are fetched when they are read."""
    recipe = "merge_method: tall_masks\nbase_model: org/base\nmodels:\n"
    recipe += "".join(f"  - {{model: org/{m}, name: {m}}}\n" for m in "ab")
    (home / "recipe.yml").write_text(recipe)
    whole = expected(runner, home)
    budget = sum(map(len, whole.values())) + 4 * SHARD + 5000
    done = runner.run(home, WATCHED, "merge", "recipe.yml", "out", *OPTIONS, "--disk-budget", str(budget))
    assert done.returncode == 0, done.stderr
    assert content(home / "out") == whole
    assert peak(home, done) <= budget


def test_stages_are_streamed_and_one_that_must_be_written_is_refused(hub: Hub, runner: Runner, home: Path) -> None:
    first = "name: first\nmerge_method: linear\nmodels: [{model: org/a}, {model: org/b}]\nparameters: {weight: 1}\n"
    second = "merge_method: linear\nmodels: [{model: first}, {model: org/base}]\nparameters: {weight: 1}\n"
    (home / "recipe.yml").write_text(f"{first}---\n{second}")
    whole = expected(runner, home)
    budget = str(sum(map(len, whole.values())) + 4 * SHARD + 5000)
    done = merge(runner, home, "--disk-budget", budget)
    assert done.returncode == 0, done.stderr
    assert content(home / "out") == whole
    ties = "merge_method: ties\nbase_model: org/base\nparameters: {density: 0.5, weight: 1}\n"
    ties += "models: [{model: org/a}, {model: %s}]\n"
    (home / "recipe.yml").write_text(f"name: first\n{ties % 'org/b'}---\n{ties % 'first'}")
    refused = merge(runner, home, "--disk-budget", budget, out="other")
    assert refused.returncode == 2 and "has to be written whole" in refused.stderr, refused.stderr


def test_an_adapter_on_a_model_that_comes_and_goes(hub: Hub, runner: Runner, home: Path) -> None:
    name = "base_model.model.model.layers.3.up"
    factors = {f"{name}.lora_A.weight": torch.ones(1, 200), f"{name}.lora_B.weight": torch.ones(200, 1)}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    lora = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(factors)}
    hub.add("org/lora", lora)
    recipe = (home / "recipe.yml").read_text().replace("model: org/a,", "model: org/a+org/lora,")
    (home / "recipe.yml").write_text(recipe)
    whole = expected(runner, home)
    done = merge(runner, home, "--disk-budget", str(sum(map(len, whole.values())) + 4 * SHARD + 5000))
    assert done.returncode == 0, done.stderr
    assert content(home / "out") == whole


def test_a_model_of_which_some_shards_are_cached_fetches_the_others(hub: Hub, runner: Runner, home: Path) -> None:
    cached = merge(runner, home, out="cached")
    assert cached.returncode == 0, cached.stderr
    for link in home.rglob("snapshots/*/model-00002-of-00003.safetensors"):
        link.resolve().unlink(missing_ok=True)  # of models with the same shard there may be several links
        link.unlink()
    hub.requests.clear()
    done = merge(runner, home, "--disk-budget", "10MB")
    assert done.returncode == 0, done.stderr
    assert {r.path.rsplit("/", 1)[1] for r in hub.requests if r.storage} == {"model-00002-of-00003.safetensors"}
    assert content(home / "out") == content(home / "cached")


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, runner: Runner, home: Path) -> None:
    hub.faults.append(Fault("POST /api/models/me/m/commit", cut=0))
    done = merge(runner, home, "--push", "me/m")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/m"]
    assert len(repository.commits) == 1 and hub.faults[0].times == 0
    assert done.stdout.split() == ["out", f"me/m@{repository.commit}"]
    assert repository.files == {p.name: p.read_bytes() for p in (home / "out").iterdir()}


def test_a_commit_of_somebody_else_meanwhile_is_no_answer_to_ours(hub: Hub, runner: Runner, home: Path) -> None:
    """The first try fails before anything is done, and a file of another's is there: ours is committed, whole."""
    hub.add("me/m", {".gitattributes": b"x", "model-00001-of-00003.safetensors": b"theirs"})
    hub.faults.append(Fault("POST /api/models/me/m/commit", status=503))
    done = merge(runner, home, "--push", "me/m", "--overwrite")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/m"].files
    assert len(hub.repositories["me/m"].commits) == 1 and weights(files) == content(home / "out")


def test_a_report_that_is_none_of_ours_is_something_already(hub: Hub, runner: Runner, home: Path) -> None:
    for report in (b"no JSON", b"[1]"):
        hub.add("me/m", {"merge_report.json": report})
        done = merge(runner, home, "--push", "me/m")
        assert done.returncode == 2 and "'merge_report.json' among them" in done.stderr
    assert hub.repositories["me/m"].commits == []


def test_a_shard_that_the_hub_wants_within_the_commit(hub: Hub, runner: Runner, home: Path) -> None:
    hub.faults.append(Fault("POST .*/preupload", times=99, change=lambda data: data.replace(b'"lfs"', b'"regular"')))
    done = merge(runner, home, "--push", "me/m")
    assert done.returncode == 0, done.stderr
    assert hub.count("PUT /upload/") == 0
    assert hub.repositories["me/m"].files == {p.name: p.read_bytes() for p in (home / "out").iterdir()}
