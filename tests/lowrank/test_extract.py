"""Adapters extracted from full fine-tunes: against full SVDs, PEFT's own loading, and the package's own reader."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lr import extract_lora
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import CheckpointError, NonFiniteError, ResourceError, UsageError
from mergekit_lr.lowrank.adapters import read_whole

MODELS = Path(__file__).parents[2] / "examples" / "models"
Tensors = dict[str, torch.Tensor]
Q, NORM, EMBED, HEAD = (
    "model.layers.0.q_proj.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)
SHAPES = {EMBED: (30, 12), Q: (16, 12), "model.layers.0.q_proj.bias": (16,), NORM: (12,), HEAD: (30, 12)}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 30}


def draw(seed: int, scale: float = 1.0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g) * scale for n, s in SHAPES.items()}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
        (tmp_path / name).mkdir()
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config or CONFIG))
        return tmp_path / name

    return write


@pytest.fixture
def two(make: Callable[..., Path]) -> tuple[Path, Path, Tensors, Tensors]:
    base = draw(0)
    tuned = {n: t + d for (n, t), d in zip(base.items(), draw(1, 0.1).values(), strict=True)}
    return make("tuned", tuned), make("base", base), tuned, base


def applied(base: Path, adapter: Path) -> Tensors:
    with open_model(ModelReference.parse(f"{base}+{adapter}")) as checkpoint:
        return {n: read_whole(checkpoint, n) for n in checkpoint.tensors}


def test_the_pairs_are_truncated_svds_and_the_rest_is_exact(two, tmp_path) -> None:
    model, base, tuned, old = two
    report = extract_lora(model, base, tmp_path / "out", rank=3).report
    found = applied(base, tmp_path / "out")
    change = (tuned[Q] - old[Q]).double()
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    torch.testing.assert_close(found[Q].double() - old[Q], (u[:, :3] * s[:3]) @ vh[:3], atol=1e-6, rtol=0)
    for name in SHAPES.keys() - {Q}:
        assert torch.equal(found[name], tuned[name]), name
    [(path, facts)] = report["modules"].items()
    assert path == "model.layers.0.q_proj" and facts["rank"] == 3
    assert facts["relative_error"] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)
    assert report["relative_error"] == pytest.approx(facts["relative_error"])
    assert report["bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values())


def test_full_rank_gives_the_model_back(two, tmp_path) -> None:
    model, base, tuned, _ = two
    extract_lora(model, base, tmp_path / "out", rank=99, embeddings="lora")
    found = applied(base, tmp_path / "out")
    for name, tensor in tuned.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=0)


def test_energy_decides_ranks_and_rank_is_the_most(two, tmp_path) -> None:
    model, base, tuned, old = two
    s = torch.linalg.svdvals((tuned[Q] - old[Q]).double())
    wanted = int((s.square().cumsum(0) < 0.8 * s.square().sum()).sum()) + 1
    report = extract_lora(model, base, tmp_path / "out", energy=0.8).report
    assert report["modules"]["model.layers.0.q_proj"]["rank"] == wanted > 2
    capped = extract_lora(model, base, tmp_path / "capped", energy=0.8, rank=2).report
    assert capped["modules"]["model.layers.0.q_proj"]["rank"] == 2


def test_ranks_that_differ_are_patterns(two, make, tmp_path) -> None:
    _, base, tuned, old = two
    line = old[Q] + torch.outer(tuned[NORM].repeat(2)[:16], tuned[NORM])
    extract_lora(make("line", {**tuned, Q: line}), base, tmp_path / "out", energy=0.9, embeddings="lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {n: t.shape[0] for n, t in tensors.items() if "lora_A" in n or "embedding_A" in n}
    assert len(ranks) == 3 and config["rank_pattern"] == config["alpha_pattern"] != {}, ranks
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape[1] == 30
    applied(base, tmp_path / "out")  # the reader compares ranks with the configuration


def test_what_is_left_out_is_said(two, tmp_path) -> None:
    model, base, _, old = two
    report = extract_lora(model, base, tmp_path / "out", rank=2, embeddings="drop", exclude=["norm"]).report
    assert report["dropped"] == {
        EMBED: "dropped: an embedding or a head",
        HEAD: "dropped: an embedding or a head",
        NORM: "dropped: excluded",
    }
    found = applied(base, tmp_path / "out")
    assert all(torch.equal(found[n], old[n]) for n in (EMBED, HEAD, NORM))
    only = extract_lora(model, base, tmp_path / "only", rank=2, include=["nothing"]).report
    assert only["modules"] == {} and only["dropped"][Q] == "dropped: not included"


def test_adding_one_tensor_to_both_changes_nothing(make, two, tmp_path) -> None:
    model, base, tuned, old = two
    shift = {n: torch.round(t * 4) for n, t in draw(7).items()}
    moved = (
        make("m2", {n: t + shift[n] for n, t in tuned.items()}),
        make("b2", {n: t + shift[n] for n, t in old.items()}),
    )
    extract_lora(model, base, tmp_path / "one", rank=2)
    extract_lora(*moved, tmp_path / "two", rank=2)
    one, two_ = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    for a in (n for n in one if "lora_A" in n):
        b = a.replace("lora_A", "lora_B")
        torch.testing.assert_close(one[b] @ one[a], two_[b] @ two_[a], atol=1e-4, rtol=0)


def test_gpt2_stores_its_matrices_the_other_way(make, tmp_path) -> None:
    names = {"h.0.attn.c_attn.weight": (12, 36), "h.0.attn.c_attn.bias": (36,), "wte.weight": (20, 12)}
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=g) for n, s in names.items()}
    tuned = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in base.items()}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 20}
    b, m = make("base", base, config), make("tuned", tuned, config)
    extract_lora(m, b, tmp_path / "out", rank=12)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.h.0.attn.c_attn.lora_A.weight"].shape == (12, 12)
    assert tensors["base_model.model.h.0.attn.c_attn.lora_B.weight"].shape == (36, 12)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is True and settings["bias"] == "all" and settings["ensure_weight_tying"] is True
    found = applied(b, tmp_path / "out")
    for name, tensor in tuned.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-6, rtol=0)


@pytest.mark.parametrize("embeddings", ["save", "lora"])
def test_peft_loads_an_example_and_computes_the_same(embeddings: Any, tmp_path: Path) -> None:
    """Logits of PEFT's own model against those of the weights as the package's reader gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, tuned = MODELS / "base", MODELS / "german"
    report = extract_lora(tuned, base, tmp_path / "out", rank=8, embeddings=embeddings).report
    assert len(report["modules"]) == 28 + (embeddings == "lora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True and "q_proj" in config["target_modules"]
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a renamed attribute
        adapted = PeftModel.from_pretrained(network, tmp_path / "out").eval()
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    missing = ours.load_state_dict(applied(base, tmp_path / "out"), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys in ([], ["lm_head.weight"])
    ids = torch.arange(40).reshape(2, 20) * 7
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, ours.eval()(ids).logits, atol=2e-4, rtol=1e-4)


def test_more_rank_is_nearer_to_the_fine_tune(tmp_path: Path) -> None:
    errors = [
        extract_lora(MODELS / "python", MODELS / "base", tmp_path / str(r), rank=r).report["relative_error"]
        for r in (4, 16, 64)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_bytes_do_not_depend_on_threads(two, tmp_path) -> None:
    model, base, _, _ = two
    for threads in (1, 3):
        extract_lora(model, base, tmp_path / str(threads), rank=3, embeddings="lora", threads=threads)
    one, three = ((tmp_path / t / "adapter_model.safetensors").read_bytes() for t in ("1", "3"))
    assert one == three


def test_bad_input(two, make, tmp_path) -> None:
    model, base, tuned, old = two
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="no rank"):
        extract_lora(model, base, out)
    with pytest.raises(UsageError, match="energy"):
        extract_lora(model, base, out, energy=1.5)
    with pytest.raises(UsageError, match="regular expression"):
        extract_lora(model, base, out, rank=1, exclude=["("])
    with pytest.raises(UsageError, match="dtype"):
        extract_lora(model, base, out, rank=1, dtype="int8")
    with pytest.raises(CheckpointError, match="does not differ"):
        extract_lora(base, make("same", old), out, rank=1)
    with pytest.raises(CheckpointError, match=r"'extra' is in .*tuned2 and not in"):
        extract_lora(make("tuned2", {**tuned, "extra": torch.ones(2)}), base, tmp_path / "o2", rank=1)
    with pytest.raises(CheckpointError, match=r"is \[4, 12\] and in the base \[16, 12\]"):
        extract_lora(make("tuned3", {**tuned, Q: tuned[Q][:4]}), base, tmp_path / "o3", rank=1)
    with pytest.raises(ResourceError, match="held whole"):
        extract_lora(model, base, tmp_path / "o4", rank=1, max_memory=1000)
    spoilt = {**tuned, Q: tuned[Q].clone()}
    spoilt[Q][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        extract_lora(make("tuned4", spoilt), base, tmp_path / "o5", rank=1)
    assert not out.exists() and not (tmp_path / "o5").exists()


def test_what_no_adapter_can_hold_is_refused_only_where_it_changed(two, make, tmp_path) -> None:
    _, _, tuned, old = two
    odd = {"A_log": torch.ones(3), "experts.gate_up": torch.ones(2, 3, 4)}
    same = make("m5", {**tuned, **odd}), make("b5", {**old, **odd})
    extract_lora(*same, tmp_path / "fine", rank=1)
    changed = make("m6", {**tuned, **odd, "A_log": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="'A_log' differs from the base and cannot be in an adapter"):
        extract_lora(changed, same[1], tmp_path / "out", rank=1)
    report = extract_lora(changed, same[1], tmp_path / "out", rank=1, exclude=["A_log"], resume=False).report
    assert report["dropped"] == {"A_log": "dropped: excluded"}


def test_another_request_does_not_go_on_with_unfinished_work(two, tmp_path, monkeypatch) -> None:
    from mergekit_lr.lowrank import extract

    model, base, _, _ = two

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(extract, "assemble", lambda *a, **k: interrupt())
        with pytest.raises(KeyboardInterrupt):
            extract_lora(model, base, tmp_path / "out", rank=2)
    with pytest.raises(UsageError, match="changed since: rank"):
        extract_lora(model, base, tmp_path / "out", rank=3)
    extract_lora(model, base, tmp_path / "out", rank=2)
    with pytest.raises(UsageError, match="exists already"):
        extract_lora(model, base, tmp_path / "out", rank=2)
