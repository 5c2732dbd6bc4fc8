"""FP8 with block scales and MXFP4: pruned as they are, decoded to be merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lr import merge
from mergekit_lr.arch.moe import MoeLayer, moe_layers
from mergekit_lr.checkpoint.model import open_folder
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.decision import Decision, LayerDecision
from mergekit_lr.experts.layout import Composition, Spec
from mergekit_lr.experts.partition import Group, Partition
from mergekit_lr.experts.quantised import decode_fp8, decode_mxfp4, encode_fp8
from mergekit_lr.experts.reduction import ExpertReduction
from mergekit_lr.experts.router import router_rows

E, HIDDEN, WIDTH = 4, 160, 136


def fp8_model(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.randn(8, HIDDEN).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(E, HIDDEN),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(E),
    }
    shapes = {"self_attn.o_proj": (HIDDEN, HIDDEN)}
    for e in range(E):
        for m in ("gate", "up", "down"):
            shapes[f"mlp.experts.{e}.{m}_proj"] = (HIDDEN, WIDTH) if m == "down" else (WIDTH, HIDDEN)
    for name, shape in shapes.items():
        name = f"model.layers.0.{name}.weight"
        tensors[name], tensors[f"{name}_scale_inv"] = encode_fp8(torch.randn(shape))
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 1, "hidden_size": HIDDEN, "n_routed_experts": E,
        "moe_intermediate_size": WIDTH, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    return written(folder, tensors, config)


def mxfp4_model(folder: Path) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, width = 64, 32

    def blocks(rows: int, columns: int) -> dict[str, torch.Tensor]:
        size = (E, rows, columns // 32)
        return {
            "_blocks": torch.randint(0, 256, (*size, 16), generator=g, dtype=torch.uint8),
            "_scales": torch.randint(122, 128, size, generator=g, dtype=torch.uint8),
        }

    mlp = "model.layers.0.mlp"
    tensors = {
        f"{mlp}.router.weight": torch.randn(E, hidden, generator=g).bfloat16(),
        f"{mlp}.router.bias": torch.randn(E, generator=g).bfloat16(),
        f"{mlp}.experts.gate_up_proj_bias": torch.randn(E, 2 * width, generator=g).bfloat16(),
        f"{mlp}.experts.down_proj_bias": torch.randn(E, hidden, generator=g).bfloat16(),
        **{f"{mlp}.experts.gate_up_proj{k}": v for k, v in blocks(2 * width, hidden).items()},
        **{f"{mlp}.experts.down_proj{k}": v for k, v in blocks(hidden, width).items()},
    }
    config = {
        "model_type": "gpt_oss", "num_hidden_layers": 1, "hidden_size": hidden, "num_local_experts": E,
        "intermediate_size": width, "num_experts_per_tok": 1,
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    return written(folder, tensors, config)


def written(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be run here: experts 0 and 2 become one with shares 1/4 and 3/4, 3 stays; pruning keeps 1 and 3."""

    def decide(self: ExpertReduction, work: Any, job: Any) -> Decision:
        found = []
        for layer in job.layers:
            if job.parts.prunes:
                groups = (Group((1,), 1), Group((3,), 3))
                own, shares = Partition(groups, (0, 2)), ((1.0,), (1.0,))
            else:
                own, shares = Partition((Group((0, 2), 0), Group((3,), 3)), (1,)), ((0.25, 0.75), (1.0,))
            rows = router_rows("mean", own, [1.0, 0.0, 3.0, 1.0], layer.experts)
            found.append(LayerDecision(layer.block, own, shares, rows, (), (1, 1, 1, 1)))
        return Decision(tuple(found))

    monkeypatch.setattr(ExpertReduction, "_decide", decide)


def run(folder: Path, out: Path, method: str, **parameters: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    recipe = {
        "merge_method": method,
        "models": [{"model": str(folder)}],
        "parameters": {"num_experts": 2, **parameters},
        "calibration": {"statistics": "none"},
    }
    merge(recipe, out, device="cpu", threads=1)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def layer_of(folder: Path) -> MoeLayer:
    with open_folder(folder, "m") as checkpoint:
        return moe_layers(checkpoint)[0]


def test_pruned_fp8_stays_fp8_to_the_bit(decided: None, tmp_path: Path) -> None:
    old = fp8_model(tmp_path / "m")
    new, config = run(tmp_path / "m", tmp_path / "out", "reap")
    assert config["quantization_config"]["quant_method"] == "fp8"
    for j, e in enumerate((1, 3)):
        for m in ("gate", "up", "down"):
            for end in ("weight", "weight_scale_inv"):
                name = "model.layers.0.mlp.experts.{}." + f"{m}_proj.{end}"
                assert torch.equal(new[name.format(j)].view(torch.uint8), old[name.format(e)].view(torch.uint8))
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        assert torch.equal(new[f"model.layers.0.mlp.{name}"], old[f"model.layers.0.mlp.{name}"][[1, 3]])


@pytest.mark.parametrize("requantize", [False, True])
def test_merged_fp8_is_decoded_and_encoded_again_only_on_demand(
    decided: None, requantize: bool, tmp_path: Path
) -> None:
    old = fp8_model(tmp_path / "m")
    new, config = run(tmp_path / "m", tmp_path / "out", "sub_moe", requantize=requantize)
    assert ("quantization_config" in config) == requantize

    def value(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        scale = f"{name}_scale_inv"
        return decode_fp8(tensors[name], tensors[scale]) if scale in tensors else tensors[name].float()

    for m in ("gate", "up", "down"):
        stem = "model.layers.0.mlp.experts.{}." + f"{m}_proj.weight"
        parts = [value(old, stem.format(e)) for e in range(E)]
        for j, want in enumerate((0.25 * parts[0] + 0.75 * parts[2], parts[3])):
            got = value(new, stem.format(j))
            error = (got - want).abs().max() / want.abs().max()
            assert error <= (2**-4 if requantize else 2**-8), (m, j)
            assert new[stem.format(j)].dtype == (torch.float8_e4m3fn if requantize else torch.bfloat16)
    attention = "model.layers.0.self_attn.o_proj.weight"
    if requantize:
        assert torch.equal(new[attention].view(torch.uint8), old[attention].view(torch.uint8))
    else:
        assert torch.equal(new[attention], value(old, attention).bfloat16())
        assert not [n for n in new if n.endswith("scale_inv")]


def test_pruned_mxfp4_is_sliced(decided: None, tmp_path: Path) -> None:
    old = mxfp4_model(tmp_path / "m")
    new, config = run(tmp_path / "m", tmp_path / "out", "reap")
    assert "quantization_config" in config
    assert new.keys() == old.keys()
    assert all(torch.equal(new[n], old[n][[1, 3]]) for n in old)


def test_merged_mxfp4_is_written_as_bfloat16_in_the_plain_layout(decided: None, tmp_path: Path) -> None:
    old = mxfp4_model(tmp_path / "m")
    new, config = run(tmp_path / "m", tmp_path / "out", "sub_moe")
    assert "quantization_config" not in config
    for stem in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        each = [decode_mxfp4(b, s).T for b, s in zip(old[f"{stem}_blocks"], old[f"{stem}_scales"], strict=True)]
        want = torch.stack([0.25 * each[0] + 0.75 * each[2], each[3]])
        assert new[stem].dtype == torch.bfloat16
        torch.testing.assert_close(new[stem].float(), want, rtol=2**-8, atol=1e-6)
        bias = old[f"{stem}_bias"].float()
        got = new[f"{stem}_bias"].float()
        torch.testing.assert_close(got, torch.stack([0.25 * bias[0] + 0.75 * bias[2], bias[3]]), rtol=2**-8, atol=1e-6)
    with pytest.raises(CheckpointError, match="not written as MXFP4"):
        run(tmp_path / "m", tmp_path / "no", "sub_moe", requantize=True)


def test_other_quantisations_are_refused(tmp_path: Path) -> None:
    fp8_model(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    for section in ({"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))
        with pytest.raises(CheckpointError, match="in a way that experts cannot be taken from"):
            run(tmp_path / "m", tmp_path / "out", "reap")


def test_narrower_outputs_are_laid_out_with_fitted_matrices(tmp_path: Path) -> None:
    """What was fitted before replaces matrices, also of another width: the seam for methods that select neurons."""
    fp8_model(tmp_path / "m")
    layer = layer_of(tmp_path / "m")
    own = Partition(tuple(Group((e,), e) for e in range(E)))
    rows = router_rows("select", own, [1.0] * E, E)
    decision = LayerDecision(layer.block, own, ((1.0,),) * E, rows)
    fitted = {}
    for e in range(E):
        for m, shape in (("gate", (8, HIDDEN)), ("up", (8, HIDDEN)), ("down", (HIDDEN, 8))):
            fitted[f"{layer.block}.experts.{e}.{m}"] = torch.full(shape, float(e))
    write_safetensors(tmp_path / "fitted.safetensors", fitted)
    from mergekit_lr.checkpoint.model import open_file

    with open_folder(tmp_path / "m", "m") as model, open_file(tmp_path / "fitted.safetensors", "f") as found:
        spec = Spec("width_shrink", width=8)
        composition = Composition(model, spec, {layer.block: decision}, [layer], fitted=(1, found))
        composition.run()
    shapes = {s.name: s.shape for s in composition.sinks}
    assert shapes[f"{layer.block}.experts.0.gate_proj.weight"] == (8, HIDDEN)
    assert shapes[f"{layer.block}.experts.3.down_proj.weight"] == (HIDDEN, 8)
    merges = [t for t in composition.tasks if t.key.startswith(f"{layer.block}.experts")]
    assert all({s.model for s in t.inputs} == {1} for t in merges)  # nothing but what was fitted is read
