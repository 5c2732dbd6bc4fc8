"""The training loop: schedule, seeded batches, resume to the bit, loss by definition, Adam's moments."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import models, moe
from zoo.train import WINDOW, Run, draw_batch, fit, heldout_loss

TOY = Run("toy", {"a": 0.75, "b": 0.25}, steps=6, peak_rate=1e-2, seed=5, batch=2, warmup=2)
DATA = {
    "a": np.random.default_rng(0).integers(0, 32, 4000).astype(np.uint16),
    "b": np.random.default_rng(1).integers(32, 64, 4000).astype(np.uint16),
}


def toy_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=WINDOW, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def quiet(_: str) -> None:
    """Progress is not part of what is tested."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_schedule_rises_then_follows_half_a_cosine() -> None:
    run = replace(TOY, steps=12, warmup=2, final_fraction=0.1)
    assert [run.scale(0), run.scale(1), run.scale(2)] == [0.5, 1.0, 1.0]
    assert run.scale(7) == pytest.approx(0.55)  # half way: the middle of 1 and 0.1
    assert run.scale(11) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.9 * math.pi)))


def test_batches_depend_on_seed_and_step_alone() -> None:
    first, _ = draw_batch(TOY, DATA, 3)
    assert torch.equal(first, draw_batch(TOY, DATA, 3)[0])
    assert not torch.equal(first, draw_batch(TOY, DATA, 4)[0])
    assert not torch.equal(first, draw_batch(replace(TOY, seed=6), DATA, 3)[0])
    batches = [draw_batch(replace(TOY, batch=16), DATA, step) for step in range(40)]
    rows, domains = torch.cat([ids for ids, _ in batches]), torch.cat([domains for _, domains in batches])
    assert torch.equal((rows >= 32).all(dim=1), domains == 1)  # 'b' is the second name and has the upper tokens
    share = (rows < 32).all(dim=1).double().mean().item()
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / len(rows))


@pytest.mark.parametrize("muon_rate", [0.0, 1e-2])
def test_interrupted_run_ends_with_the_same_bits(tmp_path: Path, muon_rate: float) -> None:
    run = replace(TOY, muon_rate=muon_rate)
    whole = toy_model()
    straight = fit(whole, run, DATA, report=quiet)
    checkpoint = tmp_path / "toy.pt"
    fit(toy_model(), run, DATA, checkpoint, stop_after=4, report=quiet)
    torch.manual_seed(99)  # a new process has another generator state
    resumed_model = toy_model()
    for parameter in resumed_model.parameters():
        nn.init.zeros_(parameter)
    resumed = fit(resumed_model, run, DATA, checkpoint, report=quiet)
    assert all(torch.equal(v, weights(resumed_model)[k]) for k, v in weights(whole).items())
    assert resumed.history == straight.history
    assert len(straight.optimizers) == (2 if muon_rate else 1)


def test_checkpoint_of_another_run_is_not_continued(tmp_path: Path) -> None:
    checkpoint = tmp_path / "toy.pt"
    fit(toy_model(), TOY, DATA, checkpoint, stop_after=4, report=quiet)
    other = replace(TOY, seed=6)
    fresh, continued = toy_model(), toy_model()
    fit(fresh, other, DATA, report=quiet)
    fit(continued, other, DATA, checkpoint, report=quiet)
    assert all(torch.equal(v, weights(continued)[k]) for k, v in weights(fresh).items())


def test_training_lowers_the_loss() -> None:
    model = toy_model()
    before = heldout_loss(model, DATA["b"])
    fit(model, replace(TOY, steps=40, mixture={"b": 1.0}), DATA, report=quiet)
    assert heldout_loss(model, DATA["b"]) < before - 0.3  # 'b' uses half of the vocabulary: ln 2 to gain


def test_heldout_loss_is_the_mean_over_whole_windows() -> None:
    model, tokens = toy_model().eval(), DATA["a"][: 2 * WINDOW + 100]
    total = 0.0
    with torch.inference_mode():
        for start in (0, WINDOW):
            ids = torch.tensor(tokens[start : start + WINDOW].astype(np.int64))
            scores = model(ids[None]).logits[0].double().log_softmax(-1)
            total -= sum(scores[i, ids[i + 1]].item() for i in range(WINDOW - 1))
    assert heldout_loss(model, tokens) == pytest.approx(total / (2 * (WINDOW - 1)), abs=1e-6)


def test_moments_are_adams_by_its_recurrence(tmp_path: Path) -> None:
    """v_t = beta2 v_(t-1) + (1 - beta2) g_t^2 on gradients taken beside the run."""
    run = replace(TOY, steps=2, clip=math.inf, betas=(0.9, 0.75))
    expected: dict[str, Tensor] = {}
    model = toy_model()

    def record(name: str, gradient: Tensor) -> None:
        old = expected.get(name, torch.zeros_like(gradient, dtype=torch.float64))
        expected[name] = 0.75 * old + 0.25 * gradient.double() ** 2

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: record(name, p.grad))
    trained = fit(model, run, DATA, report=quiet)
    models.write_moments(trained, run, tmp_path)
    moments = load_file(tmp_path / "adam_exp_avg_sq.safetensors")
    assert moments.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, value in moments.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-12)
    assert (tmp_path / "adam_exp_avg_sq.safetensors").stat().st_mode & 0o044 == 0o044
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    names = json.loads((tmp_path / "optimizer_parameter_names.json").read_text())
    assert all(torch.equal(state["state"][i]["exp_avg_sq"], moments[n]) for i, n in enumerate(names))
    assert [p for group in state["param_groups"] for p in group["params"]] == list(range(len(names)))
    assert state["param_groups"][1]["weight_decay"] == 0.0


def test_a_folder_is_written_in_bfloat16_and_read_back(tmp_path: Path) -> None:
    model = models.new_base(seed=3)
    expected = {k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()}
    models.write_folder(model, tmp_path / "m", shard_size="1950KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2
    read = models.load(tmp_path / "m").state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[k], v) for k, v in expected.items())


def test_routing_report_by_hand() -> None:
    """Two domains on disjoint halves of four experts: ln 2 within, ln 4 over all, ln 2 of information."""
    halves = {"x": torch.tensor([[0.5, 0.5, 0, 0]]).double(), "y": torch.tensor([[0, 0, 0.5, 0.5]]).double()}
    report = moe.routing_report(halves)
    ln2, ln4 = round(math.log(2), 4), round(math.log(4), 4)
    assert report["entropy"] == {"x": [ln2], "y": [ln2]}
    assert (report["entropy_all_domains"], report["information"], report["maximum"]) == ([ln4], [ln2], ln4)
    alike = {name: torch.full((1, 4), 0.25).double() for name in "xy"}
    assert moe.routing_report(alike)["information"] == [0.0]


class FixedRouter(nn.Module):
    """Stands for a mixture whose router is sure: expert 0 in rows of zeros, expert 1 in rows of ones."""

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        logits = nn.functional.one_hot(input_ids.flatten(), 2).float() * 60
        return SimpleNamespace(loss=torch.tensor(2.0), router_logits=(logits, torch.zeros_like(logits)))


def test_specialising_loss_is_less_the_information_by_hand() -> None:
    """Three rows in four of domain 0: layer 0 tells the domain, H(3/4, 1/4) nats; layer 1 tells nothing."""
    ids = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 1]])
    told = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    loss = moe.specialising_loss(FixedRouter(), ids, torch.tensor([0, 0, 0, 3]))
    assert loss.item() == pytest.approx(2.0 - 0.03 * told / 2, abs=1e-6)
    mixed = moe.specialising_loss(FixedRouter(), torch.tensor([[0, 1], [0, 1]]), torch.tensor([0, 1]))
    assert mixed.item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(("name", "experts", "top"), [("qwen3-moe", 16, 4), ("mixtral", 8, 2)])
def test_routing_shares_count_what_the_router_chose(name: str, experts: int, top: int) -> None:
    model = moe.new_model(name, seed=1).eval()
    tokens = np.random.default_rng(2).integers(0, 1536, 2 * WINDOW).astype(np.uint16)
    chosen: list[Tensor] = []
    layer = model.model.layers[1].mlp
    handle = layer.gate.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[2]))
    shares = moe.routing_shares(model, tokens)
    handle.remove()
    counts = torch.bincount(torch.cat(chosen).flatten(), minlength=experts).double()
    assert shares.shape == (3, experts)
    assert counts.sum() == 2 * WINDOW * top
    torch.testing.assert_close(shares[1], counts / counts.sum())
