"""Each trained part in miniature: two steps on the committed base, and the folder it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zoo import COMMITTED, card, dense, lora, losses, models, moe, publish, runs, text, tokenizer
from zoo.sources import DOMAINS

from mergekit_lr.errors import VerificationError

SUMMARY = {domain: {"documents": 1, "bytes": 4000, "tokens": 4000} for domain in DOMAINS}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty build folder, short runs, and random tokens for training text."""

    def tokens(domain: str) -> np.ndarray:
        return np.random.default_rng(DOMAINS.index(domain)).integers(2, 1536, 4000).astype(np.uint16)

    for module in (dense, lora, moe, models, publish, losses, tokenizer):
        monkeypatch.setattr(module, "WORK", tmp_path)
    for module in (dense, lora, moe):
        monkeypatch.setattr(module, "training_tokens", tokens)
    heldout = text.heldout_tokens
    for module in (models, moe):
        monkeypatch.setattr(module, "heldout_tokens", lambda domain: heldout(domain)[:1024])
    monkeypatch.setattr(card, "read_summary", lambda: SUMMARY)
    for name in ("DENSE", "ADAPTERS", "MIXTURES"):
        short = {k: replace(r, steps=2, batch=2, warmup=1) for k, r in getattr(runs, name).items()}
        monkeypatch.setattr(runs, name, MappingProxyType(short))
    return tmp_path


def test_expert_folder_differs_from_the_base_and_carries_moments(work: Path) -> None:
    dense.build("python")
    base = models.load(COMMITTED / "base").state_dict()
    expert = load_file(work / "python" / "model.safetensors")
    assert all(v.dtype == torch.bfloat16 for v in expert.values())
    changed = [k for k, v in expert.items() if not torch.equal(v.float(), base[k])]
    assert len(changed) > 20
    assert set(load_file(work / "python" / "adam_exp_avg_sq.safetensors")) == set(expert)
    assert "full fine-tune of the example base on python." in (work / "python" / "README.md").read_text()
    assert not list((work / "checkpoints").glob("*"))


# PEFT asks transformers for a property under its old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapter_folder_is_peft_and_names_no_machine_path(work: Path) -> None:
    from peft import PeftModel

    lora.build("german")
    folder = work / "lora-german"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, "examples/models/base")
    assert str(work) not in (folder / "README.md").read_text() + (folder / "adapter_config.json").read_text()
    factors = load_file(folder / "adapter_model.safetensors")
    assert len(factors) == 2 * 7 * 4  # A and B of seven linear layers in four blocks
    ids = torch.arange(2, 34)[None]
    plain = models.load(COMMITTED / "base")
    with torch.inference_mode():
        without = plain(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(plain, folder)(input_ids=ids).logits
    assert not torch.equal(without, adapted)


@pytest.mark.parametrize(("name", "stem", "per_layer"), [("qwen3-moe", "mlp", 48), ("mixtral", "block_sparse_moe", 24)])
def test_mixture_folder_has_one_tensor_per_expert_and_a_routing_report(
    work: Path, name: str, stem: str, per_layer: int
) -> None:
    moe.build(name)
    keys = load_file(work / name / "model.safetensors").keys()
    assert len([k for k in keys if k.startswith(f"model.layers.0.{stem}.experts.")]) == per_layer
    _, info = AutoModelForCausalLM.from_pretrained(work / name, output_loading_info=True)
    assert all(not found for found in info.values()), info
    report = json.loads((work / name / "routing.json").read_text())
    assert set(report["entropy"]) == set(DOMAINS)
    assert all(0 <= value <= report["maximum"] + 1e-4 for row in report["entropy"].values() for value in row)
    assert "## Routing" in (work / name / "README.md").read_text()


def test_losses_and_publishing_take_what_was_built(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = work / "carried"
    monkeypatch.setattr(publish, "COMMITTED", carried)
    dense.build("c")
    losses.write(work / "LOSSES.json")
    table = json.loads((work / "LOSSES.json").read_text())["models"]
    assert set(table) == {"base", "python", "c", "german"}  # base and the other experts from the repository
    assert table["c"] != json.loads((COMMITTED / "LOSSES.json").read_text())["models"]["c"]
    publish.publish()
    assert sorted(p.name for p in carried.iterdir()) == ["LOSSES.json", "c"]
    assert {p.name for p in (carried / "c").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_a_base_of_another_tokenizer_is_refused(work: Path) -> None:
    (work / "tokenizer").mkdir()
    (work / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(VerificationError, match="the base has another tokenizer"):
        models.load_base()
