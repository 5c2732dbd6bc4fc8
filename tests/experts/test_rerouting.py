"""The router of a reduced mixture against the family's own module and against formulas written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_lr.experts.bank import Routing
from mergekit_lr.experts.rerouting import Rerouter

from ..calibration.families import MAKERS

ROUTERS = {"mixtral": "gate", "qwen2_moe": "gate", "qwen3_moe": "gate", "olmoe": "gate", "deepseek_v3": "gate",
           "gpt_oss": "router", "granitemoe": "router", "minimax_m2": "gate", "phimoe": "router"}  # fmt: skip


def mixture(family: str) -> tuple[Any, int]:
    """The last layer's block, its weights wide enough for choices to differ."""
    torch.manual_seed(3)
    model = MAKERS[family]().eval()
    layer = model.model.layers[-1]
    block = getattr(layer, "mlp", None) or layer.block_sparse_moe
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return block, int(block.experts.num_experts)


def inputs() -> torch.Tensor:
    return torch.randn(50, 32, generator=torch.Generator().manual_seed(1))


def dense(routing: Routing, experts: int) -> torch.Tensor:
    """Gate weights by expert, ``[tokens, E]``: what the order of a token's choices does not change."""
    return torch.zeros(len(routing.indices), experts).scatter_add(1, routing.indices, routing.weights.float())


@pytest.mark.parametrize("family", ROUTERS)
def test_the_whole_router_says_what_the_module_says(family: str) -> None:
    block, experts = mixture(family)
    x = inputs()
    with torch.no_grad():
        found = Rerouter(block, ROUTERS[family], experts)(x)
        seen: list[Routing] = []
        block.experts.register_forward_pre_hook(lambda m, a: seen.append(Routing(a[1], a[2])))
        block(x[None])
    assert torch.equal(dense(found, experts), dense(seen[0], experts))


def test_dropped_rows_are_gone_from_a_softmax_router() -> None:
    block, experts = mixture("mixtral")
    x, kept = inputs(), [0, 2, 3, 5]
    with torch.no_grad():
        found = Rerouter(block, "gate", experts)(x, kept)
        logits = x @ block.gate.weight[kept].T
    for t in range(len(x)):
        best = logits[t].argsort(descending=True)[:2]
        gates = logits[t][best].exp() / logits[t][best].exp().sum()
        wanted = torch.zeros(4).scatter(0, best, gates)
        torch.testing.assert_close(dense(found, 4)[t], wanted)


def test_groups_and_correction_biases_are_cut_with_the_rows() -> None:
    block, experts = mixture("deepseek_v3")
    block.gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, experts))
    x, groups = inputs(), block.gate.num_group
    size = experts // groups
    kept = [g * size + i for g in range(groups) for i in range(size)][:experts]
    with torch.no_grad():
        whole, same = (Rerouter(block, "gate", experts)(x, k) for k in (None, kept))
    assert torch.equal(dense(whole, experts), dense(same, experts))


def test_fewer_experts_than_a_token_is_sent_to_and_rows_of_its_own() -> None:
    block, experts = mixture("qwen3_moe")
    x = inputs()
    route = Rerouter(block, "gate", experts)
    with torch.no_grad():
        assert route(x, [1, 4]).indices.shape == (50, 2)
    rows = route.rows[[1, 4, 6]].clone().requires_grad_()
    found = route(x, [1, 4, 6], rows)
    found.weights[:, 0].sum().backward()
    assert rows.grad is not None and torch.isfinite(rows.grad).all()
    with torch.no_grad():
        plain = route(x, [1, 4, 6])
    assert torch.equal(plain.indices, found.indices) and torch.equal(plain.weights, found.weights.detach())
