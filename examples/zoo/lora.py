"""PEFT LoRA adapters of the base."""

from __future__ import annotations

import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from zoo import EXAMPLES, WORK, card, models, runs
from zoo.text import training_tokens
from zoo.train import fit

RANK = 8
ALPHA = 16
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(domain: str) -> None:
    """Train a rank-8 adapter on ``domain`` against the base and write a PEFT folder with card."""
    name = f"lora-{domain}"
    run = runs.ADAPTERS[name]
    torch.manual_seed(run.seed)  # the adapters' A factors are random at the start
    adapted = get_peft_model(
        models.load_base(),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM"),
    )
    checkpoint = WORK / "checkpoints" / f"{name}.pt"
    fit(adapted, run, {domain: training_tokens(domain)}, checkpoint)
    # As seen from the repository: an absolute path of this machine would help nobody.
    base = models.base_folder().relative_to(EXAMPLES.parent).as_posix()
    adapted.peft_config["default"].base_model_name_or_path = base
    folder = WORK / name
    partial = WORK / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    adapted.save_pretrained(partial, save_embedding_layers=False)  # else it asks the Hub about the base
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's template; ours marks a finished part
    for path in partial.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    stored = PeftModel.from_pretrained(models.load_base(), folder)
    losses = models.losses(stored.eval())
    what = f"A LoRA adapter of rank {RANK}, alpha {ALPHA}, on every linear layer of the example base, for {domain}."
    text = card.header(["lora", "example"], "peft", "base", "adapter") + card.body(name, what, run, losses)
    card.write(folder, text)
    checkpoint.unlink(missing_ok=True)
