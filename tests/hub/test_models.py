"""Models from the Hub: what is asked for, what is pinned, what is checked, what errors say."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from mergekit_lr.checkpoint.hub import SMALL_FILES, RemoteFile
from mergekit_lr.lazy import torch

from ..hub_server import COMMAND, SHA, Fault, Hub, Runner

PROGRAM = """
import json, sys
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import CheckpointError, MergekitLrError
out = []
for text, options in json.loads(sys.argv[1]):
    try:
        with open_model(ModelReference.parse(text), **options) as c:
            values = {}
            for n, i in c.tensors.items():
                try:
                    values[n] = c.read(n, 0, i.numel).tolist()
                except CheckpointError as e:
                    values[n] = str(e)
            out.append({"revision": c.revision, "values": values, "config": c.config, "changed": c.changed(),
                        "shapes": {n: i.shape for n, i in c.tensors.items()}, "stamps": c.identity(),
                        "kind": type(c).__name__})
    except MergekitLrError as e:
        out.append({"error": str(e), "code": e.exit_code})
print(json.dumps(out))
"""


def ask(runner: Runner, home: Path, *questions: Any, **environment: str) -> list[dict[str, Any]]:
    """Open references in a process of their own; a question is a text, or (text, options)."""
    pairs = [(q, {}) if isinstance(q, str) else q for q in questions]
    done = runner.run(home, PROGRAM, json.dumps(pairs), **environment)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def shard(**values: list[float]) -> bytes:
    data: bytes = save({n: torch.tensor(v) for n, v in values.items()}, metadata={"format": "pt"})
    return data


def sharded() -> dict[str, bytes]:
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "model-1.safetensors": shard(a=[1.0, 2.0]),
        "model-2.safetensors": shard(b=[3.0]),
        "consolidated.safetensors": shard(z=[9.0]),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "README.md": b"---\nlicense: mit\n---\n",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"evil",
        "picture.png": b"x" * 1000,
        "onnx/model.safetensors": b"evil",
        "original/tokenizer.model": b"x",
    }


def test_only_what_is_needed_is_fetched_and_the_commit_is_recorded(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    (first, again) = ask(runner, tmp_path, "org/name", f"org/name@{SHA}")
    assert first["values"] == {"a": [1.0, 2.0], "b": [3.0]}
    assert (first["revision"], first["config"]) == (SHA, {"model_type": "llama"})
    assert first["stamps"] == again["stamps"]
    expected = {n for n in sharded() if "/" not in n and not n.endswith((".py", ".bin", ".png"))}
    assert hub.got() == expected - {"consolidated.safetensors"}
    # A later offline run has it all, and asks for nothing.
    hub.requests.clear()
    (offline,) = ask(runner, tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert offline["values"] == first["values"] and offline["revision"] == SHA
    assert hub.requests == []


def test_what_errors_say(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    for name in ("org/name", "org/gated"):
        hub.add(name, sharded())
    hub.add("org/empty", {"config.json": b"{}"})
    hub.gated.add("org/gated")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "names").mkdir()
    missing, gated, revision, empty = ask(runner, tmp_path, "org/nam", "org/gated", "org/name@v9", "org/empty")
    assert "the Hub has no such model" in missing["error"] and "there is org/names" in missing["error"]
    assert "it is gated" in gated["error"] and "HF_TOKEN" in gated["error"]
    assert "no revision 'v9'" in revision["error"]
    assert "holds no weights" in empty["error"]
    (offline,) = ask(runner, tmp_path, "org/name", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
    assert "HF_HUB_OFFLINE is set" in offline["error"]
    assert [a["code"] for a in (missing, gated, revision, empty, offline)] == [4] * 5
    program = PROGRAM.replace(
        "out = []", "from huggingface_hub import constants\nconstants.ENDPOINT = 'http://127.0.0.1:9'\nout = []"
    )
    [unreachable] = json.loads(runner.run(tmp_path, program, json.dumps([("org/other", {})])).stdout)
    assert "cannot be reached" in unreachable["error"] and "run the same command again" in unreachable["error"]
    assert unreachable["code"] == 5


def test_planning_fetches_headers_only(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    big = 1 << 20
    big_files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        ).encode(),
        "model-1.safetensors": save({"a": torch.zeros(big)}),
        "model-2.safetensors": save({"b": torch.zeros(2, big)}, metadata={"x": "y" * 300_000}),
    }
    hub.add("org/big", big_files)
    hub.add("org/one", {"model.safetensors": save({"a": torch.zeros(big)}), "other.safetensors": b"x"})
    only = {"headers_only": True}
    sharded_model, one = ask(runner, tmp_path, ("org/big", only), ("org/one", only))
    assert sharded_model["shapes"] == {"a": [big], "b": [2, big]} and one["shapes"] == {"a": [big]}
    assert sharded_model["kind"] == "RemoteCheckpoint" and sharded_model["revision"] == SHA
    assert "planning only" in sharded_model["values"]["a"] and sharded_model["changed"] == []
    assert hub.sent < 2_000_000  # of 16 MB of weights: at most 128 KiB a file, and one long header


def test_planning_where_the_server_ignores_ranges(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.ranges = False
    hub.add("org/one", {"model.safetensors": save({"a": torch.zeros(8 << 20)})})
    (answer,) = ask(runner, tmp_path, ("org/one", {"headers_only": True}))
    assert answer["shapes"] == {"a": [8 << 20]}
    assert not list(tmp_path.rglob("model.safetensors"))


def test_planning_uses_what_is_cached(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    ask(runner, tmp_path, "org/name")
    (answer,) = ask(runner, tmp_path, ("org/name", {"headers_only": True}), HF_HUB_OFFLINE="1")
    assert answer["kind"] == "Checkpoint" and answer["values"]["a"] == [1.0, 2.0]


def test_hostile_repositories(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    evil_index = json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode()
    hub.add("org/index", {"model.safetensors.index.json": evil_index})
    hub.add("org/liar", {"model.safetensors": b"\xff" * 64})
    hub.add("org/hole", {"model.safetensors": shard(a=[1.0])[:-2]})
    hub.add("org/list", {"model.safetensors": shard(a=[1.0]), "config.json": b"[]"})
    names = ["org/index", "org/liar", "org/hole", "org/list"]
    for options in ({}, {"headers_only": True}):
        answers = ask(runner, tmp_path, *((n, options) for n in names))
        messages = [a["error"] for a in answers]
        assert "plain .safetensors file name" in messages[0]
        assert all("not a sound safetensors file" in m for m in messages[1:3])
        assert "does not hold an object" in messages[3]


def test_adapter_from_the_hub(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/base", {"model.safetensors": save({"m.weight": torch.zeros(3, 2)})})
    factors = {
        "base_model.model.m.lora_A.weight": torch.ones(1, 2),
        "base_model.model.m.lora_B.weight": torch.ones(3, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3}
    lora = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(factors),
        "checkpoint.safetensors": b"not asked for",
    }
    hub.add("org/lora", lora)
    (answer,) = ask(runner, tmp_path, "org/base+org/lora")
    assert answer["values"] == {"m.weight": [3.0] * 6}
    assert "checkpoint.safetensors" not in hub.got()


def test_the_token_stays_with_the_hub(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    ask(runner, tmp_path, ("org/name", {"headers_only": True}), "org/name")
    asked = [r for r in hub.requests if not r.storage and "org/name" in r.path]
    assert len(asked) > 5 and all(r.token for r in asked)
    stored = [r for r in hub.requests if r.storage]
    assert {r.path.rsplit("/", 1)[1] for r in stored} == {"model-1.safetensors", "model-2.safetensors"}
    assert not any(r.token for r in stored)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("api/models", times=2, status=503),
        Fault("api/models", times=1, status=429, headers={"Retry-After": "0"}),
        Fault(r"GET /org/name/main/|GET .*model-1\.safetensors", times=2, cut=3),
        Fault("GET .*model-2", times=1, status=500),
    ],
    ids=["busy", "rate", "cut", "broken"],
)
def test_what_passes_is_tried_again(hub: Hub, runner: Runner, tmp_path: Path, fault: Fault) -> None:
    hub.add("org/name", sharded())
    hub.faults.append(fault)
    (answer,) = ask(runner, tmp_path, ("org/name", {"headers_only": True}))
    assert answer["shapes"] == {"a": [2], "b": [1]} and fault.times == 0


def test_what_does_not_pass_ends_resumable(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    hub.faults.append(Fault("model-2", times=1000, status=503))
    (answer,) = ask(runner, tmp_path, ("org/name", {"headers_only": True}))
    assert answer["code"] == 5 and "the Hub answered 503; 6 attempts" in answer["error"]


def test_a_server_is_given_the_time_it_asks_for(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    hub.faults.append(Fault("api/models", times=1, status=429, headers={"Retry-After": "7"}))
    program = PROGRAM.replace("import json, sys", "import json, sys, time\nslept = []\ntime.sleep = slept.append")
    done = runner.run(tmp_path, program + "print(slept)", json.dumps([("org/name", {"headers_only": True})]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[7.0]"


def test_a_refusal_is_not_tried_again(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/gated", sharded())
    hub.gated.add("org/gated")
    ask(runner, tmp_path, ("org/gated", {"headers_only": True}))
    assert len(hub.requests) <= 2


def test_a_shard_that_the_index_names_and_the_repository_lacks(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    files = sharded()
    del files["model-2.safetensors"]
    hub.add("org/name", files)
    for options in ({}, {"headers_only": True}):
        (answer,) = ask(runner, tmp_path, ("org/name", options))
        assert answer["code"] == 4 and "'model-2.safetensors' is missing on the Hub" in answer["error"]


def test_a_cached_file_that_was_damaged_is_fetched_again(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    (before,) = ask(runner, tmp_path, "org/name")
    [cached] = list(tmp_path.rglob("model-1.safetensors"))
    blob = cached.resolve()
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    (unseen,) = ask(runner, tmp_path, "org/name", HF_HUB_OFFLINE="1")
    assert unseen["values"] != before["values"]  # nobody looks unless told to
    (offline,) = ask(runner, tmp_path, ("org/name", {"verify": True}), HF_HUB_OFFLINE="1")
    assert offline["code"] == 4 and "sha256 is not what the Hub says" in offline["error"]
    (mended,) = ask(runner, tmp_path, ("org/name", {"verify": True}))
    assert mended["values"] == before["values"] and blob.read_bytes() == good


def test_a_file_that_arrives_damaged_twice_is_an_error(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    hub.faults.append(Fault("GET .*model-1", times=100, flip=-1 + len(sharded()["model-1.safetensors"])))
    (answer,) = ask(runner, tmp_path, ("org/name", {"verify": True}))
    assert answer["code"] == 4 and "'model-1.safetensors' is damaged" in answer["error"]


def test_planning_a_hub_recipe_by_command(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    weights = save({"w": torch.zeros(8 << 20)})
    for name in ("org/base", "org/tuned"):
        hub.add(name, {"model.safetensors": weights, "config.json": b"{}"})
    recipe = "merge_method: linear\nmodels: [{model: org/base}, {model: org/tuned}]\nparameters: {weight: 1}\n"
    (tmp_path / "recipe.yml").write_text(recipe)
    done = runner.run(tmp_path, COMMAND, "plan", "recipe.yml", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["download"] == plan["bytes_in"] + 2 * (len(weights) - (32 << 20)) == 2 * len(weights)
    assert hub.sent < 0.01 * len(weights)  # of each model, whole files are never asked for
    offline = runner.run(tmp_path, COMMAND, "plan", "recipe.yml", "--device", "cpu", "--offline")
    assert offline.returncode == 4 and "--offline given" in offline.stderr


def test_patterns_name_no_code() -> None:
    from fnmatch import fnmatch

    for name in ("modeling_x.py", "evil.pkl", "pytorch_model.bin", "x.pt", "run.sh", "model.onnx", "x.gguf"):
        assert not any(fnmatch(name, p) for p in SMALL_FILES)


def test_headers_of_a_model_that_is_partly_in_the_cache(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    (before,) = ask(runner, tmp_path, "org/name")
    forget(tmp_path, "model-2.safetensors")
    hub.requests.clear()
    (planned,) = ask(runner, tmp_path, ("org/name", {"headers_only": True}))
    assert planned["kind"] == "RemoteCheckpoint" and planned["shapes"] == before["shapes"]
    assert [r.span for r in hub.requests if r.storage] == ["bytes=0-131071"]  # of the one that is not there
    assert hub.got() == {"model-2.safetensors"}


def test_offline_a_shard_that_is_not_in_the_cache_is_named(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    ask(runner, tmp_path, "org/name")
    hub.requests.clear()
    for missing in ("model-2.safetensors", "model-1.safetensors"):  # one of two, and both
        forget(tmp_path, missing)
        (answer,) = ask(runner, tmp_path, "org/name", HF_HUB_OFFLINE="1")
        assert answer["code"] == 4 and f"'{missing}' is not in the cache" in answer["error"]
        assert "leave it out once to download" in answer["error"]
    assert hub.requests == []


@pytest.mark.parametrize("cached", [("model-1.safetensors",), ()], ids=["one of two", "none"])
def test_shards_that_did_not_arrive_are_no_fault_of_the_model(
    hub: Hub, runner: Runner, tmp_path: Path, cached: tuple[str, ...]
) -> None:
    """Where the Hub does not answer, huggingface_hub is content with what the cache has of a commit."""
    hub.add("org/name", sharded())
    ask(runner, tmp_path, "org/name")
    for name in {"model-1.safetensors", "model-2.safetensors"} - set(cached):
        forget(tmp_path, name)
    hub.faults.append(Fault("GET /api/models/org/name/tree/", times=1000, status=403))
    (answer,) = ask(runner, tmp_path, "org/name")
    assert answer["code"] == 5 and "did not arrive" in answer["error"]
    assert "run the same command again: what was fetched is kept" in answer["error"]
    hub.faults.clear()
    (again,) = ask(runner, tmp_path, "org/name")
    assert again["values"] == {"a": [1.0, 2.0], "b": [3.0]}


def forget(home: Path, name: str) -> None:
    """Take a file out of the cache, and the list of what belongs there, which older caches do not have."""
    for listed in home.rglob("trees/*.json"):
        listed.unlink()
    [cached] = home.rglob(f"snapshots/*/{name}")
    cached.resolve().unlink()
    cached.unlink()


def test_offline_the_cache_itself_says_what_its_files_should_hold(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    """By the names of its blobs: sha256 for what is large, git's digest for what is small."""
    hub.add("org/name", sharded())
    (before,) = ask(runner, tmp_path, "org/name")
    offline = {"HF_HUB_OFFLINE": "1"}
    (sound,) = ask(runner, tmp_path, ("org/name", {"verify": True}), **offline)
    assert sound["values"] == before["values"]
    [config] = tmp_path.rglob("snapshots/*/config.json")
    config.resolve().write_bytes(config.read_bytes().replace(b"llama", b"lhama"))
    (damaged,) = ask(runner, tmp_path, ("org/name", {"verify": True}), **offline)
    assert damaged["code"] == 4 and "'config.json' is damaged" in damaged["error"]
    assert "its content is not what the Hub says" in damaged["error"]
    # A file that stands there by itself, as on systems without links, has no name that says anything.
    content = sharded()["config.json"]
    config.resolve().unlink()
    config.unlink()
    config.write_bytes(content)
    (unnamed,) = ask(runner, tmp_path, ("org/name", {"verify": True}), **offline)
    assert unnamed["values"] == before["values"]


def test_a_cached_file_that_was_cut_is_fetched_again(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", sharded())
    (before,) = ask(runner, tmp_path, "org/name")
    [cached] = tmp_path.rglob("snapshots/*/model-1.safetensors")
    os.truncate(cached.resolve(), 10)
    (mended,) = ask(runner, tmp_path, ("org/name", {"verify": True}))
    assert mended["values"] == before["values"]
    assert cached.read_bytes() == sharded()["model-1.safetensors"]


def test_what_is_wrong_with_a_local_copy_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    sha256, git = hashlib.sha256(b"abc").hexdigest(), "f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f"  # git hash-object
    assert RemoteFile("f", 4).matches(path) == "it has 3 bytes, and on the Hub 4"
    assert RemoteFile("f", 3).matches(path) == ""  # the Hub states no digest
    assert RemoteFile("f", 3, sha256=sha256).matches(path) == RemoteFile("f", 3, git=git).matches(path) == ""
    path.write_bytes(b"abd")
    assert RemoteFile("f", 3, sha256=sha256).matches(path) == "its sha256 is not what the Hub says"
    assert RemoteFile("f", 3, git=git).matches(path) == "its content is not what the Hub says"


HERE = """
import mergekit_lr.checkpoint.pickle as pickles
import torch
def convert(sources, target, module):  # in this process: another one would first import torch
    pickles.write_plain(torch.load(sources[0], weights_only=True), target)
pickles.convert = convert
"""


def test_pickled_weights_from_the_hub_are_fetched_only_if_asked(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    def saved(**values: list[float]) -> bytes:
        buffer = io.BytesIO()
        torch.save({n: torch.tensor(v) for n, v in values.items()}, buffer)
        return buffer.getvalue()

    hub.add("org/one", {"config.json": b"{}", "pytorch_model.bin": saved(a=[1.0])})
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    index = json.dumps({"weight_map": weight_map}).encode()
    two = {"pytorch_model-1.bin": saved(a=[1.0]), "pytorch_model-2.bin": saved(b=[2.0])}
    hub.add("org/two", {"config.json": b"{}", "pytorch_model.bin.index.json": index, **two, "optimizer.bin": b"x"})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    factors = saved(**{"base_model.model.w.lora_A.weight": [[1.0]], "base_model.model.w.lora_B.weight": [[2.0]]})
    hub.add("org/lora", {"adapter_config.json": json.dumps(config).encode(), "adapter_model.bin": factors})
    hub.add("org/base", {"config.json": b"{}", "model.safetensors": shard(**{"w.weight": [[10.0]]})})  # type: ignore[list-item]
    hub.add("org/nothing", {"adapter_config.json": json.dumps(config).encode()})
    names = ["org/one", "org/two", "org/base+org/lora", "org/base+org/nothing"]

    refused = ask(runner, tmp_path, *names)
    assert ["holds no weights" in a["error"] for a in refused] == [True, True, False, False]
    assert ["holds no adapter weights" in a["error"] for a in refused] == [False, False, True, True]
    assert not any(name.endswith(".bin") for name in hub.got())

    questions = [(name, {"allow_pickle": True}) for name in names]
    done = runner.run(tmp_path, HERE + PROGRAM, json.dumps(questions))
    assert done.returncode == 0, done.stderr
    one, two_, adapted, nothing = json.loads(done.stdout)
    assert one["values"] == {"a": [1.0]} and two_["values"] == {"a": [1.0], "b": [2.0]}
    assert adapted["values"] == {"w.weight": [12.0]} and "holds no adapter weights" in nothing["error"]
    assert "optimizer.bin" not in hub.got()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("GET /api/models", 9, change=lambda d: d.replace(b'"size": 112', b'"size": 113')),
            "states two sizes of one",
        ),
        (
            Fault(f"GET /org/name/{SHA}", 9, headers={"Content-Range": "bytes 0-111/*"}),
            "does not say how large a file is",
        ),
        (Fault(f"GET /org/name/{SHA}", 9, change=lambda d: b"\xff" * len(d)), "not a sound safetensors file"),
        (Fault(f"GET /org/name/{SHA}", 9, change=lambda d: d[:5]), "the Hub sent 5 of 112 bytes; 6 attempts"),
    ],
    ids=["two sizes", "no size", "no length", "less than asked for"],
)
def test_a_header_that_makes_no_sense_is_refused(
    hub: Hub, runner: Runner, tmp_path: Path, fault: Fault, message: str
) -> None:
    weights = shard(a=[1.0, 2.0, 3.0, 4.0])
    assert len(weights) == 112
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": weights})
    hub.faults.append(fault)
    (answer,) = ask(runner, tmp_path, ("org/name", {"headers_only": True}))
    assert message in answer["error"] and answer["code"] == (5 if "attempts" in message else 4)
    assert "model.safetensors" in answer["error"]


def test_planning_a_model_that_is_one_file_and_cached(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": shard(a=[1.0])})
    hub.add("org/parts", {"config.json": b"{}", "a.safetensors": shard(a=[1.0]), "b.safetensors": shard(b=[2.0])})
    (one, parts) = ask(runner, tmp_path, "org/name", "org/parts")
    hub.requests.clear()
    questions = [(n, {"headers_only": True}) for n in ("org/name", "org/parts")]
    assert [a["values"] for a in ask(runner, tmp_path, *questions)] == [one["values"], parts["values"]]
    assert not any(r.storage for r in hub.requests)


def test_code_is_fetched_only_if_it_is_asked_for(hub: Hub, runner: Runner, tmp_path: Path) -> None:
    config = {"model_type": "odd", "auto_map": {"AutoModel": "modeling_odd.Odd"}}
    files = {
        "model.safetensors": shard(a=[1.0]),
        "config.json": json.dumps(config).encode(),
        "modeling_odd.py": b"class Odd: pass\n",
        "nested/more.py": b"",
    }
    hub.add("org/odd", files)
    (tmp_path / "recipe.yml").write_text("merge_method: linear\nmodels: [{model: org/odd}]\nparameters: {weight: 1}\n")
    for out, options in (("plain", ()), ("coded", ("--copy-code",))):
        hub.requests.clear()
        done = runner.run(tmp_path, COMMAND, "merge", "recipe.yml", out, "--device", "cpu", *options)
        assert done.returncode == 0, done.stderr
        asked = [r for r in hub.requests if ".py" in str(r)]
        assert bool(asked) == bool(options) and not any("nested" in str(r) for r in asked)
        assert (tmp_path / out / "modeling_odd.py").exists() == bool(options)
        assert ("auto_map" in json.loads((tmp_path / out / "config.json").read_text())) == bool(options)
