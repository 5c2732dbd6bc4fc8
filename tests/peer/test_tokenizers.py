"""mergekit 0.1.5 on models with different tokenizers: the same rows, token by token, and the same transplants."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mergekit_lr
from mergekit_lr.linalg.pursuit import orthogonal_matching_pursuit

from ..tokenizer.models import TEXT, byte_level, read_tensors, reordered, tokens_of, vocabulary, write_model
from ..tokenizer.test_rows import E, H
from . import environment

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def peer() -> Path:
    """The folder of mergekit's commands."""
    return environment.ensure()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {
        "base": byte_level(TEXT["english"], 290, ["<|end|>"]),
        "code": reordered(byte_level(TEXT["python"], 285, ["<|end|>", "<|pad|>"])),
        "german": byte_level(TEXT["german"], 300, ["<|end|>", "<|call|>"]),
    }
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        write_model(folder / name, tokenizer, len(vocabulary(tokenizer)), seed=seed, named={"eos_token": "<|end|>"})
    padded = tokenizers["base"]
    write_model(folder / "padded", padded, 320, seed=9, named={"eos_token": "<|end|>"})
    return folder


def weighted(*names: str) -> list[dict[str, Any]]:
    return [{"model": f"./{n}", "parameters": {"weight": w}} for n, w in zip(names, (0.5, 0.25, 0.375), strict=False)]


TOKEN = {"kind": "model_token", "model": "./code"}
RECIPES: dict[str, dict[str, Any]] = {
    "union": {"models": weighted("base", "code"), "tokenizer_source": "union"},
    "union of three": {"models": weighted("base", "code", "german"), "tokenizer_source": "union"},
    "union, no base": {"models": weighted("base", "german", "code"), "tokenizer_source": "union", "base_model": None},
    "base": {"models": weighted("base", "code"), "tokenizer_source": "base"},
    "other": {"models": weighted("base", "code"), "tokenizer_source": "./code"},
    "padding": {"models": weighted("base", "code"), "tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
    "padded base": {"models": weighted("padded", "code"), "tokenizer_source": "base", "base_model": "./padded"},
    "rules": {
        "models": weighted("base", "code"),
        "tokenizer": {
            "source": "union",  # with `base` mergekit fails where it must add a token
            "tokens": {
                "<|pad|>": {"source": "./code"},
                "<|new|>": {"source": {**TOKEN, "token": "Ġself"}},
                "<|newer|>": {"source": {**TOKEN, "token_id": 30}},
                "<|end|>": {"source": "./code", "force": True},
                "e": {"source": {"kind": "zero"}, "force": True},
                "t": {"source": "./code"},
            },
        },
    },
    "task vectors": {
        "merge_method": "task_arithmetic",
        "models": weighted("code", "german"),
        "tokenizer_source": "union",
    },
    "ties": {
        "merge_method": "ties",
        "models": weighted("code", "german"),
        "tokenizer_source": "union",
        "parameters": {"density": 0.5},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_rows(peer: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    recipe = {"merge_method": "linear", "base_model": "./base", "dtype": "float32"} | RECIPES[name]
    if recipe["base_model"] is None:
        del recipe["base_model"]
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(models)
    done = subprocess.run(
        [str(peer / "mergekit-yaml"), str(path), str(tmp_path / "theirs")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours = mergekit_lr.merge(path, tmp_path / "ours", device="cpu").out
    ids, their_ids = tokens_of(ours), tokens_of(tmp_path / "theirs")
    assert set(ids) == set(their_ids)
    found, expected = read_tensors(ours), read_tensors(tmp_path / "theirs")
    for tensor in (E, H):
        mine = found[tensor][[ids[t] for t in sorted(ids)]]
        theirs = expected[tensor][[their_ids[t] for t in sorted(ids)]]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    sizes = [json.loads((f / "config.json").read_text())["vocab_size"] for f in (ours, tmp_path / "theirs")]
    if name == "padded base":
        assert sizes == [320, len(ids)]  # ours keeps the padding: docs/tokenizers.md
    else:
        assert sizes[0] == sizes[1]
    if name == "padding":
        torch.testing.assert_close(found[E][len(ids) :], expected[E][len(ids) :], rtol=1e-5, atol=1e-6)


def transplanted(peer: Path, models: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    command = [str(peer / "mergekit-tokensurgeon"), "./base", "./code", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=models)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_tensors(out)


METHODS: dict[str, dict[str, Any]] = {
    "omp": {"k": 6},
    "common_interpolation": {"k": 6},
    "common_interpolation/cosine": {"k": 6, "cosine_similarity": True},
    "common_interpolation/barycentric": {"k": 6, "weight_scheme": "barycentric"},
    "common_interpolation/least_squares": {"k": 6, "weight_scheme": "least_squares"},
    "mean": {},
    "zero": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_transplant(peer: Path, models: Path, tmp_path: Path, name: str) -> None:
    options = {"approximation_method": name.partition("/")[0], **METHODS[name]}
    flags = [x for k, v in options.items() for x in ([f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)]))]
    theirs = transplanted(peer, models, tmp_path / "theirs", *flags)
    out = mergekit_lr.transplant(models / "base", models / "code", tmp_path / "ours", device="cpu", **options).out
    ours = read_tensors(out)
    for tensor in (E, H):
        assert ours[tensor].shape == theirs[tensor].shape
        apart = (ours[tensor] - theirs[tensor]).norm(dim=1) / theirs[tensor].norm(dim=1).clamp(min=1e-3)
        assert float(apart.max()) < 1e-4


def test_the_same_supports(peer: Path, tmp_path: Path) -> None:
    """The pursuit itself, on 200 targets over 500 atoms, as mergekit's function does it in fp32."""
    g = torch.Generator().manual_seed(0)
    atoms, targets = torch.randn((500, 64), generator=g), torch.randn((200, 64), generator=g)
    torch.save({"atoms": atoms, "targets": targets}, tmp_path / "in.pt")
    code = (
        "import sys, torch; from mergekit.tokensurgeon import batch_omp; d = torch.load(sys.argv[1]);"
        "i, c = batch_omp(d['targets'], d['atoms'], 24); torch.save({'i': i, 'c': c}, sys.argv[2])"
    )
    command = [str(peer / "python"), "-c", code, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True)
    theirs = torch.load(tmp_path / "out.pt")
    indices, coefficients = orthogonal_matching_pursuit(targets, atoms, 24)
    assert torch.equal(indices, theirs["i"])
    torch.testing.assert_close(coefficients.float(), theirs["c"], rtol=1e-3, atol=1e-4)
