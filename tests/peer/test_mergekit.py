"""mergekit 0.1.5 itself, run from the command line on the same YAML and the same models.

Marked ``peer``: it builds mergekit's environment (see ``environment.py``) and each of its runs takes seconds. The
models are the committed examples, or a tiny Llama made here where those are missing.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergekit_lr import merge

from ..recorded.values import bf16_steps
from . import environment
from .allowance import allowance

pytestmark = pytest.mark.peer

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
EXPERTS = ("ft_1", "ft_2", "ft_3")
BASE: dict[str, Any] = {"base_model": "./base"}
FP32_VARIANCE = 1e-6  # variances that are equal on paper differ by this much in mergekit's fp32


def experts(*weights: float, **more: Any) -> list[dict[str, Any]]:
    """The first fine-tunes with these weights, and the same further parameters each."""
    return [
        {"model": f"./{name}", "parameters": {"weight": weight} | more}
        for name, weight in zip(EXPERTS, weights, strict=False)
    ]


def plain(*names: str) -> list[dict[str, Any]]:
    return [{"model": f"./{name}"} for name in names]


# Exact in binary: bf16 task vectors lie on a grid, and a sum that is 0 on paper must be 0 in any order of adding.
THREE = (0.5, 0.25, 0.375)
BY_LAYER = {
    "t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
}
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "linear": {"models": experts(*THREE)},
    "slerp": BASE | {"models": plain("base", "ft_1"), "parameters": BY_LAYER},
    "nuslerp": {"models": experts(0.6, 0.2)},
    "nuslerp/base": BASE | {"merge_method": "nuslerp", "models": experts(0.6, 0.2)},
    "multislerp": BASE | {"models": experts(*THREE)},
    "karcher": {"models": plain(*EXPERTS)},
    "task_arithmetic": BASE | {"models": experts(*THREE), "parameters": {"lambda": 0.9}},
    "ties": BASE | {"models": experts(*THREE, density=0.5)},
    "dare_linear": BASE | {"models": experts(*THREE, density=1)},
    "dare_ties": BASE | {"models": experts(*THREE, density=1)},
    "della": BASE | {"models": experts(*THREE, density=1)},
    "della_linear": BASE | {"models": experts(*THREE, density=1)},
    "breadcrumbs": BASE | {"models": experts(*THREE, density=0.8, gamma=0.02)},
    "breadcrumbs_ties": BASE | {"models": experts(*THREE, density=0.8, gamma=0.02)},
    "model_stock": BASE | {"models": plain(*EXPERTS)},
    "model_stock/rows": BASE
    | {"merge_method": "model_stock", "models": plain(*EXPERTS), "parameters": {"filter_wise": True}},
    "sce": BASE | {"models": plain(*EXPERTS), "parameters": {"select_topk": 0.4}},
    "passthrough": {"models": plain("ft_1"), "parameters": {"scale": 0.5}},
}


@pytest.fixture(scope="session")
def mergekit_yaml() -> Path:
    """mergekit's command."""
    return environment.ensure() / "mergekit-yaml"


def _tiny_llama(root: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", *EXPERTS):
        model.to(torch.bfloat16).save_pretrained(root / name)
        model.float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.003)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` and three fine-tunes of it."""
    root = tmp_path_factory.mktemp("peer_models")
    folders = sorted(path.parent for path in EXAMPLES.glob("*/config.json"))
    bases = [folder for folder in folders if folder.name.startswith("base")]
    tuned = [folder for folder in folders if folder not in bases]
    if not bases or len(tuned) < len(EXPERTS):
        _tiny_llama(root)
        return root
    (root / "base").symlink_to(bases[0])
    for name, folder in zip(EXPERTS, tuned, strict=False):
        (root / name).symlink_to(folder)
    return root


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= load_file(shard)
    return state


def run_both(
    recipe: dict[str, Any], mergekit_yaml: Path, models: Path, scratch: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(ours, mergekit's) tensors of one recipe; the current folder must be ``models``."""
    path = scratch / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    merge(path, scratch / "ours", device="cpu")
    command = [str(mergekit_yaml), str(path), str(scratch / "theirs"), "--no-copy-tokenizer", "--random-seed", "1"]
    done = subprocess.run(
        command, cwd=models, env=environment.quiet_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_folder(scratch / "ours"), load_folder(scratch / "theirs")


def tied_at_threshold(name: str, recipe: dict[str, Any], state: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    """Entries whose magnitude some model shares with the last one kept: mergekit's choice among them is arbitrary."""
    base = state["base"][name].float()
    size = base.numel()
    unclear = torch.zeros(size, dtype=torch.bool)
    deltas = torch.stack([state[e][name].float() - base for e in EXPERTS]).reshape(len(EXPERTS), size)
    edges: list[tuple[torch.Tensor, list[int]]] = []
    if recipe["merge_method"] == "sce":
        variance = deltas.double().var(dim=0, unbiased=False)
        edges.append((variance, [size - int(int(variance.count_nonzero()) * recipe["parameters"]["select_topk"])]))
    for delta, entry in zip(deltas, recipe["models"], strict=False):
        parameters = entry.get("parameters", {})
        if recipe["merge_method"] == "ties" and "density" in parameters:
            edges.append((delta.abs(), [size - max(1, int(parameters["density"] * size))]))
        if recipe["merge_method"].startswith("breadcrumbs"):
            kept, top = int(parameters["density"] * size), int(parameters["gamma"] * size)
            low = max(0, size - kept - top)
            edges.append((delta.abs(), [low, low + kept]))
    for magnitudes, places in edges:
        ordered = magnitudes.sort().values
        for place in places:
            if 0 < place < size:
                for edge in (ordered[place], ordered[place - 1]):
                    unclear |= (magnitudes - edge).abs() <= FP32_VARIANCE * edge
    return unclear.reshape(base.shape)


@pytest.mark.parametrize("name", sorted(DETERMINISTIC))
def test_same_yaml_same_tensors(
    name: str, mergekit_yaml: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    recipe = {"merge_method": name} | DETERMINISTIC[name] | {"dtype": "float32", "out_dtype": "bfloat16"}
    ours, theirs = run_both(recipe, mergekit_yaml, models, tmp_path)
    state = {model: load_folder(models / model) for model in ("base", *EXPERTS)}
    assert set(ours) == set(theirs)
    for tensor, value in ours.items():
        assert value.dtype == torch.bfloat16
        unclear = tied_at_threshold(tensor, recipe, state)
        tuned = [state[expert][tensor] for expert in EXPERTS]
        allowed = allowance(recipe["merge_method"], "base_model" in recipe, state["base"][tensor], tuned, unclear)
        off = (value.double() - theirs[tensor].double()).abs()
        apart = (bf16_steps(value, theirs[tensor]) > 1) & ~unclear
        if apart.any():
            print(f"{name} {tensor}: {int(apart.sum())} apart, at most {float((off / allowed)[apart].max()):.3f} of it")
        apart &= off > allowed
        assert not apart.any(), f"{name} {tensor}: {int(apart.sum())} of {value.numel()}"


def random_recipe(method: str, density: float, **parameters: Any) -> dict[str, Any]:
    """One expert at weight 1: an entry is either the base's or base + scale * delta. The scale by mergekit's rule."""
    per_model = {"weight": 1.0, "density": density} | {k: v for k, v in parameters.items() if k == "epsilon"}
    shared = {k: v for k, v in parameters.items() if k != "epsilon"} | {"rescale_by": "l1", "normalize": False}
    entry = {"model": "./ft_1", "parameters": per_model}
    return BASE | {"merge_method": method, "models": [entry], "parameters": shared, "dtype": "float32"}


def kept_and_scale(
    merged: torch.Tensor, base: torch.Tensor, tuned: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(where delta is not 0, where it was kept, its factor where kept), flat, in float64."""
    delta = (tuned.double() - base.double()).reshape(-1)
    moved = (merged.double() - base.double()).reshape(-1)
    possible = delta != 0
    kept = possible & (moved != 0)
    return possible, kept, moved[kept] / delta[kept]


def check_bernoulli(kept: int, count: int, probability: float) -> None:
    """Within five standard deviations of what ``count`` independent draws give."""
    deviation = (count * probability * (1 - probability)) ** 0.5
    assert abs(kept - count * probability) <= 5 * deviation + 1


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_agree_in_distribution(
    method: str, rescale: bool, mergekit_yaml: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both keep the same fraction, scale what they keep alike, and leave the rest exactly at the base."""
    monkeypatch.chdir(models)
    recipe = random_recipe(method, 0.4, rescale=rescale)
    both = run_both(recipe, mergekit_yaml, models, tmp_path)
    base, tuned = (load_folder(models / model) for model in ("base", "ft_1"))
    for merged in both:
        total = kept_total = 0
        for name, tensor in merged.items():
            if tensor.numel() < 4096:
                continue
            possible, kept, scale = kept_and_scale(tensor, base[name].float(), tuned[name].float())
            delta = (tuned[name].double() - base[name].double()).reshape(-1)
            l1_ratio = float(delta.abs().sum() / delta[kept].abs().sum())
            expected = l1_ratio if rescale else 1.0
            # One fp32 rounding of base + delta, seen through the smallest deltas: weigh by magnitude.
            mean_scale = float((scale * delta[kept].abs()).sum() / delta[kept].abs().sum())
            assert abs(mean_scale - expected) <= 1e-4 * expected
            total, kept_total = total + int(possible.sum()), kept_total + int(kept.sum())
        if method.startswith("dare"):
            check_bernoulli(kept_total, total, 0.4)
        else:  # zero deltas rank lowest, so what can be seen is kept a little more often than density
            assert 0.39 * total <= kept_total <= 0.55 * total


def test_della_keeps_large_entries_more_often(
    mergekit_yaml: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep fractions by rank within the row follow density - epsilon .. density + epsilon in both."""
    monkeypatch.chdir(models)
    density, epsilon, bands = 0.5, 0.3, 5
    recipe = random_recipe("della_linear", density, rescale=False, epsilon=epsilon)
    both = run_both(recipe, mergekit_yaml, models, tmp_path)
    base, tuned = (load_folder(models / model) for model in ("base", "ft_1"))
    for merged in both:
        kept_in, count_in = torch.zeros(bands), torch.zeros(bands)
        for name, tensor in merged.items():
            delta = tuned[name].float() - base[name].float()
            if delta.dim() != 2:
                continue
            moved = tensor - base[name].float()
            # Rows with equal magnitudes have no definite ranks; the mean rank of equals stands for them.
            size = delta.abs()
            below = torch.searchsorted(size.sort(dim=1).values, size).double()
            above = torch.searchsorted(size.sort(dim=1).values, size, right=True).double()
            rank = (below + above - 1) / 2 / (delta.shape[1] - 1)
            band = (rank * bands).long().clamp(max=bands - 1)
            seen = delta != 0
            count_in += torch.bincount(band[seen], minlength=bands)
            kept_in += torch.bincount(band[seen & (moved != 0)], minlength=bands)
        for band_index in range(bands):
            probability = density - epsilon + 2 * epsilon * (band_index + 0.5) / bands
            found = float(kept_in[band_index] / count_in[band_index])
            assert abs(found - probability) < 0.03, (band_index, found, probability)
