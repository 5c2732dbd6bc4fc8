"""Every fault is found, and sound folders have none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.torch import load_file, save_file

from mergekit_lr.engine.digest import ALGORITHM, CHUNK
from mergekit_lr.errors import CheckpointError, VerificationError
from mergekit_lr.lazy import torch
from mergekit_lr.report import scan as scan_module
from mergekit_lr.report.verification import Verification
from mergekit_lr.report.verify import check_output, verify

from .conftest import FAMILIES, edit_config

Model = Callable[..., Path]


def problems(folder: Path, **options: Any) -> list[str]:
    return verify(folder, **options).problems


def save(tensors: dict[str, Any], path: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)


def shard(folder: Path) -> None:
    """Split the only file of a model in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save({n: tensors[n] for n in names[i::2]}, folder / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    total = sum(t.nbytes for t in tensors.values())
    write_index(folder, weight_map, total)


def write_index(folder: Path, weight_map: dict[str, str], total: int) -> None:
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def write_report(folder: Path, **changes: Any) -> None:
    """A report of the folder's tensors, the digests computed here from the documented definition."""
    entries = []
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            parts = [raw[i : i + CHUNK] for i in range(0, len(raw), CHUNK)] or [b""]
            digest = xxhash.xxh3_128(b"".join(xxhash.xxh3_128(p).digest() for p in parts)).hexdigest()
            dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
            entries.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "digest": digest})
    report = {"tensors": entries, "digest_algorithm": ALGORITHM, **changes}
    (folder / "merge_report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_have_no_problem(family: str, built: Path) -> None:
    result = verify(built / family)
    assert (result.problems, result.warnings) == ([], [])
    assert result.scanned and result.tensors > 5 and result.bytes > 10_000
    assert result.to_dict()["ok"] is True
    first = f"{built / family}: sound ({result.tensors} tensors in 1 files, every value finite)"
    assert result.summary_lines()[0] == first


LIES: list[tuple[str, str, Any]] = [
    *((f, "vocab_size", 65) for f in FAMILIES),
    *((f, "vocab_size", 32) for f in FAMILIES),
    *((f, "n_embd" if f == "gpt2" else "hidden_size", 36) for f in FAMILIES),
    *((f, "n_layer" if f == "gpt2" else "num_hidden_layers", n) for f in FAMILIES for n in (1, 3, 40)),
    *((f, "num_key_value_heads", 1) for f in ("llama", "qwen3", "gemma2", "mixtral", "qwen3_moe", "starcoder2")),
    *((f, "head_dim", 4) for f in ("llama", "qwen3", "gemma2", "mixtral", "qwen3_moe")),
    *((f, "num_attention_heads", 8) for f in ("qwen3", "gemma2", "qwen3_moe")),
    *((f, "intermediate_size", 50) for f in ("llama", "qwen3", "gemma2")),
    *((f, "num_experts", n) for f in ("mixtral", "qwen3_moe", "olmoe") for n in (2, 8)),
    *((f, "num_local_experts", n) for f in ("mixtral", "qwen3_moe", "olmoe") for n in (2, 8)),
    *((f, "num_experts_per_tok", 5) for f in ("mixtral", "qwen3_moe", "olmoe")),
    *((f, "tie_word_embeddings", False) for f in ("gemma2", "starcoder2")),
    *((f, "tie_word_embeddings", True) for f in ("llama", "qwen3")),
    *((f, "eos_token_id", 64) for f in FAMILIES),
    ("llama", "eos_token_id", [2, 70]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "key", "value"), LIES)
def test_a_lie_in_the_config_is_found(family: str, key: str, value: Any, model: Model) -> None:
    folder = model(family)
    before = json.loads((folder / "config.json").read_text()).get(key)
    assert before != value
    edit_config(folder, **{key: value})
    found = problems(folder)
    assert found and any(str(value if not isinstance(value, list) else 70) in p or "tie" in p for p in found)


def test_nested_text_config_is_read(model: Model) -> None:
    folder = model("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    moved = {k: config.pop(k) for k in ("num_local_experts", "num_experts_per_tok", "vocab_size", "num_hidden_layers")}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": moved}))
    assert problems(folder) == []
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {**moved, "num_local_experts": 6}}))
    assert any("6 experts" in p for p in problems(folder))


def test_a_vision_tower_has_sizes_of_its_own(model: Model) -> None:
    folder = model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "model_type": "x", "text_config": config}))
    tensors = load_file(folder / "model.safetensors")
    tower = {f"vision_tower.layers.{i}.self_attn.q_proj.weight": torch.zeros(8, 8) for i in range(5)}
    save({**tensors, **tower}, folder / "model.safetensors")
    assert problems(folder) == []
    edit_config(folder, text_config={**config, "num_attention_heads": 2, "head_dim": 8})
    assert any("num_attention_heads 2 x head_dim 8" in p for p in problems(folder))


def test_experts_in_fused_tensors(tmp_path: Path) -> None:
    shapes = {"gate_up_proj": (4, 6, 8), "down_proj": (4, 8, 3), "gate_up_proj_bias": (4, 6)}
    tensors = {f"model.layers.{i}.mlp.experts.{k}": torch.zeros(s) for i in range(2) for k, s in shapes.items()}
    save(tensors, tmp_path / "model.safetensors")
    for claimed, sound in ((4, True), (8, False)):
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_local_experts": claimed}))
        assert (problems(tmp_path) == []) == sound


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_uneven_experts_and_routers(family: str, model: Model) -> None:
    folder = model(family)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    router = next(n for n in tensors if n.endswith("gate.weight") and ".1." in n)
    save({**tensors, router: tensors[router][:3]}, path)
    assert any("router" in p and "3 rows" in p for p in problems(folder))
    lost = {n: t for n, t in tensors.items() if ".1." not in n or ".experts.3." not in n}
    if len(lost) < len(tensors):
        save(lost, path)
        assert any("4 experts, but model.layers.1 has 3" in p for p in problems(folder))


# --- files and index --------------------------------------------------------------------------------------------------


def test_sharded_is_sound(model: Model) -> None:
    folder = model()
    shard(folder)
    assert verify(folder).problems == [] and verify(folder).files == 2


def index_of(folder: Path) -> dict[str, str]:
    content: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return content


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "cannot open the file"),
    "stray file": (lambda d: save({"x": torch.zeros(1)}, d / "model.safetensors"), "is no part of the model"),
    "stray copy": (
        lambda d: shutil.copy(d / "model-00001-of-00002.safetensors", d / "old.safetensors"), "is no part of the model",
    ),
    "entry without tensor": (
        lambda d: write_index(d, {**index_of(d), "ghost": "model-00001-of-00002.safetensors"}, 0), "'ghost'",
    ),
    "tensor without entry": (
        lambda d: write_index(d, {k: v for k, v in index_of(d).items() if k != "model.norm.weight"}, 0),
        "'model.norm.weight', which the index does not list",
    ),
    "entry in the wrong shard": (
        lambda d: write_index(d, {**index_of(d), "model.norm.weight": "model-00001-of-00002.safetensors"}
                              if index_of(d)["model.norm.weight"].startswith("model-00002")
                              else {**index_of(d), "model.norm.weight": "model-00002-of-00002.safetensors"}, 0),
        "it places that tensor in",
    ),
    "traversal": (
        lambda d: write_index(d, {**index_of(d), "e": "../e.safetensors"}, 0), "plain .safetensors file name",
    ),
    "index cut": (lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {'), "not valid JSON"),
    "config cut": (lambda d: (d / "config.json").write_text('{"a": '), "not valid JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "does not hold an object"),
    "shard cut": (lambda d: os.truncate(d / "model-00001-of-00002.safetensors", 3000), "its tensors end at byte"),
    "shard grown": (
        lambda d: os.truncate(d / "model-00001-of-00002.safetensors", 99_999), "its tensors end at byte",
    ),
    "link out": (
        lambda d: ((d / "model-00001-of-00002.safetensors").rename(d.parent / "e.safetensors"),
                   (d / "model-00001-of-00002.safetensors").symlink_to(d.parent / "e.safetensors")),
        "leaves the model folder",
    ),
    "tokenizer past the embeddings": (
        lambda d: (d / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "z": 64}}}'), "the id 64",
    ),
    "added token past the embeddings": (
        lambda d: (d / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 99}]}'),
        "the id 99",
    ),
    "generation config": (lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [1, 640]}'), "640"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILS)
def test_a_spoilt_folder_is_found_out(case: str, model: Model) -> None:
    spoil, message = SPOILS[case]
    folder = model()
    shard(folder)
    spoil(folder)
    found = problems(folder, weights=False)
    assert any(message in p for p in found), found


def test_a_spoilt_output_is_not_committed(model: Model) -> None:
    folder = model(vocab_size=65, num_hidden_layers=3)
    with pytest.raises(VerificationError) as caught:
        check_output(folder)
    assert caught.value.exit_code == 6
    assert "vocab_size 65" in str(caught.value) and "model.layers.2" in str(caught.value)
    edit_config(folder, vocab_size=64, num_hidden_layers=2)
    check_output(folder)


def test_files_beside_the_one_that_counts(model: Model) -> None:
    """vLLM reads every safetensors file where there is no index: optimizer state would become weights."""
    folder = model()
    shutil.copy(folder / "model.safetensors", folder / "adam.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    result = verify(folder)
    assert len(result.problems) == 1 and "adam.safetensors is no part of the model" in result.problems[0]
    assert result.files == 1


def test_two_files_without_index_hold_the_same_tensors(model: Model) -> None:
    folder = model()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    found = problems(folder, weights=False)
    assert len(found) == 1 and "is in both a.safetensors and b.safetensors (and 20 more)" in found[0]


def test_warnings(model: Model) -> None:
    folder = model()
    shard(folder)
    write_index(folder, index_of(folder), 17)
    (folder / "pytorch_model.bin").touch()
    (folder / "modeling_x.py").touch()
    (folder / ".tmpAbC").touch()
    (folder / "model-00001-of-00002.safetensors").chmod(0o600)
    result = verify(folder)
    assert result.problems == []
    for part in ("total_size 17", "pytorch_model.bin may be a pickle", "modeling_x.py is code", ".tmpAbC looks like"):
        assert any(part in w for w in result.warnings), part
    assert any("owner only (mode 0600)" in w for w in result.warnings)
    assert [line for line in result.summary_lines() if line.startswith("warning: ")]


def test_a_layer_that_lost_a_tensor(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.{k}.weight": torch.zeros(2) for i in range(16) for k in ("a", "b")}
    del tensors["model.layers.7.b.weight"]
    save(tensors, tmp_path / "model.safetensors")
    assert verify(tmp_path).warnings == ["model.layers.7.b.weight is missing, though 15 other layers have it"]


# --- weights ----------------------------------------------------------------------------------------------------------

DTYPES = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 5, 4095, 4096, 9999])
def test_every_value_that_is_not_finite_is_found(
    dtype: str, value: float, where: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "PIECE", 4096)
    tensor = torch.ones(10_000, dtype=torch.float32).to(getattr(torch, dtype))
    if dtype == "float8_e4m3fn":
        tensor.view(torch.uint8)[where] = 0x7F  # its only kind of non-finite value
    else:
        tensor[where] = value
    save({"fine": torch.ones(3), "t": tensor}, tmp_path / "model.safetensors")
    assert problems(tmp_path) == [f"'t' holds 1 values that are NaN or infinite, the first at {where}"]
    assert problems(tmp_path, weights=False) == []


def test_finite_extremes_and_integers_pass(tmp_path: Path) -> None:
    save(
        {
            "half": torch.tensor([65504.0, -65504.0, 6e-8], dtype=torch.float16),
            "brain": torch.tensor([3.38e38, -3.38e38], dtype=torch.bfloat16),
            "ints": torch.full((9,), -1, dtype=torch.int64),
            "flags": torch.tensor([True]),
            "empty": torch.zeros(0),
        },
        tmp_path / "model.safetensors",
    )
    result = verify(tmp_path)
    assert result.problems == [] and result.tensors == 5


def test_digests(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model()
    shard(folder)
    write_report(folder)
    result = verify(folder)
    assert result.problems == [] and result.digests_checked == result.tensors > 0
    assert "digests match" in result.summary_lines()[0]
    # One bit anywhere in the data is found, and named.
    file = folder / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    for spot in (len(data) - 1, len(data) - 2000, len(data) - 9000):
        changed = bytearray(data)
        changed[spot] ^= 1
        file.write_bytes(bytes(changed))
        found = problems(folder)
        assert len(found) == 1 and "is not as it was written" in found[0]
        assert problems(folder, weights=False) == []


def test_digest_of_a_tensor_longer_than_a_chunk(tmp_path: Path) -> None:
    save({"t": torch.arange(CHUNK // 4 + 1000, dtype=torch.float32)}, tmp_path / "model.safetensors")
    write_report(tmp_path)
    assert verify(tmp_path).problems == [] and verify(tmp_path).digests_checked == 1


def test_reports_that_do_not_fit(model: Model) -> None:
    folder = model()
    entry = {"name": "model.norm.weight", "dtype": "F32", "shape": [32], "digest": "0"}
    for changes, message in (
        ({"tensors": None}, "lists no tensors"),
        ({"tensors": [{"x": 1}]}, "an entry without a name"),
        ({"tensors": [entry]}, "is not in merge_report.json"),
        ({"tensors": [{**entry, "name": "ghost"}]}, "'ghost', which is not there"),
        ({"tensors": [{**entry, "dtype": "BF16"}]}, "not BF16 [32] as written"),
        ({"tensors": [{**entry, "shape": [33]}]}, "not F32 [33] as written"),
    ):
        write_report(folder, **changes)
        assert any(message in p for p in problems(folder, weights=False)), message
    write_report(folder, digest_algorithm="another")
    result = verify(folder)
    assert result.problems == [] and result.digests_checked == 0
    assert any("digests of another kind" in w for w in result.warnings)
    (folder / "merge_report.json").write_text("[]")
    assert any("does not hold an object" in p for p in problems(folder))


def test_single_file_and_nothing(tmp_path: Path) -> None:
    save({"t": torch.ones(4)}, tmp_path / "x.safetensors")
    assert verify(tmp_path / "x.safetensors").tensors == 1
    with pytest.raises(CheckpointError, match="no such model"):
        verify(tmp_path / "none")
    (tmp_path / "x.safetensors").unlink()
    assert problems(tmp_path) == [f"{tmp_path}: holds no safetensors"]


def test_shrinking_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save({"t": torch.ones(10_000)}, path)
    real = scan_module.scan

    def cut_first(*args: Any) -> Any:
        os.truncate(path, 5000)
        return real(*args)

    monkeypatch.setattr("mergekit_lr.report.verify.scan", cut_first)
    assert any("the file ends inside tensor 't'" in p for p in problems(tmp_path))


def test_without_weights_torch_is_not_imported(built: Path) -> None:
    program = """
import sys
from mergekit_lr.report.verify import verify
from mergekit_lr.report.inspect import inspect
assert not verify(sys.argv[1], weights=False).problems
inspect(sys.argv[1])
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(built / "llama")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_dictionary_is_plain_data() -> None:
    assert json.loads(json.dumps(Verification("x", ["p"]).to_dict()))["ok"] is False
