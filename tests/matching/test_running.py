"""Merges that run the models: networks by their names, learned permutations, new statistics, optimal transport."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import FAMILIES, ResNet, llama, shapes_of
from safetensors.torch import load_file, save_file
from torch import nn

from mergekit_lr import barrier, merge
from mergekit_lr.arch.spec import spec_for
from mergekit_lr.errors import CheckpointError, RecipeError, ResourceError
from mergekit_lr.matching.ascent import match_weights
from mergekit_lr.matching.member import apply_all, random_member
from mergekit_lr.matching.network import network_of
from mergekit_lr.matching.soft import soft_apply, soft_match

EXAMPLES = Path(__file__).parents[2] / "examples"
Tensors = dict[str, torch.Tensor]


def state(model: nn.Module) -> Tensors:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def perceptron(seed: int, widths: tuple[int, ...] = (6, 9, 8, 3)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def write(path: Path, tensors: Tensors) -> str:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
    return str(path)


def folder(path: Path, config: dict[str, Any], tensors: Tensors) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return str(path)


def run(out: Path, *models: str, permutations: str = "auto", **more: Any) -> tuple[Tensors, dict[str, Any]]:
    options = {k: more.pop(k) for k in ("threads", "max_memory") if k in more}
    said = {"merge_method": "weight_matching", "models": [{"model": m} for m in models], "permutations": permutations}
    report = merge({**said, **more}, out, device="cpu", **{"threads": 1, **options}).report
    return load_file(out / "model.safetensors"), report


def inputs(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_a_resnet_computes_what_its_names_say() -> None:
    """Basic blocks against the network that specs are tested with, bottlenecks and large stems against transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    small = ResNet(bottleneck=False, shortcut="shortcut", head="linear").eval()
    x = inputs(2, 3, 8, 8)
    with torch.no_grad():
        small.bn1.running_mean += 0.3
        assert torch.allclose(network_of(state(small), None, "small")(x), small(x), atol=1e-6)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 12], depths=[2, 1], layer_type="bottleneck", num_labels=3
    )  # fmt: skip
    other = ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for n, t in other.named_buffers():
            t += 0.2 if "running" in n else 0
    renamed = {torchvision_name(n): t for n, t in state(other).items()}
    x = inputs(2, 3, 32, 32)
    with torch.no_grad():
        want = other(x).logits
        assert torch.allclose(network_of(renamed, None, "large")(x), want, atol=1e-5)
        assert torch.allclose(
            network_of(state(other), config.to_dict() | {"architectures": [type(other).__name__]}, "theirs")(
                pixel_values=x
            ).logits,
            want,
        )


def torchvision_name(name: str) -> str:
    import re

    name = re.sub(r"resnet\.embedder\.embedder\.convolution", "conv1", name)
    name = re.sub(r"resnet\.embedder\.embedder\.normalization", "bn1", name)
    name = re.sub(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", name)
    name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    name = re.sub(r"layer\.(\d+)\.convolution", lambda m: f"conv{int(m[1]) + 1}", name)
    name = re.sub(r"layer\.(\d+)\.normalization", lambda m: f"bn{int(m[1]) + 1}", name)
    return name.replace("classifier.1", "fc")


def test_a_perceptron_with_batch_norm_computes_what_its_names_say() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 3, bias=False)).eval()
    with torch.no_grad():
        own[1].running_mean += 0.5
        own[1].running_var *= 2
    x = inputs(5, 6)
    assert torch.allclose(network_of(state(own), None, "own", "gelu")(x), own(x), atol=1e-6)
    assert not torch.allclose(network_of(state(own), None, "own", "relu")(x), own(x), atol=1e-3)


def test_what_does_not_follow_from_the_weights_is_refused() -> None:
    cnn = FAMILIES["cnn"]().tensors
    with pytest.raises(CheckpointError, match="strides and pooling"):
        network_of({n: t for n, t in cnn.items() if int(n[0]) < 7 and "1" not in n and "4" not in n}, None, "cnn")
    with pytest.raises(CheckpointError, match="no class 'NoSuchModel'"):
        network_of({}, {"architectures": ["NoSuchModel"]}, "odd")


@cache
def pair_and_data() -> tuple[Tensors, Tensors, Tensors]:
    """Two perceptrons trained from different seeds on made-up classes, and the data."""
    x = inputs(512, 6)
    with torch.no_grad():
        scores = perceptron(99)(x)
        labels = ((scores - scores.mean(0)) / scores.std(0)).argmax(1)
    models = []
    for seed in (0, 1):
        model = perceptron(seed)
        adam = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(100):
            adam.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            adam.step()
        models.append(state(model))
    return models[0], models[1], {"inputs": x, "labels": labels}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[str, str, str, Tensors, Tensors]:
    """Two trained perceptrons and the data, on disk; and the perceptrons in memory."""
    a, b, data = pair_and_data()
    files = [write(tmp_path / f"{n}.safetensors", t) for n, t in (("a", a), ("b", b), ("data", data))]
    return files[0], files[1], files[2], a, b


def loss_of(tensors: Tensors, data: str) -> float:
    found = load_file(data)
    model = perceptron(0, (found["inputs"].shape[1], 9, 8, 3))
    model.load_state_dict(tensors)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(found["inputs"]).double(), found["labels"]))


def test_learned_permutations_have_a_lower_loss_half_way(trained, tmp_path) -> None:
    """Weights that the data never uses mislead weight matching, and say nothing to the loss."""
    _, _, _, tensors, _ = trained
    g = torch.Generator().manual_seed(1)
    one, two = (
        {**tensors, "0.weight": torch.cat([tensors["0.weight"], 1.5 * torch.randn(9, 4, generator=g)], 1)}
        for _ in range(2)
    )
    spec = spec_for("auto", shapes_of(one), None, "net")
    two = apply_all(spec, random_member(spec, 7), two)
    x, labels = pair_and_data()[2]["inputs"], pair_and_data()[2]["labels"]
    x = torch.cat([x, torch.zeros(512, 4)], 1)
    a, b = write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", two)
    data = write(tmp_path / "data.safetensors", {"inputs": x, "labels": labels})
    more = {"matching": "learned", "data": data, "steps": 60, "rate": 0.1}
    middle, report = run(tmp_path / "out", a, b, parameters=more)
    matched, _ = run(tmp_path / "matched", a, b)
    [row] = report["details"]["models"]
    assert row["loss_learned"] == pytest.approx(loss_of(middle, data), abs=1e-6)
    assert row["loss_matched"] == pytest.approx(loss_of(matched, data), abs=1e-6)
    assert row["loss_learned"] < 0.8 * row["loss_matched"]
    end, _ = run(tmp_path / "end", a, b, parameters={**more, "t": 1.0}, threads=2)
    assert loss_of(end, data) == pytest.approx(loss_of(two, data), abs=1e-6)  # still the same function as b
    saved = tmp_path / "out" / "weight_matching" / "permutations.safetensors"
    assert saved.read_bytes() == (tmp_path / "end" / "weight_matching" / "permutations.safetensors").read_bytes()
    said = {"merge_method": "weight_matching", "models": [{"model": a}, {"model": b}], "parameters": more}
    curve = barrier({**said, "permutations": "auto"}, data=data, points=3)
    assert curve["matched"][1] == pytest.approx(row["loss_learned"], abs=1e-6)


def test_learning_needs_labels_and_memory(trained, tmp_path) -> None:
    a, b, data, *_ = trained
    bare = write(tmp_path / "bare.safetensors", {"inputs": inputs(9, 6)})
    with pytest.raises(CheckpointError, match="no labels"):
        run(tmp_path / "o1", a, b, parameters={"matching": "learned", "data": bare})
    odd = write(tmp_path / "odd.safetensors", {"inputs": inputs(9, 6), "labels": torch.full((9,), 3)})
    with pytest.raises(CheckpointError, match="labels go up to 3"):
        run(tmp_path / "o2", a, b, parameters={"matching": "learned", "data": odd})
    with pytest.raises(RecipeError, match="nothing to run the models on"):
        run(tmp_path / "o3", a, b, parameters={"matching": "learned"})
    wide = write(tmp_path / "wide.safetensors", state(perceptron(2, (6, 600, 600, 3))))
    with pytest.raises(ResourceError, match="allow at least --max-memory 12MiB"):
        run(
            tmp_path / "o4", wide, write(tmp_path / "w2.safetensors", load_file(wide)),
            parameters={"matching": "learned", "data": data}, max_memory="4MiB",
        )  # fmt: skip


def test_learning_on_text_runs_a_language_model(tmp_path) -> None:
    """Fine-tunes of one base are aligned as they are; what is learned may not be worse half-way on the text."""
    text = {"text": [str(EXAMPLES / "text/heldout/python.txt")], "samples": 4, "sequence_length": 32}
    models = [str(EXAMPLES / "models" / n) for n in ("python", "c")]
    more = {"matching": "learned", "steps": 2, "only": "ffn.*", "cost": "both"}
    _, report = run(tmp_path / "out", *models, parameters=more, calibration=text)
    [row] = report["details"]["models"]
    assert 2 < row["loss_learned"] <= row["loss_matched"] < 5
    assert row["objective_after"] >= row["objective_before"]


def test_new_batch_norm_statistics_are_those_of_the_data(tmp_path) -> None:
    torch.manual_seed(0)
    models = [ResNet(bottleneck=False, shortcut="shortcut", head="linear") for _ in range(2)]
    x = inputs(264, 3, 4, 4)
    for m in models:
        m.train()
        m(x)
    a, b = (write(tmp_path / f"{n}.safetensors", state(m.eval())) for n, m in zip("ab", models, strict=True))
    data = write(tmp_path / "data.safetensors", {"inputs": x})
    plain, _ = run(tmp_path / "plain", a, b)
    found, report = run(tmp_path / "out", a, b, parameters={"reset_statistics": True, "data": data})
    assert set(report["rules"]) == {"merged", "merged, with statistics of the data", "copied: I64 is not averaged"}
    network = models[0]
    network.load_state_dict(plain)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
            m.train()
    with torch.no_grad():
        network(x[:256])
        network(x[256:])
    want = state(network)
    for n, t in found.items():
        if "running" in n:
            assert torch.allclose(t, want[n], rtol=1e-4, atol=1e-5), n
            assert not torch.allclose(t, plain[n], rtol=1e-3), n
        else:
            assert torch.equal(t, plain[n]), n
    with pytest.raises(CheckpointError, match="reset_statistics: true"):
        run(tmp_path / "no", a, b, parameters={"repair": True, "data": data})
    with pytest.raises(RecipeError, match="choose one"):
        run(tmp_path / "both", a, b, parameters={"repair": True, "reset_statistics": True, "data": data})


@pytest.mark.parametrize("t", [0.5, 0.25])
def test_repair_gives_units_the_moments_of_the_aligned_models(trained, tmp_path, t) -> None:
    a, b, data, first, second = trained
    found, _ = run(tmp_path / "out", a, b, parameters={"repair": True, "data": data, "t": t})
    moved, _ = run(tmp_path / "end", a, b, parameters={"t": 1.0})
    x = load_file(data)["inputs"]

    def moments(tensors: Tensors, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = perceptron(0)
        model.load_state_dict(tensors)
        h = model[:depth](x).detach().double()
        return h.mean(0), h.std(0, False)

    for depth in (1, 3):
        got = moments(found, depth)
        for i in (0, 1):
            want = (1 - t) * moments(first, depth)[i] + t * moments(moved, depth)[i]
            assert torch.allclose(got[i], want, atol=1e-4)
    assert torch.equal(found["4.weight"], run(tmp_path / "plain", a, b, parameters={"t": t})[0]["4.weight"])
    with pytest.raises(CheckpointError, match="no BatchNorm statistics"):
        run(tmp_path / "no", a, b, parameters={"reset_statistics": True, "data": data})
    with pytest.raises(RecipeError, match="cannot differ between tensors"):
        run(tmp_path / "t", a, b, parameters={"repair": True, "data": data, "t": [0.2, 0.4]})
    bare = write(tmp_path / "bare.safetensors", {n: x for n, x in first.items() if n != "2.bias"})
    bare2 = write(tmp_path / "bare2.safetensors", {n: x for n, x in second.items() if n != "2.bias"})
    with pytest.raises(CheckpointError, match="2 has no bias"):
        run(tmp_path / "bare", bare, bare2, parameters={"repair": True, "data": data})


def test_transport_is_what_the_functions_give(trained, tmp_path) -> None:
    a, b, _, first, second = trained
    spec = spec_for("auto", shapes_of(first), None, "net")
    found, report = run(tmp_path / "out", a, b, parameters={"matching": "transport", "t": 1.0})
    matched = match_weights(spec, first.__getitem__, second.__getitem__, restarts=3)
    moved = apply_all(spec, matched.member, second)
    plans = soft_match(spec, spec, first, moved, regularization=0.05)
    for n, t in found.items():
        assert torch.allclose(t, soft_apply(spec, plans, n, moved[n]).float(), atol=1e-6)
    assert not torch.allclose(found["2.weight"], moved["2.weight"], atol=1e-3)
    [row] = report["details"]["models"]
    assert row["mixed"] == {"hidden.0": [9, 9], "hidden.1": [8, 8]}
    saved = str(tmp_path / "out" / "weight_matching" / "permutations.safetensors")
    again, _ = run(tmp_path / "again", a, b, permutations=saved, parameters={"matching": "transport", "t": 1.0})
    assert all(torch.equal(again[n], t) for n, t in found.items())
    with pytest.raises(CheckpointError, match="holds plans of optimal transport"):
        run(tmp_path / "no", a, b, permutations=saved)


def test_a_model_with_every_neuron_twice_is_transported_back(tmp_path) -> None:
    """Twice as wide, each neuron's output halved: the same function, and an exact plan finds the narrow one again."""
    small = state(perceptron(0))
    large = dict(small)
    for before, after, n in (("0", "2", 9), ("2", "4", 8)):
        order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(n)) % n
        large[f"{before}.weight"] = large[f"{before}.weight"][order]
        large[f"{before}.bias"] = small[f"{before}.bias"][order]
        large[f"{after}.weight"] = small[f"{after}.weight"][:, order] / 2
    a, b = write(tmp_path / "a.safetensors", small), write(tmp_path / "b.safetensors", large)
    found, report = run(tmp_path / "o", a, b, parameters={"matching": "transport", "regularization": 0, "t": 1.0})
    assert all(torch.allclose(found[n], t, atol=1e-6) for n, t in small.items())
    assert report["details"]["models"][0]["agreement_before"] is None
    assert report["details"]["models"][0]["agreement_after"] == pytest.approx(1.0)
    with pytest.raises(CheckpointError, match="set the parameter `matching: transport`"):
        run(tmp_path / "no", a, b)
    deep = write(tmp_path / "deep.safetensors", state(perceptron(0, (6, 9, 9, 8, 3))))
    with pytest.raises(CheckpointError, match="is in only one of it"):
        run(tmp_path / "deep", a, deep, parameters={"matching": "transport"})
    other = write(tmp_path / "other.safetensors", state(perceptron(0, (7, 9, 8, 3))))
    with pytest.raises(CheckpointError, match="another length than in the first model"):
        run(tmp_path / "other", a, other, parameters={"matching": "transport"})


def test_language_models_of_other_widths_are_transported(tmp_path) -> None:
    """The output has the first model's config, tokenizer and shapes; heads must agree."""
    small, large = llama(), llama(intermediate_size=20)
    a, b = (
        folder(tmp_path / n, e.config, {k: t.float() for k, t in e.tensors.items()})
        for n, e in (("a", small), ("b", large))
    )
    found, report = run(tmp_path / "out", a, b, parameters={"matching": "transport", "only": "ffn.*"})
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in small.tensors.items()}
    assert report["details"]["models"][0]["mixed"] == {"ffn.0": [10, 20], "ffn.1": [10, 20]}
    assert json.loads((tmp_path / "out/config.json").read_text())["intermediate_size"] == 10
    assert bool(torch.isfinite(small.loaded(found, torch.float32)).all())  # type: ignore[misc]
    heads = llama(num_attention_heads=3, num_key_value_heads=3)
    c = folder(tmp_path / "c", heads.config, {k: t.float() for k, t in heads.tensors.items()})
    with pytest.raises(CheckpointError, match="heads and experts are not mixed"):
        run(tmp_path / "no", a, c, parameters={"matching": "transport"})


def test_planted_copies_survive_transport_of_three(trained, tmp_path) -> None:
    a, _, _, first, _ = trained
    spec = spec_for("auto", shapes_of(first), None, "net")
    others = [write(tmp_path / f"c{i}.safetensors", apply_all(spec, random_member(spec, i), first)) for i in (1, 2)]
    found, _ = run(tmp_path / "out", a, *others, parameters={"matching": "transport", "regularization": 0})
    assert all(torch.allclose(found[n], t, atol=1e-6) for n, t in first.items())


def test_what_nothing_uses_is_an_error(trained, tmp_path) -> None:
    a, b, data, *_ = trained
    with pytest.raises(RecipeError, match="no model is run on it"):
        run(tmp_path / "o1", a, b, calibration={"text": ["x.txt"]})
    with pytest.raises(RecipeError, match="set cost or matching"):
        run(tmp_path / "o2", a, b, parameters={"data": data})
