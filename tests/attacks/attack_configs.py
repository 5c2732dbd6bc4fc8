"""Configs that lie about the weights, and indexes that lie about the files (rows 8, 24, 25)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from staging import CONFIG, LLAMA, attack, main, merged, model, refused, safetensors

import mergekit_lr
from mergekit_lr.errors import CheckpointError

MIXTURE = {
    **{n: s for n, s in LLAMA.items() if ".mlp." not in n},
    **{f"model.layers.{i}.mlp.gate.weight": (4, 8) for i in range(2)},
    **{
        f"model.layers.{i}.mlp.experts.{e}.{p}.weight": s
        for i in range(2)
        for e in range(4)
        for p, s in (("up_proj", (6, 8)), ("gate_proj", (6, 8)), ("down_proj", (8, 6)))
    },
}
LIES: list[tuple[str, Any]] = [
    ("vocab_size", 17), ("vocab_size", 15), ("vocab_size", 1 << 40), ("hidden_size", 16), ("num_hidden_layers", 1),
    ("num_hidden_layers", 3), ("num_hidden_layers", 10**9), ("num_attention_heads", 4), ("intermediate_size", 13),
    ("head_dim", 3), ("tie_word_embeddings", None),
]  # fmt: skip


@attack(24)
def dense(room: Path) -> str:
    """sizes that the weights do not have, so that a loader makes weights up: merge, verify"""
    line = ""
    other = model(room / "other")
    for number, (key, value) in enumerate(LIES):
        if value is None:
            continue
        extra = {"head_dim": 4} if key == "num_attention_heads" else {}
        folder = model(room / str(number), config={**CONFIG, **extra, key: value})
        found = mergekit_lr.verify(folder).problems
        assert any(str(value) in p for p in found), (key, value, found)
        line = refused(
            lambda f=folder, n=number: merged(f, other, out=room / f"out{n}"), str(value), kind=CheckpointError
        )
        assert not (room / f"out{number}").exists()
    return f"{len(LIES) - 1} lies: {line}"


@attack(24)
def nested(room: Path) -> str:
    """the lie is in text_config, where loaders look first"""
    config = {"model_type": "x", "text_config": {**CONFIG, "vocab_size": 17}}
    return refused(lambda: merged(model(room / "a", config=config), out=room / "out"), "vocab_size 17")


@attack(24)
def missing_layer(room: Path) -> str:
    """a layer is missing: transformers would load random numbers, print a report, and exit with 0"""
    tensors = {n: s for n, s in LLAMA.items() if ".layers.1." not in n}
    folder = model(room / "a", tensors=tensors)
    assert any("model.layers" in p for p in mergekit_lr.verify(folder).problems)
    return refused(lambda: merged(folder, out=room / "out"), "2 layers", kind=CheckpointError)


@attack(24)
def odd_values(room: Path) -> str:
    """values of other kinds than numbers: texts, lists, truths, nulls, numbers of 400 digits"""
    kinds: list[Any] = ["16", [16], {"a": 1}, True, None, -1, 0, 1.5, "x" * 10_000, 10**400]
    keys = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts", "architectures",
            "model_type", "text_config", "tie_word_embeddings", "torch_dtype", "dtype", "head_dim"]  # fmt: skip
    tried = 0
    for number, key in enumerate(keys):
        folder = model(room / str(number))
        for value in kinds:
            (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
            mergekit_lr.verify(folder, weights=False).summary_lines()
            try:
                mergekit_lr.inspect(str(folder)).summary_lines()
                mergekit_lr.plan({"merge_method": "linear", "models": [
                    {"model": str(folder), "parameters": {"weight": 1}}], "dtype": "float32"})  # fmt: skip
            except CheckpointError as e:
                assert "\n" not in str(e)
            tried += 1
    return f"{tried} configs read without another error than ours"


def mixture(room: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    config = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, **changes}
    return model(room, config=config, tensors=MIXTURE if tensors is None else tensors)


@attack(25)
def experts(room: Path) -> str:
    """experts that are not there, routers with other rows, more chosen than there are, layers that differ"""
    without = {n: s for n, s in MIXTURE.items() if "layers.1.mlp.experts.3" not in n}
    cases: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
        "more experts than weights": (None, {"num_experts": 8}, "8 experts"),
        "fewer experts than weights": (None, {"num_experts": 2}, "2 experts"),
        "two counts": (None, {"num_local_experts": 8}, "contradicts itself"),
        "more chosen than there are": (None, {"num_experts_per_tok": 5}, "routes each token to 5 experts of 4"),
        "a router of three rows": ({**MIXTURE, "model.layers.1.mlp.gate.weight": (3, 8)}, {}, "has 3 rows"),
        "an expert is missing": (without, {}, "model.layers.1 has 3"),
    }
    assert mergekit_lr.verify(mixture(room / "sound")).problems == []
    line = ""
    for number, (tensors, changes, words) in enumerate(cases.values()):
        folder = mixture(room / str(number), tensors, **changes)
        assert any(words in p for p in mergekit_lr.verify(folder).problems), (words, mergekit_lr.verify(folder))
        line = refused(lambda f=folder, n=number: merged(f, out=room / f"out{n}"), "experts|router|routes")
    return f"{len(cases)} lies: {line}"


@attack(24)
def billions(room: Path) -> str:
    """a config of 10^12 layers and a router of 10^13 rows without a byte, in 2 GiB of address space"""
    program = """
import resource, sys
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM
import mergekit_lr
from mergekit_lr.calibration.network import Network
from mergekit_lr.checkpoint.model import open_folder
from mergekit_lr.evaluation import load_for_evaluation
from mergekit_lr.errors import CheckpointError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
refused = 0
for folder in sys.argv[1:]:
    assert mergekit_lr.verify(folder).problems
    mergekit_lr.inspect(folder).summary_lines()
    with open_folder(Path(folder), folder) as checkpoint:
        for call in (lambda: mergekit_lr.plan({"merge_method": "reap", "models": [{"model": folder}],
                         "parameters": {"num_experts": 2}, "calibration": {"text": ["x"]}}, device="cpu"),
                     lambda: load_for_evaluation(Path(folder)), lambda: Network(checkpoint, torch.float32, "cpu")):
            try:
                call()
            except CheckpointError as e:
                refused += 1
print(refused)
"""
    deep = mixture(room / "deep", num_hidden_layers=10**12)
    wide = mixture(room / "wide", {**MIXTURE, "model.layers.0.mlp.gate.weight": (10**13, 0)}, num_experts=10**13)
    done = subprocess.run(
        [sys.executable, "-c", program, str(deep), str(wide)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and int(done.stdout) == 6, done.stdout + done.stderr
    return "6 of 6 refused: plan, evaluation and calibration of both; verify and inspect say what is wrong"


@attack(8)
def stale_shard(room: Path) -> str:
    """a shard of an older model lies beside the right ones: loaders that take every file would mix them"""
    folder = model(room / "a")
    stale = {"model.norm.weight": (8,), "extra.weight": (2,)}
    (folder / "model-00009-of-00009.safetensors").write_bytes(safetensors(stale, b"\0\0\0\x40"))
    report = merged(folder, model(room / "b"), out=room / "out")
    norm = next(t for t in report["tensors"] if t["name"] == "model.norm.weight")
    assert norm["max_abs"] == 1.0 and "extra.weight" not in {t["name"] for t in report["tensors"]}
    [problem] = mergekit_lr.verify(folder).problems
    assert mergekit_lr.verify(room / "out").problems == []
    return f"not read, and verify says: {problem}"


@attack(8)
def two_owners(room: Path) -> str:
    """two files hold a tensor of the same name, and no index says which one counts"""
    folder = room / "a"
    folder.mkdir()
    for i, fill in enumerate((b"\0\0\x80\x3f", b"\0\0\0\x40")):
        (folder / f"part{i}.safetensors").write_bytes(safetensors({"w": (4,)}, fill))
    return refused(lambda: merged(folder, out=room / "out"), "is in two files", kind=CheckpointError)


@attack(8)
def index_of_ghosts(room: Path) -> str:
    """the index lists a tensor that its shard does not hold, so that a loader makes it up"""
    folder = model(room / "a")
    placed = dict.fromkeys([*LLAMA, "model.layers.1.ghost.weight"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return refused(lambda: merged(folder, out=room / "out"), "'model.layers.1.ghost.weight' is not in the shard")


main(__name__)
