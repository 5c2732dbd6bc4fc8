"""Every entry of a statistics file against a float64 recomputation that shares no code with the package.

The reference runs the whole model with plain hooks on its routers, takes inputs, indices and weights from them, and
computes each expert in float64 from the tensors *on disk*, by the formula of its family.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergekit_lr
from mergekit_lr.calibration.layers import windows_for
from mergekit_lr.calibration.network import mask_of
from mergekit_lr.calibration.statistics import MIXTURE_ENTRIES, open_statistics
from mergekit_lr.calibration.text import sample_rows
from mergekit_lr.checkpoint.model import open_folder
from mergekit_lr.errors import CheckpointError

from .test_stream import whole

Model = Callable[[str], Path]
SETTINGS: dict[str, Any] = {"samples": 5, "sequence_length": 40, "seed": 1}
SAMPLE = 60
BLOCKS = {
    "mixtral": "block_sparse_moe",
    "qwen3_moe": "mlp",
    "olmoe": "mlp",
    "deepseek_v3": "mlp",
    "glm4_moe": "mlp",
    "gpt_oss": "mlp",
    "granitemoe": "block_sparse_moe",
    "phimoe": "block_sparse_moe",
    "llama4_text": "feed_forward",
}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def expert(name: str, disk: dict[str, Tensor], block: str, e: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(h, y) of one expert on float64 rows, from the tensors on disk."""

    def get(tensor: str) -> Tensor:
        return disk[f"{block}.{tensor}"].double()

    if name in ("mixtral", "phimoe"):
        h = silu(x @ get(f"experts.{e}.w1.weight").T) * (x @ get(f"experts.{e}.w3.weight").T)
        return h, h @ get(f"experts.{e}.w2.weight").T
    if name == "gpt_oss":
        z = x @ get("experts.gate_up_proj")[e] + get("experts.gate_up_proj_bias")[e]
        gate, up = z[:, 0::2].clamp(max=7.0), z[:, 1::2].clamp(-7.0, 7.0)
        h = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        return h, h @ get("experts.down_proj")[e] + get("experts.down_proj_bias")[e]
    if name == "granitemoe":
        z = x @ get("input_linear.weight")[e].T
        width = z.shape[1] // 2
        h = silu(z[:, :width]) * z[:, width:]
        return h, h @ get("output_linear.weight")[e].T
    if name == "llama4_text":
        z = x @ get("experts.gate_up_proj")[e]
        width = z.shape[1] // 2
        h = silu(z[:, :width]) * z[:, width:]
        return h, h @ get("experts.down_proj")[e]
    h = silu(x @ get(f"experts.{e}.gate_proj.weight").T) * (x @ get(f"experts.{e}.up_proj.weight").T)
    return h, h @ get(f"experts.{e}.down_proj.weight").T


def routers_seen(folder: Path, batch: Any) -> dict[int, tuple[Tensor, ...]]:
    """Layer -> (inputs, logits, weights, indices) of its router in one forward of the whole model."""
    network = whole(folder)
    seen: dict[int, tuple[Tensor, ...]] = {}

    def hook(layer: int) -> Callable[..., None]:
        def note(module: Any, args: Any, out: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if len(out) == 2:  # Llama-4: scores of all experts, 0 where not chosen, and logits
                weights, indices = out[0].max(dim=1, keepdim=True)
                seen[layer] = (x, out[1], weights, indices)
            else:
                seen[layer] = (x, *out)

        return note

    for layer, module in enumerate(network.model.layers):
        for child, router in module.named_modules():
            if child in ("mlp.gate", "mlp.router", "block_sparse_moe.router", "feed_forward.router"):
                router.register_forward_hook(hook(layer))
    mask = mask_of(batch.lengths, batch.ids.shape[1], torch.device("cpu"))
    with torch.inference_mode():
        network(input_ids=batch.ids, attention_mask=mask, use_cache=False)
    return seen


def reference(name: str, disk: dict[str, Tensor], block: str, seen: tuple[Tensor, ...], rows: Tensor) -> dict[str, Any]:
    """All entries of one mixture, token by token where that is plainest."""
    x, logits, weights, indices = (s.double() if s.is_floating_point() else s for s in seen)
    count, experts = logits.shape
    gates = torch.zeros(count, experts, dtype=torch.float64)
    chosen = torch.zeros(count, experts, dtype=torch.int64)
    for t in range(count):
        for weight, e in zip(weights[t], indices[t], strict=True):
            gates[t, e], chosen[t, e] = weight, 1
    softmax = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    out: dict[str, Any] = {
        "tokens": count,
        "routing_count": chosen.sum(0),
        "coselection": torch.einsum("ti,tj->ij", chosen, chosen),
        "gate_sum": gates.sum(0),
        "gate_gram": torch.einsum("ti,tj->ij", gates, gates),
        "gate_mass": softmax.sum(0),
        "router_gram": torch.einsum("ti,tj->ij", logits, logits),
        "router_softmax_gram": torch.einsum("ti,tj->ij", softmax, softmax),
        "expert_tokens": len(rows),
        "input_gram": torch.einsum("th,tk->hk", x, x),
    }
    columns: dict[str, list[Any]] = {}
    for e in range(experts):
        mine = chosen[:, e].bool()
        inside = name == "llama4_text"
        h, y = expert(name, disk, block, e, x[mine] * (gates[mine, e, None] if inside else 1))
        factor = torch.ones_like(gates[mine, e]) if inside else gates[mine, e]
        norm = torch.sqrt((y * y).sum(1))
        for entry, value in {
            "output_norm_sum": norm.sum(),
            "output_square_sum": (norm**2).sum(),
            "gated_norm_sum": (factor * norm).sum(),
            "gated_square_sum": (factor**2 * norm**2).sum(),
            "output_max_norm": norm.max() if len(norm) else torch.tensor(0.0),
            "output_max_abs": y.abs().max() if len(norm) else torch.tensor(0.0),
            "output_sum": y.sum(0),
            "hidden_gram": (factor[:, None] * h).T @ (factor[:, None] * h),
        }.items():
            columns.setdefault(entry, []).append(value.double())
    if name == "llama4_text":
        del columns["hidden_gram"]
    out |= {entry: torch.stack(values) for entry, values in columns.items()}
    everything = torch.stack([expert(name, disk, block, e, x[rows])[1] for e in range(experts)])
    unit = everything / everything.norm(dim=-1, keepdim=True)
    return out | {
        "expert_gram": torch.einsum("ish,jsh->ij", everything, everything),
        "expert_cosine_gram": torch.einsum("ish,jsh->ij", unit, unit),
        "expert_output_sum": everything.sum(1),
    }


@pytest.mark.parametrize("name", list(BLOCKS))
def test_every_entry_against_float64(model: Model, texts: list[Path], tmp_path: Path, name: str) -> None:
    folder, out = model(name), tmp_path / "s.safetensors"
    mergekit_lr.calibrate(
        folder, out, texts, **SETTINGS, similarity_tokens=SAMPLE, grams=("input", "hidden"), device="cpu"
    )
    with open_folder(folder, name) as checkpoint, open_statistics(out, checkpoint) as statistics:
        windows = windows_for(checkpoint, texts, **SETTINGS)
        [batch] = windows.batches()
        [rows] = sample_rows(windows, [batch], SAMPLE, 1)
        assert len(rows) == SAMPLE == len(set(rows.tolist())) and bool(batch.valid[rows].all())
        place = torch.full((len(batch.valid),), -1).masked_scatter(batch.valid, torch.arange(windows.tokens))
        disk = load_file(folder / "model.safetensors")
        seen = routers_seen(folder, batch)
        assert list(statistics.mixtures) == sorted(seen)
        for layer, mixture in statistics.mixtures.items():
            block = f"model.layers.{layer}.{BLOCKS[name]}"
            kept = tuple(s[batch.valid] for s in seen[layer])
            wanted = reference(name, disk, block, kept, place[rows])
            assert mixture.prefix == f"{block}.experts"
            assert set(wanted) == {e for e in MIXTURE_ENTRIES if e in mixture}
            for entry, value in wanted.items():
                found, value = mixture[entry].double(), torch.as_tensor(value, dtype=torch.float64)
                scale = value.abs().max().clamp_min(1e-12)
                torch.testing.assert_close(
                    found.reshape(value.shape) / scale, value / scale, rtol=1e-5, atol=2e-6, msg=f"{layer} {entry}"
                )
            assert torch.equal(mixture.routing_count, wanted["routing_count"])
            assert torch.equal(mixture["coselection"], wanted["coselection"])
            assert torch.allclose(mixture.frequency.sum(), torch.tensor(float(indices_per_token(seen[layer]))).double())
            assert torch.allclose(mixture.cosine.diagonal(), torch.ones(len(mixture.cosine)).double())


def indices_per_token(seen: tuple[Tensor, ...]) -> int:
    return seen[3].shape[1]


def test_linear_grams_of_a_dense_model(model: Model, texts: list[Path], tmp_path: Path) -> None:
    """X^T X of every Linear's input, caught by hooks on the whole model, padding left out."""
    folder, out = model("llama"), tmp_path / "s.safetensors"
    mergekit_lr.calibrate(folder, out, texts, **SETTINGS, grams=("linear",), device="cpu")
    with open_folder(folder, "llama") as checkpoint, open_statistics(out, checkpoint) as statistics:
        windows = windows_for(checkpoint, texts, **SETTINGS)
        [batch] = windows.batches()
        network, seen = whole(folder), {}
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0]}))
        mask = mask_of(batch.lengths, batch.ids.shape[1], torch.device("cpu"))
        with torch.inference_mode():
            network(input_ids=batch.ids, attention_mask=mask, use_cache=False)
        assert len(seen) == 2 * 7 + 1
        assert not statistics.mixtures
        assert {n.removesuffix(".gram") for n in statistics.checkpoint.tensors if n.endswith(".gram")} == {
            f"{name}.weight" for name in seen
        }
        for name, inputs in seen.items():
            x = inputs.flatten(0, 1)[batch.valid].double()
            gram = statistics.gram(f"{name}.weight")
            assert gram.dtype == torch.float32 and torch.equal(gram, gram.T)
            torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
            assert statistics.gram_tokens(f"{name}.weight") == windows.tokens == len(x)


def test_what_is_missing_or_of_another_model_is_refused(model: Model, texts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    mergekit_lr.calibrate(model("mixtral"), out, texts, **SETTINGS, similarity_tokens=0, device="cpu")
    with open_folder(model("olmoe"), "olmoe") as other:
        with pytest.raises(CheckpointError, match="another model"):
            open_statistics(out, other)
        open_statistics(out, other, any_model=True).close()
    with open_statistics(out) as statistics:
        assert statistics.metadata["samples"] == "5" and statistics.metadata["sequence_length"] == "40"
        with pytest.raises(CheckpointError, match=r"expert_gram.*--similarity-tokens"):
            statistics.mixture(0)["expert_gram"]
        with pytest.raises(CheckpointError, match=r"input_gram.*--grams input"):
            statistics.mixture(1)["input_gram"]
        with pytest.raises(CheckpointError, match=r"q_proj.weight.gram.*--grams linear"):
            statistics.gram("model.layers.0.self_attn.q_proj.weight")
        with pytest.raises(CheckpointError, match="no statistics of a mixture of experts in layer 7"):
            statistics.mixture(7)
    with pytest.raises(CheckpointError, match="not a statistics file"):
        open_statistics(model("mixtral") / "model.safetensors")
