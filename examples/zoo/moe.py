"""Two mixtures of experts whose experts specialise by domain, and the measure that says so."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from zoo import WORK, card, models, runs
from zoo.sources import DOMAINS
from zoo.text import Tokens, heldout_tokens, training_tokens
from zoo.tokenizer import CONTEXT, VOCABULARY
from zoo.train import WINDOW, fit

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "output_router_logits": True,  # for training: the balance loss needs them
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


_BALANCE = 0.01  # keeps every expert in use; it sees whole batches, which mix the domains
_SPECIALISATION = 0.03


def new_model(name: str, seed: int) -> Any:
    """A freshly initialised mixture, float32."""
    torch.manual_seed(seed)
    if name == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(
                **_SHARED, intermediate_size=192, num_local_experts=8, num_experts_per_tok=2,
                router_aux_loss_coef=_BALANCE, sliding_window=None,
            )
        )  # fmt: skip
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SHARED, intermediate_size=256, moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=_BALANCE,
        )
    )  # fmt: skip


def _chosen_experts(router_logits: Tensor, experts_per_token: int, experts: int) -> Tensor:
    """How often each expert is among a token's top k: counts ``(experts,)``."""
    return torch.bincount(router_logits.topk(experts_per_token, dim=-1).indices.flatten(), minlength=experts)


@torch.inference_mode()
def routing_shares(model: Any, tokens: Tokens, windows: int = 64) -> Tensor:
    """Share of each expert in the top-k choices, float64 ``(layers, experts)``, rows sum to 1."""
    config = model.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    rows = torch.from_numpy(tokens[: windows * WINDOW].astype(np.int64)).view(-1, WINDOW)
    counts = torch.zeros(config.num_hidden_layers, experts, dtype=torch.float64)
    for part in torch.split(rows, 16):
        output = model(input_ids=part, output_router_logits=True, use_cache=False)
        for layer, logits in enumerate(output.router_logits):
            counts[layer] += _chosen_experts(logits, config.num_experts_per_tok, experts)
    return counts / counts.sum(dim=1, keepdim=True)


def specialising_loss(model: Any, ids: Tensor, domains: Tensor) -> Tensor:
    """Cross-entropy and balance loss, less 0.03 of what the router's choice tells about the domain.

    That is the mutual information of expert and domain, ``I(E; D) = H(E) - H(E | D)`` in nats, from the router's
    probabilities, averaged over layers: the term that Mod-Squad (arXiv 2212.08066) trains with. Left to
    themselves, routers this small mostly sort by token, and the domains share most experts.
    """
    output = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    share = nn.functional.one_hot(domains).float()
    share = share[:, share.any(dim=0)]
    information = torch.zeros(())
    for logits in output.router_logits:
        by_row = logits.float().softmax(dim=-1).view(*ids.shape, -1).mean(dim=1)
        joint = share.T @ by_row / len(ids)
        prior = joint.sum(dim=1)
        within = entropy(joint / prior[:, None])
        information = information + entropy(joint.sum(dim=0)) - (prior * within).sum()
    loss: Tensor = output.loss - _SPECIALISATION * information / len(output.router_logits)
    return loss


def entropy(shares: Tensor) -> Tensor:
    """Shannon entropy in nats over the last dimension; an unused expert adds nothing."""
    return -torch.xlogy(shares, shares).sum(dim=-1)


def routing_report(shares: dict[str, Tensor]) -> dict[str, Any]:
    """Per layer: entropy of the experts' shares within each domain and over all, and what the expert tells.

    ``information = H(mean over domains) - mean over domains of H``: the mutual information of expert and domain
    in nats when domains are equally likely. 0 if every domain uses the experts alike.
    """
    names = list(shares)
    stacked = torch.stack([shares[name] for name in names])
    within = entropy(stacked)
    overall = entropy(stacked.mean(dim=0))
    information = overall - within.mean(dim=0)
    return {
        "unit": "nats",
        "maximum": round(math.log(stacked.shape[-1]), 4),
        "entropy": {name: [round(v, 4) for v in within[i].tolist()] for i, name in enumerate(names)},
        "entropy_all_domains": [round(v, 4) for v in overall.tolist()],
        "information": [round(v, 4) for v in information.tolist()],
        "smallest_share": [round(v, 4) for v in stacked.mean(dim=0).min(dim=-1).values.tolist()],
    }


def _routing_table(report: dict[str, Any]) -> str:
    layers = range(len(report["information"]))
    rows = [[d, *(f"{report['entropy'][d][layer]:.3f}" for layer in layers)] for d in report["entropy"]]
    for label, key in (("all domains", "entropy_all_domains"), ("information", "information"),
                       ("smallest share of an expert", "smallest_share")):  # fmt: skip
        rows.append([label, *(f"{report[key][layer]:.3f}" for layer in layers)])
    text = card.table(("", *(f"layer {layer}" for layer in layers)), rows)
    return (
        "## Routing\nEntropy of the experts' shares of top-k choices on the held-out text, in nats (at most "
        f"{report['maximum']:.3f}); information is the entropy over all domains less the mean within a domain, which "
        f"is 0 where experts do not specialise:\n\n{text}\n"
    )


def build(name: str) -> None:
    """Train the mixture ``name`` and write folder, ``routing.json`` and card."""
    run = runs.MIXTURES[name]
    model = new_model(name, run.seed)
    checkpoint = WORK / "checkpoints" / f"{name}.pt"
    fit(model, run, {domain: training_tokens(domain) for domain in DOMAINS}, checkpoint, loss=specialising_loss)
    model.config.output_router_logits = False
    folder = WORK / name
    models.write_folder(model, folder)
    stored = models.load(folder)
    report = routing_report({domain: routing_shares(stored, heldout_tokens(domain)) for domain in DOMAINS})
    (folder / "routing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    size = sum(p.numel() for p in stored.parameters()) / 1e6
    per_layer = "16 experts, 4 per token" if name == "qwen3-moe" else "8 experts, 2 per token"
    what = f"A mixture of experts of {size:.1f} M parameters (3 layers, width 128, {per_layer}), trained from scratch."
    tags = [name.replace("-", "_"), "moe", "example"]
    losses = models.losses(stored)
    card.write(folder, card.header(tags, "transformers") + card.body(name, what, run, losses, _routing_table(report)))
    checkpoint.unlink(missing_ok=True)
