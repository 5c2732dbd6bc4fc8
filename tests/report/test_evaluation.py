"""Held-out loss against a float64 loop that predicts one token at a time."""

from __future__ import annotations

import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.evaluation import evaluate, loss_table, windows
from mergekit_lr.lazy import torch

TEXT = "def add(a, b):\n    return a + b  # ünïcödé, 日本\n" * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of some thousand parameters with a byte-level tokenizer of 300 tokens."""
    root: Path = tmp_path_factory.mktemp("evaluated") / "tiny"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import ByteLevelBPETokenizer
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<s>"], show_progress=False)
        PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>").save_pretrained(root)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8)  # far from uniform, or every context would give the same loss
        model.save_pretrained(root)
    return root


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "python.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def reference(folder: Path, context: int, most: int | None = None) -> tuple[float, int]:
    """Sum of -log p in float64, each token from its own forward pass over the window so far."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    tokens = tokens if most is None else tokens[: most + 1]
    total = 0.0
    for i in range(1, len(tokens)):
        start = (i - 1) // context * context
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[start:i]])).logits[0, -1]
        total -= float(torch.log_softmax(logits, -1)[tokens[i]])
    return total, len(tokens) - 1


@pytest.mark.parametrize(("context", "most", "batch"), [(16, None, 8), (7, None, 3), (64, 50, 1), (1, 20, 4)])
def test_equals_one_token_at_a_time(folder: Path, text: Path, context: int, most: int | None, batch: int) -> None:
    result = evaluate(folder, [text], context=context, max_tokens=most, batch=batch)
    total, count = reference(folder, context, most)
    found = result["files"][str(text)]
    assert found["tokens"] == count and result["context"] == context
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result["mean"] == found["loss"]
    assert json.loads(json.dumps(result))["model"] == str(folder)


def test_nats_per_byte_cover_all_but_the_first_token(folder: Path, text: Path) -> None:
    from transformers import AutoTokenizer

    found = evaluate(folder, [text])["files"][str(text)]
    encoded = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    first = TEXT[: encoded["offset_mapping"][0][1]].encode()
    assert found["bytes"] == len(TEXT.encode()) - len(first)
    assert found["loss_per_byte"] * found["bytes"] == pytest.approx(found["loss"] * found["tokens"])


def test_context_defaults_to_what_the_model_can(folder: Path, text: Path) -> None:
    assert evaluate(folder, [text])["context"] == 64
    assert evaluate(folder, [text], context=1000)["context"] == 64


def test_same_bits_again_and_for_any_batch(folder: Path, text: Path) -> None:
    first = evaluate(folder, [text], batch=4)
    assert evaluate(folder, [text], batch=4) == first
    assert evaluate(folder, [text], batch=1)["mean"] == pytest.approx(first["mean"], rel=1e-6)


def test_bfloat16_weights_are_run_in_float32(folder: Path, text: Path, tmp_path: Path) -> None:
    for name, cast in (("b", torch.bfloat16), ("f", torch.float32)):
        (tmp_path / name).mkdir()
        for file in folder.iterdir():
            if file.suffix == ".json":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        rounded = {k: v.bfloat16().to(cast) for k, v in load_file(folder / "model.safetensors").items()}
        save_file(rounded, tmp_path / name / "model.safetensors", {"format": "pt"})
    assert evaluate(tmp_path / "b", [text])["mean"] == evaluate(tmp_path / "f", [text])["mean"]


def test_a_missing_weight_is_an_error_not_a_random_number(folder: Path, text: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for change, message in (
        ({"model.norm.weight": None}, "missing_keys model.norm.weight"),
        ({"extra.weight": torch.zeros(2)}, "unexpected_keys extra.weight"),
    ):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            evaluate(tmp_path, [text])


def test_code_in_the_folder_is_not_run(folder: Path, text: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot load the model"):
        evaluate(tmp_path, [text])
    assert not canary.exists()


def test_bad_arguments(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text"):
        evaluate(folder, [])
    for key in ("context", "max_tokens", "batch"):
        with pytest.raises(UsageError, match=f"{key} is 0"):
            evaluate(folder, [text], **{key: 0})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="cannot read the text"):
        evaluate(folder, [tmp_path / "none.txt"])
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        evaluate(folder, [tmp_path / "latin.txt"])
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(CheckpointError, match="too short"):
        evaluate(folder, [tmp_path / "short.txt"])
    with pytest.raises(CheckpointError, match="no such model"):
        evaluate(tmp_path / "none", [text])
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        evaluate(tmp_path, [text])
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UsageError, match="merge the two first"):
        evaluate(f"{folder}+{tmp_path / 'adapter'}", [text])


@pytest.mark.parametrize(("length", "context"), [(10, 3), (10, 9), (10, 10), (2, 5), (11, 5), (4, 1)])
def test_every_token_but_the_first_is_predicted_once(length: int, context: int) -> None:
    cut = list(windows(torch.arange(length), context))
    assert [int(t) for w in cut for t in w[1:]] == list(range(1, length))
    assert all(2 <= len(w) <= context + 1 for w in cut)


def test_table() -> None:
    results: list[dict[str, Any]] = [
        {"model": "x/[red]base", "files": {"d/python.txt": {"loss": 2.0}, "d/c.txt": {"loss": 3.0}}, "mean": 2.5},
        {"model": "x/merge", "files": {"d/python.txt": {"loss": 1.5}}, "mean": 1.5},
    ]
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="standard").print(loss_table(results))
    text = out.getvalue()
    assert "[red]base" in text and "\x1b[1m1.5000" in text and "\x1b[1m2.0000" not in text and " -" in text
    out = io.StringIO()
    Console(file=out, width=100).print(loss_table(results, names=["one", "two"]))
    assert "one" in out.getvalue() and "python" in out.getvalue() and "x/merge" not in out.getvalue()
