"""The merged model as a function: its logits on shared tokens are those of the models merged by hand; templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergekit_lr
from mergekit_lr.recipe.tokens import TEMPLATES
from mergekit_lr.tokenizer.templates import builtin

from .models import TEXT, byte_level, read_tensors, reordered, tokens_of, vocabulary, write_model
from .test_rows import E, H, linear, merge, read_report


def loaded(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found: torch.nn.Module = model.eval()
    return found


def by_hand(models: list[Path], vocabularies: list[dict[str, int]], tokens: list[str]) -> torch.nn.Module:
    """The average of two models over shared tokens only, in their given order, made without this project's engine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    held = [read_tensors(m) for m in models]
    for tensors, ids in zip(held, vocabularies, strict=True):
        rows = [ids[t] for t in tokens]
        for name in (E, H):
            if name in tensors:
                tensors[name] = tensors[name][rows]
    merged: dict[str, Tensor] = {n: (held[0][n] + 3 * held[1][n]) / 4 for n in held[0]}
    config = LlamaConfig.from_pretrained(models[0], vocab_size=len(tokens))
    network = LlamaForCausalLM(config)
    network.load_state_dict(merged, strict=not config.tie_word_embeddings)
    network.tie_weights()
    return network.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("source", ["union", "base", "other"])
def test_logits_on_shared_tokens(tmp_path: Path, tied: bool, source: str) -> None:
    tokenizers = [byte_level(TEXT["english"], 290), reordered(byte_level(TEXT["python"], 280, ["<|pad|>", "<|end|>"]))]
    vocabularies = [vocabulary(t) for t in tokenizers]
    models = [
        write_model(tmp_path / f"m{i}", t, len(vocabularies[i]), seed=i, tied=tied) for i, t in enumerate(tokenizers)
    ]
    out = merge(tmp_path, linear(*models, tokenizer_source=str(models[1]) if source == "other" else source))
    ids = tokens_of(out)
    shared = sorted(set(vocabularies[0]) & set(vocabularies[1]))
    rows = torch.tensor([ids[t] for t in shared])
    text = torch.arange(40)[None]  # any sequence of shared tokens
    with torch.no_grad():
        found = loaded(out)(input_ids=rows[text]).logits[..., rows]
        expected = by_hand(models, vocabularies, shared)(input_ids=text).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_special_tokens_are_one_token_each_in_the_union(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizers = [byte_level(TEXT["english"], 290), byte_level(TEXT["english"], 290, ["<|end|>", "<|call|>"])]
    models = [write_model(tmp_path / f"m{i}", t, len(vocabulary(t)), seed=i) for i, t in enumerate(tokenizers)]
    out = merge(tmp_path, linear(*models, tokenizer_source="union"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokens_of(out)
    encoded = tokenizer("the cat<|call|>the<|end|>", add_special_tokens=False)["input_ids"]
    own = AutoTokenizer.from_pretrained(models[0])
    assert encoded == [*own("the cat")["input_ids"], ids["<|call|>"], *own("the")["input_ids"], ids["<|end|>"]]


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
# What each format looks like, written down from its description.
SHOWN = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
    "\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_level(TEXT["english"], 280, ["<s>", "</s>"])
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = tmp_path_factory.mktemp("plain") / "m"
    return write_model(folder, tokenizer, len(vocabulary(tokenizer)), seed=0, named=named)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_name(tmp_path: Path, plain: Path, name: str) -> None:
    from transformers import AutoTokenizer

    out = merge(tmp_path, linear(plain, chat_template=name))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == SHOWN[name]
    stored = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert stored == (out / "chat_template.jinja").read_text() == builtin(name)


def test_auto_takes_the_most_frequent_template(tmp_path: Path, plain: Path) -> None:
    import shutil

    models = [Path(shutil.copytree(plain, tmp_path / f"m{i}")) for i in range(4)]
    config = json.loads((plain / "tokenizer_config.json").read_text())
    several = [{"name": "tool", "template": "{{ 0 }}"}, {"name": "default", "template": "{{ 2 }}"}]
    (models[1] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 1 }}"}))
    (models[2] / "chat_template.jinja").write_text("{{ 2 }}\n")
    (models[3] / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    out = merge(tmp_path, linear(*models, chat_template="auto"))
    assert (out / "chat_template.jinja").read_text() == "{{ 2 }}"
    none = merge(tmp_path, linear(plain, chat_template="auto"), "none")
    assert not (none / "chat_template.jinja").exists()
    assert any("finds none" in w for w in read_report(none)["warnings"])


def test_a_template_in_jinja_replaces_the_models_own(tmp_path: Path, plain: Path) -> None:
    import shutil

    model = Path(shutil.copytree(plain, tmp_path / "m"))
    (model / "chat_template.jinja").write_text("{{ 1 }}")
    kept = merge(tmp_path, linear(model, tokenizer_source="base"), "kept")
    assert (kept / "chat_template.jinja").read_text() == "{{ 1 }}"
    out = merge(tmp_path, linear(model, chat_template="{{ messages[0].content }}"))
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_the_plan_says_where_rows_come_from(tmp_path: Path) -> None:
    tokenizers = [byte_level(TEXT["english"], 290), byte_level(TEXT["english"], 290, ["<|end|>", "<|call|>"])]
    models = [write_model(tmp_path / f"m{i}", t, len(vocabulary(t)), seed=i) for i, t in enumerate(tokenizers)]
    n = len(vocabulary(tokenizers[0]))
    recipe = linear(*models, tokenizer={"source": "union", "pad_to_multiple_of": 8})
    plan = mergekit_lr.plan(recipe, device="cpu")
    rows = -(-(n + 1) // 8) * 8
    a, b = map(str, models)
    assert plan.to_dict()["tokens"]["models"] == {
        a: {"own": n, f"from {b}": 1, "mean of all": rows - n - 1},
        b: {"own": n + 1, "mean of all": rows - n - 1},
    }
    assert plan.to_dict()["tokens"]["added"] == ["<|call|>"]
    assert f"tokens: {a}'s tokenizer and 1 tokens more, {rows:,} rows, {rows - n - 1:,} of them padding" in (
        plan.summary_lines()
    )
