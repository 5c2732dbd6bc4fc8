"""Masks learned on text: the loss that is said, gradients, the same bytes whatever interrupts, bad input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lr import merge, open_bundle, plan
from mergekit_lr.bundle.learning import Course, Learning, Scores
from mergekit_lr.errors import CheckpointError, RecipeError, ResourceError
from mergekit_lr.evaluation import load_for_evaluation

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = EXAMPLES / "models"
LENGTH = 32


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "german.txt"
    path.write_text((EXAMPLES / "text" / "heldout" / "german.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


def recipe(text: Path | None, tasks: tuple[str, ...] = ("c", "german"), **parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "merge_method": "tall_masks",
        "base_model": str(MODELS / "base"),
        "models": [{"model": str(MODELS / t), "name": t} for t in tasks],
        "parameters": {"multi_task": "ties", "density": 0.5, "lambda": 0.5, "masks": "learned", "steps": 3}
        | parameters,
    }
    if text is not None:
        found["calibration"] = {"text": [str(text)], "samples": 12, "sequence_length": LENGTH}
    return found


def windows_of(text: Path, samples: int = 12) -> Tensor:
    """The windows as documented: consecutive, drawn by the seed, in their order."""
    _, tokenizer = load_for_evaluation(MODELS / "base")
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    every = [torch.tensor(ids[i : i + LENGTH + 1]) for i in range(0, len(ids) - LENGTH, LENGTH)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([every[i] for i in sorted(order[:samples])])


def by_hand(recovered: Any, expert: Any, windows: Tensor, label_weight: float) -> float:
    """KL(expert || recovered) + weight * cross-entropy, mean over tokens, in float64 from probabilities."""
    with torch.inference_mode():
        p, q = (n(input_ids=windows[:, :-1]).logits.double().softmax(-1) for n in (expert, recovered))
    own = q.gather(-1, windows[:, 1:, None]).log().mean()
    return float((p * (p / q).log()).sum(-1).mean() - label_weight * own)


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_the_loss_of_the_recovered_model_is_the_least_that_was_judged(
    tmp_path: Path, text: Path, label_weight: float
) -> None:
    packing = recipe(text, label_weight=label_weight, steps=12, rate=0.02)
    found = merge(packing, tmp_path / "learned", device="cpu").report
    plain = packing | {"parameters": {"multi_task": "ties", "density": 0.5, "lambda": 0.5}}
    merge({k: v for k, v in plain.items() if k != "calibration"}, tmp_path / "thresholds", device="cpu")
    losses = found["details"]["learned"]["german"]["losses"]
    assert min(losses) < losses[0]
    judging = windows_of(text)[9:]
    expert, network = (load_for_evaluation(MODELS / m)[0] for m in ("german", "base"))
    sizes = []
    for name, loss in (("thresholds", losses[0]), ("learned", min(losses))):
        with open_bundle(tmp_path / name) as bundle:
            bundle.load_into(network, "german")
            sizes.append({n: (t.dtype, t.shape) for n, t in bundle.stored.tensors.items()})
        assert by_hand(network, expert, judging, label_weight) == pytest.approx(loss, rel=1e-4)
    assert sizes[0] == sizes[1]  # the same things are stored


def test_bytes_do_not_depend_on_threads_or_on_being_stopped_between_tasks(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = recipe(text)
    merge(packing, tmp_path / "two", device="cpu", threads=2)
    real, runs = Learning.run, []

    def stopped(self: Learning, *arguments: Any) -> Any:
        runs.append(self)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Learning, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge(packing, tmp_path / "one", device="cpu", threads=1)
    merge(packing, tmp_path / "one", device="cpu", threads=1)
    assert len(runs) == 3  # the first task's masks were kept
    digests = [json.loads((tmp_path / n / "bundle.json").read_text())["digests"] for n in ("one", "two")]
    assert digests[0] == digests[1]


def test_a_scores_gradient_is_that_of_a_continuous_mask() -> None:
    g = torch.Generator().manual_seed(0)
    base, vector, weight = (torch.randn(6, generator=g) for _ in range(3))
    score = torch.rand(6, generator=g) - 0.5
    place = torch.nn.Parameter(torch.zeros(2, 3))
    mine = Scores("w", place, base, vector, score)
    before = base.clone(), vector.clone()
    mine.put()
    assert torch.equal(place.detach().view(-1), torch.where(score > 0, base + vector, base))
    mine.pull(torch.autograd.grad(((place.view(-1) - weight) ** 3).sum(), place)[0])
    mask = (score > 0).float().requires_grad_(True)
    want = torch.autograd.grad(((base + mask * vector - weight) ** 3).sum(), mask)[0]
    assert mine.score.grad is not None
    assert torch.allclose(mine.score.grad, want, rtol=1e-5)
    assert torch.equal(base, before[0]) and torch.equal(vector, before[1])  # an fp32 tensor is its own float()
    mine.pull(None)
    assert mine.score.grad is None


def test_gradients_of_parts_are_those_of_the_whole(text: Path) -> None:
    recovered, expert = (load_for_evaluation(MODELS / m)[0] for m in ("base", "german"))
    windows = windows_of(text, 5)
    places = [p for n, p in recovered.named_parameters() if "layers.1" in n or "embed" in n]
    scores = [Scores("x", p, *(torch.zeros(0) for _ in range(3))) for p in places]
    with ThreadPoolExecutor(2) as pool:
        found = Learning(recovered, expert, scores, Course(1, 0.1, 0.3)).gradients(windows, pool)
    said = recovered(input_ids=windows[:, :-1]).logits.log_softmax(-1)
    with torch.no_grad():
        meant = expert(input_ids=windows[:, :-1]).logits.log_softmax(-1)
    loss = (meant.exp() * (meant - said)).sum(-1).mean() - 0.3 * said.gather(-1, windows[:, 1:, None]).mean()
    for g, w in zip(found, torch.autograd.grad(loss, places), strict=True):
        assert g is not None
        assert torch.allclose(g, w, rtol=1e-3, atol=1e-6)


def test_planning_says_what_is_not_known_yet(text: Path) -> None:
    assert any("masks are learned" in w for w in plan(recipe(text), device="cpu").warnings)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"factor": "fitted"}, "factor of one"),
        ({"masks": "threshold"}, "steps, rate and label_weight are of masks: learned"),
        ({"rate": [{"filter": "mlp", "value": 0.1}, {"value": 0.2}]}, "differ between tensors"),
        ({"masks": [{"filter": "mlp", "value": "learned"}, {"value": "threshold"}]}, "steps, rate and label_weight"),
    ],
)
def test_what_does_not_fit_together_is_refused(text: Path, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan(recipe(text, **parameters), device="cpu")


def test_text_memory_and_models_that_do_not_do(tmp_path: Path, text: Path) -> None:
    with pytest.raises(RecipeError, match="needs text files"):
        merge(recipe(None), tmp_path / "no text", device="cpu")
    with pytest.raises(RecipeError, match="windows of text are too few"):
        few = recipe(text)
        few["calibration"]["samples"] = 3
        merge(few, tmp_path / "few", device="cpu")
    with pytest.raises(ResourceError, match=r"learning masks holds \d+ models in memory"):
        merge(recipe(text), tmp_path / "out", device="cpu", max_memory="24MiB")
    assert not (tmp_path / "out").exists()


def test_a_task_whose_model_the_base_cannot_run_is_refused(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(MODELS / "german" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "german.safetensors")
    packing = recipe(text)
    packing["models"][1]["model"] = str(tmp_path / "german.safetensors")
    with pytest.raises(CheckpointError, match=r"masks of task 'german' cannot be learned.*model\.norm\.weight"):
        merge(packing, tmp_path / "out", device="cpu")
