"""The dense language models: configuration, and folders in the Hugging Face layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mergekit_lr.errors import CheckpointError, VerificationError
from zoo import COMMITTED, WORK, tokenizer
from zoo.sources import DOMAINS
from zoo.text import heldout_tokens
from zoo.tokenizer import CONTEXT, VOCABULARY
from zoo.train import Run, Trained, heldout_loss


def llama_config() -> LlamaConfig:
    """1.77 M parameters: 4 layers of width 192, 6 query and 3 key-value heads of 32, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def new_base(seed: int) -> LlamaForCausalLM:
    """A freshly initialised base, float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config())


def load(folder: Path) -> PreTrainedModel:
    """Load a folder as float32, refusing any key that does not fit.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape.
    """
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise CheckpointError(
            "the folder does not fit its own configuration", where=str(folder), why=str(wrong),
            fix="delete it and build it again",
        )  # fmt: skip
    model.eval()
    return model


def base_folder() -> Path:
    """The base built here, else the committed one: what every model that starts from the base starts from."""
    built = WORK / "base"
    return built if (built / "config.json").is_file() else COMMITTED / "base"


def load_base() -> PreTrainedModel:
    """The base that fine-tunes start from, float32.

    Raises:
        VerificationError: it speaks another tokenizer than the training tokens.
    """
    folder = base_folder()
    if tokenizer.digest(folder) != tokenizer.digest(tokenizer.folder()):
        raise VerificationError(
            "the base has another tokenizer than the one built here", where=str(folder),
            why="a token number would stand for other text",
            fix="build the part base too, or delete examples/zoo/build/tokenizer and examples/zoo/build/text",
        )  # fmt: skip
    return load(folder)


def write_folder(model: Any, folder: Path, *, shard_size: str = "5GB") -> None:
    """Write weights in bfloat16, configuration and tokenizer; the folder appears whole or not at all.

    ``model`` is cast in place.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial, max_shard_size=shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer.folder() / name, partial / name)
    for path in partial.iterdir():
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_moments(trained: Trained, run: Run, folder: Path) -> None:
    """Adam's state, twice: second moments by weight name, and the optimizer as the Trainer saves it.

    ``adam_exp_avg_sq.safetensors`` holds ``v`` in float32 under the weights' own names, without the bias
    correction ``1 - beta2**step``; ``step`` and ``beta2`` are in the metadata.
    """
    state = trained.optimizers[0].state_dict()
    moments = {name: state["state"][i]["exp_avg_sq"].contiguous() for i, name in enumerate(trained.names)}
    path = folder / "adam_exp_avg_sq.safetensors"
    metadata = {"format": "pt", "step": str(run.steps), "beta2": str(run.betas[1]), "bias_corrected": "false"}
    save_file(moments, path, metadata=metadata)
    path.chmod(0o644)
    torch.save(state, folder / "optimizer.pt")
    names = json.dumps(trained.names, indent=1) + "\n"
    (folder / "optimizer_parameter_names.json").write_text(names, encoding="utf-8")


def losses(model: Any) -> dict[str, float]:
    """Held-out loss per domain, in nats per token."""
    return {domain: heldout_loss(model, heldout_tokens(domain)) for domain in DOMAINS}
