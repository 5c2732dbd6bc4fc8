"""The family table against models that transformers saved: names, slabs and matrices are where it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lr.arch.moe import MoeLayer, moe_layers
from mergekit_lr.arch.moe_config import groups_of, shrunk_config, top_k
from mergekit_lr.arch.moe_families import Family, Slot, find_family, register_family
from mergekit_lr.checkpoint.dtypes import dtype_code
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint, open_folder
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.storage import Expert, expert_from, stored_as

from .moe_models import FAMILIES, HIDDEN, WIDTH, tiny


def saved(family: str, folder: Path, **overrides: Any) -> tuple[Any, Checkpoint]:
    model = tiny(family, **overrides)
    model.save_pretrained(folder)
    return model, open_folder(folder, family)


def read_expert(checkpoint: Checkpoint, layer: MoeLayer, e: int) -> Expert:
    return expert_from(layer.stored, [checkpoint.read(s.tensor, s.start, s.stop) for s in layer.slabs(e)])


def in_memory(model: Any, layer: MoeLayer) -> Any:
    decoder = model.model.layers[layer.index]
    block = getattr(decoder, layer.family.block, None) or getattr(decoder, "mlp", None) or decoder.block_sparse_moe
    return block.experts


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_those_that_the_model_computes_with(family: str, tmp_path: Path) -> None:
    """The expert read from disk gives what transformers' own experts module gives for one expert."""
    model, checkpoint = saved(family, tmp_path)
    layers = moe_layers(checkpoint)
    assert layers
    layer = layers[-1]
    assert (layer.width, layer.hidden, layer.extra) == (WIDTH, HIDDEN, False)
    assert layer.experts == (16 if family == "deepseek_v3" else 8)
    module, x = in_memory(model, layer), torch.randn(5, HIDDEN)
    for e in (0, layer.experts - 1):
        own = read_expert(checkpoint, layer, e)
        if family == "llama4_text":
            every = torch.zeros(layer.experts, 5, HIDDEN)
            every[e] = x
            want = module(every.reshape(-1, HIDDEN)).view(layer.experts, 5, HIDDEN)[e]
        else:
            want = module(x, torch.full((5, 1), e), torch.ones(5, 1))
        up, gate = x @ own.up.T, x @ own.gate.T
        if own.gate_bias is not None:
            gate, up = gate + own.gate_bias, up + own.up_bias
        if layer.family.activation == "clamped":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            hidden = torch.nn.functional.silu(gate) * up
        got = hidden @ own.down.T + (own.down_bias if own.down_bias is not None else 0)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for slot, slab in zip(layer.family.slots, layer.slabs(e), strict=True):  # and back, to the bit
            part = stored_as(slot, own).reshape(-1)
            assert torch.equal(part, checkpoint.read(slab.tensor, slab.start, slab.stop))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_an_unchanged_layer_are_its_tensors(family: str, tmp_path: Path) -> None:
    _, checkpoint = saved(family, tmp_path)
    for layer in moe_layers(checkpoint):
        found = {(o.name, o.dtype, o.shape) for o in layer.outputs()}
        assert found == {(n, checkpoint.tensors[n].dtype, checkpoint.tensors[n].shape) for n in layer.names}
        assert sum(o.shape[0] for o in layer.outputs(experts=3) if o.stored and o.expert is None) in (0, 6, 12)
        assert len([o for o in layer.outputs(experts=3) if o.expert is not None]) in (0, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_outputs_have_the_shapes_of_a_narrow_model(family: str, tmp_path: Path) -> None:
    """Shapes and config of half the width are those of a model that was made with half the width."""
    _, wide = saved(family, tmp_path / "wide")
    if family == "llama4_text":
        with pytest.raises(CheckpointError, match="cannot become narrower"):
            shrunk_config(wide.config or {}, moe_layers(wide)[0], width=8)
        return
    key = moe_layers(wide)[0].family.width_key[0]
    narrow_config = shrunk_config(wide.config or {}, moe_layers(wide)[0], width=WIDTH // 2)
    shared = {k: v for k, v in narrow_config.config.items() if k in ("n_shared_experts", "moe_num_shared_experts")}
    model, narrow = saved(family, tmp_path / "narrow", **{key: WIDTH // 2}, **shared)
    del model
    assert narrow_config.config == {**(narrow.config or {}), "dtype": narrow_config.config.get("dtype")}
    assert bool(narrow_config.notices) == bool(shared)
    for layer in moe_layers(wide):
        for o in layer.outputs(width=WIDTH // 2):
            assert o.shape == narrow.tensors[o.name].shape


def made(family: str, **overrides: Any) -> Checkpoint:
    """A checkpoint that exists only as headers, written down from the table of tensors of a saved one."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _, found = saved(family, Path(folder), **overrides)
        found.close()
        return found


def test_layers_for_further_tokens_come_last(tmp_path: Path) -> None:
    base = made("deepseek_v3")
    names = {n: i for n, i in base.tensors.items() if ".layers.1." in n}
    base.tensors.update({n.replace("layers.1.", "layers.2."): i for n, i in names.items()})
    layers = moe_layers(base)
    assert [(layer.index, layer.extra) for layer in layers] == [(1, False), (2, True)]
    other = made("qwen3_next")
    names = {n: i for n, i in other.tensors.items() if n.startswith("model.layers.1.")}
    other.tensors.update({n.replace("model.layers.1.", "mtp.layers.0."): i for n, i in names.items()})
    assert [(layer.prefix, layer.extra) for layer in moe_layers(other)][-1] == ("mtp.layers.0", True)


def test_every_alias_of_the_count_is_set_and_top_k_follows() -> None:
    base = made("qwen3_moe")
    assert base.config is not None
    both = {**base.config, "num_experts": 8, "num_local_experts": 8}
    layer = moe_layers(base)[0]
    shrunk = shrunk_config(both, layer, experts=5)
    assert (shrunk.config["num_experts"], shrunk.config["num_local_experts"]) == (5, 5)
    assert shrunk.config["num_experts_per_tok"] == 2
    assert shrunk.notices == ()
    one = shrunk_config(both, layer, experts=1)
    assert one.config["num_experts_per_tok"] == 1
    assert "num_experts_per_tok is now 1" in one.notices[0]
    nested = shrunk_config({"text_config": both, "x": 1}, layer, experts=4).config
    assert (nested["text_config"]["num_experts"], nested["x"]) == (4, 1)


def test_groups_are_filled_evenly() -> None:
    base = made("deepseek_v3")
    assert base.config is not None
    layer = moe_layers(base)[0]
    groups = groups_of(base.config, layer.family)
    assert groups is not None
    assert [list(m) for m in groups.members(16)] == [list(range(8)), list(range(8, 16))]
    assert shrunk_config(base.config, layer, experts=10).config["n_routed_experts"] == 10
    with pytest.raises(CheckpointError, match=r"7 experts do not fill 2 groups.*use num_experts 6 or 8"):
        shrunk_config(base.config, layer, experts=7)
    with pytest.raises(CheckpointError, match="2 experts do not fill"):  # a group's score is the sum of its best two
        shrunk_config(base.config, layer, experts=2)
    four = {**base.config, "num_experts_per_tok": 8}
    assert top_k(shrunk_config(four, layer, experts=8).config) == 4  # one group of the two is chosen


def test_what_does_not_fit_is_refused() -> None:
    base = made("mixtral")
    assert base.config is not None
    names = list(base.tensors)

    def refused(match: str, config: dict[str, Any] | None, tensors: dict[str, TensorInfo]) -> None:
        with pytest.raises(CheckpointError, match=match):
            moe_layers(Checkpoint("m", None, config, tensors, {}, ()))

    refused("has no config.json", None, base.tensors)
    refused("config.json says num_local_experts 6, but .* has 8", {**base.config, "num_local_experts": 6}, base.tensors)
    refused("intermediate_size 12, but .* 16 wide", {**base.config, "intermediate_size": 12}, base.tensors)
    refused(
        "family 'new_moe' is not known .*Mixtral.*register_family",
        {"model_type": "new_moe", "num_experts": 8},
        base.tensors,
    )
    dense = {n: i for n, i in base.tensors.items() if "moe" not in n}
    refused("is a dense model", {"model_type": "llama"}, dense)
    refused("is a dense model", base.config, dense)
    gone = next(n for n in names if ".experts.3.w2" in n)
    refused(f"8 rows, but {gone} is missing", base.config, {n: i for n, i in base.tensors.items() if n != gone})
    odd = base.tensors[gone]
    refused("and expert 0 F32", base.config, {**base.tensors, gone: TensorInfo(gone, "BF16", odd.shape, 0, 1)})
    strange = "model.layers.0.block_sparse_moe.experts.0.w4.weight"
    refused("w4.weight .* is not among", base.config, {**base.tensors, strange: odd})
    router = "model.layers.0.block_sparse_moe.gate.weight"
    fewer = TensorInfo(router, "F32", (7, HIDDEN), 0, 1)
    refused("is not among|7 experts", base.config, {**base.tensors, router: fewer})
    refused("sends a token to 9 of 8", {**base.config, "num_experts_per_tok": 9}, base.tensors)


def test_a_plugin_can_add_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lr.arch import moe_families

    monkeypatch.setattr(moe_families, "FAMILIES", list(moe_families.FAMILIES))
    slots = tuple(Slot(f"e.{{e}}.{m}", (m,)) for m in ("gate", "up", "down"))
    register_family(Family("Mine", ("mine",), "ffn", "r", slots, ("w",)))
    assert find_family("mine") is not None
    tensors = {"layers.0.ffn.r": TensorInfo("", "F32", (2, 4), 0, 32)}
    for e in range(2):
        for m in ("gate", "up", "down"):
            shape = (4, 3) if m == "down" else (3, 4)
            tensors[f"layers.0.ffn.e.{e}.{m}"] = TensorInfo("", "F32", shape, 0, 48)
    [layer] = moe_layers(Checkpoint("m", None, {"model_type": "mine", "num_experts": 2, "w": 3}, tensors, {}, ()))
    assert (layer.experts, layer.width, layer.hidden) == (2, 3, 4)


def test_scales_of_quantised_experts_belong_to_them(tmp_path: Path) -> None:
    from mergekit_lr.experts.quantised import encode_fp8

    hidden, width = 160, 136
    config = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": width, "num_hidden_layers": 1}
    weights: dict[str, torch.Tensor] = {"model.layers.0.mlp.gate.weight": torch.randn(2, hidden)}
    plain = {}
    for e in range(2):
        for m in ("gate", "up", "down"):
            w = torch.randn((hidden, width) if m == "down" else (width, hidden))
            name = f"model.layers.0.mlp.experts.{e}.{m}_proj.weight"
            plain[e, m] = w
            weights[name], weights[name + "_scale_inv"] = encode_fp8(w)
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_folder(tmp_path, "m")
    [layer] = moe_layers(checkpoint)
    assert (layer.quantised, layer.width, len(layer.stored)) == ("fp8", width, 6)
    own = read_expert(checkpoint, layer, 1)
    for m in ("gate", "up", "down"):
        assert (getattr(own, m) - plain[1, m]).abs().max() <= 2**-4 * plain[1, m].abs().max()
    narrow = {o.name.rpartition("experts.")[2]: o.shape for o in layer.outputs(width=128)}
    assert narrow["0.gate_proj.weight_scale_inv"] == (1, 2)
    assert narrow["0.down_proj.weight_scale_inv"] == (2, 1)
    assert dtype_code(weights["model.layers.0.mlp.experts.0.up_proj.weight"].dtype) == "F8_E4M3"
