"""Optimizer states as real programs write them, and hostile ones."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mergekit_lr
from mergekit_lr.curvatures import distributed, state
from mergekit_lr.errors import CheckpointError, NonFiniteError, UsageError

BASE = Path(__file__).parents[2] / "examples" / "models" / "base"


@pytest.fixture
def nearby(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions in this process instead of a confined one, which takes seconds to import torch."""

    def convert(sources: list[Path], target: Path, module: str, kind: str) -> None:
        try:
            state.converted(kind, sources[0], target)
        except CheckpointError as e:
            raise CheckpointError("refused", why=e.what) from e

    monkeypatch.setattr(state, "convert", convert)
    monkeypatch.setattr(state, "confine", lambda nbytes: None)
    monkeypatch.setattr(distributed, "confine", lambda nbytes: None)


def tiny(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, tied embeddings, biases in attention: parameters with and without weight decay."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True, max_position_embeddings=32,
        )
    )  # fmt: skip


def trained(optimizer: Any, model: nn.Module, steps: int = 3) -> None:
    for step in range(steps):
        ids = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def expected(optimizer: torch.optim.Optimizer, model: nn.Module, beta2: float) -> dict[str, torch.Tensor]:
    """Corrected second moments by name, from the live optimizer."""
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        found[name] = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
    return found


def check(out: Path, want: dict[str, torch.Tensor], rtol: float = 1e-6) -> None:
    found = load_file(out)
    assert set(found) == {f"{n}.exp_avg_sq" for n in want}
    for name, v in want.items():
        assert torch.allclose(found[f"{name}.exp_avg_sq"], v, rtol=rtol, atol=0), name


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as f:
        found: dict[str, str] = f.metadata()
    return found


@pytest.mark.filterwarnings("ignore")  # the Trainer's own deprecations
def test_a_trainer_checkpoint_of_an_example_model(tmp_path: Path) -> None:
    """Written by the transformers Trainer itself; read back by name, equal to its live optimizer."""
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = torch.randint(0, 1000, (8, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=2, save_steps=3, adam_beta2=0.98, weight_decay=0.1,
        report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-4,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    written = mergekit_lr.curvature(checkpoint, tmp_path / "v.safetensors")
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    want = expected(optimizer, model, 0.98)
    assert len(want) == 38
    check(written.out, want)
    facts = metadata(written.out)
    assert (facts["source"], facts["step"], facts["beta2"]) == ("trainer", "3", "0.98")
    assert (facts["bias_corrected"], facts["batch_size"]) == ("true", "2")


def saved_by_torch(tmp_path: Path, groups: str, **more: Any) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model = tiny()
    named = list(model.named_parameters())
    if groups == "one":
        split: Any = [p for _, p in named]
    else:
        plain = (lambda n, p: p.ndim <= 1) if groups == "vectors" else (lambda n, p: "bias" in n or "norm" in n)
        split = [
            {"params": [p for n, p in named if not plain(n, p)], "weight_decay": 0.1},
            {"params": [p for n, p in named if plain(n, p)], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(split, lr=1e-3, betas=(0.9, 0.9), **more)
    trained(optimizer, model)
    model.save_pretrained(tmp_path / "ckpt")
    torch.save(optimizer.state_dict(), tmp_path / "ckpt" / "optimizer.pt")
    return tmp_path / "ckpt", model, optimizer


@pytest.mark.parametrize("groups", ["one", "trainer", "vectors"])
def test_numbered_parameters_of_other_groupings(nearby: None, tmp_path: Path, groups: str) -> None:
    folder, model, optimizer = saved_by_torch(tmp_path, groups)
    check(mergekit_lr.curvature(folder, tmp_path / "v.safetensors").out, expected(optimizer, model, 0.9))


def test_names_in_the_optimizers_order(nearby: None, tmp_path: Path) -> None:
    folder, model, optimizer = saved_by_torch(tmp_path, "trainer")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json.*--names"):
        mergekit_lr.curvature(folder, tmp_path / "v.safetensors")
    by_id = {id(p): n for n, p in model.named_parameters()}
    names = [by_id[id(p)] for g in optimizer.param_groups for p in g["params"]]
    (tmp_path / "names.json").write_text(json.dumps(names))
    out = mergekit_lr.curvature(folder, tmp_path / "v.safetensors", names=tmp_path / "names.json").out
    check(out, expected(optimizer, model, 0.9))


def test_numbers_that_do_not_fit_the_model(nearby: None, tmp_path: Path) -> None:
    folder, _, _ = saved_by_torch(tmp_path, "trainer")
    other = LlamaConfig.from_pretrained(folder)
    other.intermediate_size = 40
    other.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"do not fit the model.*\[24, 16\].*gate_proj.*\[40, 16\]"):
        mergekit_lr.curvature(folder, tmp_path / "v.safetensors")
    assert not (tmp_path / "v.safetensors").exists()


def test_names_in_the_state_itself(nearby: None, tmp_path: Path) -> None:
    """As FSDP saves a whole state: parameters by name, wrapped."""
    folder, model, optimizer = saved_by_torch(tmp_path, "one")
    plain = optimizer.state_dict()
    names = [n for n, _ in model.named_parameters()]
    state = {f"_fsdp_wrapped_module.{names[i]}": s for i, s in plain["state"].items()}
    torch.save({"state": state, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.9)}]}, folder / "optimizer.bin")
    (folder / "optimizer.pt").unlink()
    check(mergekit_lr.curvature(folder, tmp_path / "v.safetensors").out, expected(optimizer, model, 0.9))


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_distributed_checkpoint(tmp_path: Path, one_process: None, sharded: bool) -> None:
    """Written by torch.distributed.checkpoint, with FSDP2 (whose tensors are DTensors) and without."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = tiny()
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    trained(optimizer, model)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / ".metadata").exists()
    want = expected(optimizer, model, 0.95)
    want = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in want.items()}
    written = mergekit_lr.curvature(tmp_path / "ckpt", tmp_path / "v.safetensors")
    if written.metadata["bias_corrected"] == "false":  # the betas were not found
        raise AssertionError(written)
    check(written.out, want)


def test_a_deepspeed_universal_checkpoint(tmp_path: Path) -> None:
    """Laid out as ds_to_universal writes it: a folder for each parameter, ``{"param": tensor}`` or a tensor."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained(optimizer, model)
    zero = tmp_path / "global_step3_universal" / "zero"
    for k, (name, p) in enumerate(model.named_parameters()):
        folder = zero / name
        folder.mkdir(parents=True)
        v = optimizer.state[p]["exp_avg_sq"]
        torch.save({"param": v, "cat_dim": 0} if k % 2 else v, folder / "exp_avg_sq.pt")
        torch.save(p.detach(), folder / "fp32.pt")
        torch.save(torch.tensor(3.0), folder / "step.pt")
    written = mergekit_lr.curvature(tmp_path, tmp_path / "v.safetensors")
    assert written.metadata["bias_corrected"] == "false"
    assert any("beta2" in w for w in written.warnings)
    check(written.out, {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters()})


def quantised(v: torch.Tensor, qmap: torch.Tensor, block: int) -> dict[str, torch.Tensor]:
    flat = torch.nn.functional.pad(v.flatten(), (0, -v.numel() % block)).view(-1, block)
    absmax = flat.amax(1)
    codes = (flat[..., None] / absmax[:, None, None].clamp(min=1e-30) - qmap).abs().argmin(-1).to(torch.uint8)
    return {"state2": codes.flatten()[: v.numel()].view(v.shape), "qmap2": qmap, "absmax2": absmax}


def test_eight_bit_adam(nearby: None, tmp_path: Path) -> None:
    """bitsandbytes' layout: codes, a map of 256 values, one scale for each block of 256; small tensors in fp32."""
    qmap = torch.linspace(0, 1, 256) ** 3
    v = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) * 1e-6
    parts = quantised(v, qmap, 256)
    state = {
        0: {"step": 5, "state1": torch.zeros(40, 30, dtype=torch.uint8), **parts},
        1: {"step": 5, "state2": torch.full((30,), 2e-7)},
    }
    groups = [{"params": [0, 1], "param_names": ["a.weight", "b.bias"], "lr": 1.0, "betas": (0.9, 0.999)}]
    torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.pt")
    found = load_file(mergekit_lr.curvature(tmp_path / "optimizer.pt", tmp_path / "v.safetensors").out)
    correction = 1 - 0.999**5
    by_hand = torch.tensor(
        [
            [float(qmap[int(parts["state2"][i, j])]) * float(parts["absmax2"][(i * 30 + j) // 256]) for j in range(30)]
            for i in range(40)
        ]
    )
    assert torch.allclose(found["a.weight.exp_avg_sq"], by_hand / correction, rtol=1e-5)
    assert torch.allclose(found["b.bias.exp_avg_sq"], torch.full((30,), 2e-7 / correction), rtol=1e-5)
    assert float((found["a.weight.exp_avg_sq"] * correction - v).abs().max()) < 2e-8


def test_adafactor_of_transformers(nearby: None, tmp_path: Path) -> None:
    """Its rows and columns are means; ours are sums, with the same outer product as its own update uses."""
    from transformers.optimization import Adafactor

    layer = nn.Linear(6, 4)
    optimizer = Adafactor(layer.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    for step in range(3):
        layer(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["weight", "bias"]
    torch.save(saved, tmp_path / "optimizer.pt")
    found = load_file(mergekit_lr.curvature(tmp_path / "optimizer.pt", tmp_path / "v.safetensors").out)
    state = optimizer.state[layer.weight]
    row, column = state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double()
    theirs = torch.outer(row / row.mean(), column)
    sums = found["weight.exp_avg_sq.row"].double(), found["weight.exp_avg_sq.col"].double()
    assert torch.allclose(torch.outer(*sums) / sums[0].sum(), theirs, rtol=1e-5)
    assert torch.allclose(found["bias.exp_avg_sq"], optimizer.state[layer.bias]["exp_avg_sq"])


def test_adafactor_of_torch(nearby: None, tmp_path: Path) -> None:
    layer = nn.Linear(6, 4)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(torch.randn(5, 6)).square().sum().backward()
    g2 = layer.weight.grad.double().square()  # type: ignore[union-attr]
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["weight", "bias"]
    torch.save(saved, tmp_path / "optimizer.pt")
    found = load_file(mergekit_lr.curvature(tmp_path / "optimizer.pt", tmp_path / "v.safetensors").out)
    assert torch.allclose(found["weight.exp_avg_sq.row"].double(), g2.sum(1), rtol=1e-4)
    assert torch.allclose(found["weight.exp_avg_sq.col"].double(), g2.sum(0), rtol=1e-4)


def test_forms_of_the_output(tmp_path: Path) -> None:
    """The spec's matrix: [[1, 2], [3, 4]] has row sums 3, 7 and column sums 4, 6, so [[1.2, 1.8], [2.8, 4.2]]."""
    save_file(
        {"w": torch.tensor([[1.0, 2.0, 0], [3, 4, 0], [0, 0, 0]]), "b": torch.ones(3)}, tmp_path / "v.safetensors"
    )
    out = mergekit_lr.curvature(tmp_path / "v.safetensors", tmp_path / "r.safetensors", form="rank1").out
    found = load_file(out)
    assert found["w.exp_avg_sq.row"].tolist() == [3, 7, 0]
    assert found["w.exp_avg_sq.col"].tolist() == [4, 6, 0]
    from mergekit_lr.checkpoint.companion import open_companion

    with open_companion(str(out), [".exp_avg_sq"], what="x", make="y", factored=True) as opened:
        whole = opened.read("w", 0, 9).view(3, 3)
        assert torch.allclose(whole[:2, :2], torch.tensor([[1.2, 1.8], [2.8, 4.2]]))
        assert whole[2].tolist() == [0, 0, 0]
        assert torch.equal(opened.read("w", 2, 5), whole.flatten()[2:5])
    narrow = mergekit_lr.curvature(tmp_path / "v.safetensors", tmp_path / "n.safetensors", dtype="bfloat16").out
    assert load_file(narrow)["w.exp_avg_sq"].dtype == torch.bfloat16


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch /tmp/mergekit_lr_was_here",)


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path) -> None:
    marker = Path("/tmp/mergekit_lr_was_here")
    marker.unlink(missing_ok=True)
    torch.save({"state": Evil()}, tmp_path / "optimizer.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil()))
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    zero = tmp_path / "ds" / "zero" / "w"
    zero.mkdir(parents=True)
    torch.save(Evil(), zero / "exp_avg_sq.pt")
    for source in (tmp_path / "optimizer.pt", tmp_path / "raw.pt", folder, tmp_path / "ds"):
        with pytest.raises(CheckpointError):
            mergekit_lr.curvature(source, tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()
    assert not marker.exists()


def test_a_bomb_in_the_memo_of_distributed_metadata(tmp_path: Path) -> None:
    """LONG_BINPUT 2^31 makes CPython's unpickler allocate a table of that size: the confined process refuses."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04}r\xff\xff\xff\x7f.")
    with pytest.raises(CheckpointError):
        mergekit_lr.curvature(tmp_path, tmp_path / "out.safetensors")


def test_damaged_and_useless_states(nearby: None, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    model = nn.Linear(3, 2)
    for optimizer in (torch.optim.SGD(model.parameters(), momentum=0.9),):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        with pytest.raises(CheckpointError, match="no second moments"):
            mergekit_lr.curvature(tmp_path / "optimizer.pt", out)
    groups = [{"params": [0], "param_names": ["w"], "lr": 1.0}]
    for value in (float("nan"), -1.0):
        state = {0: {"step": 1, "exp_avg_sq": torch.tensor([1.0, value])}}
        torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.pt")
        with pytest.raises(NonFiniteError, match="second moments of 'w"):
            mergekit_lr.curvature(tmp_path / "optimizer.pt", out)
    groups[0]["param_names"] = ["base_model.layers.0.q_proj.lora_A.default.weight"]
    state = {0: {"step": 1, "exp_avg_sq": torch.ones(2)}}
    torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="LoRA's factors"):
        mergekit_lr.curvature(tmp_path / "optimizer.pt", out)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        mergekit_lr.curvature(tmp_path / "nothing", out)
    (tmp_path / "ds").mkdir()
    (tmp_path / "ds" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ds_to_universal"):
        mergekit_lr.curvature(tmp_path / "ds", out)
    with zipfile.ZipFile(tmp_path / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 100)
    with pytest.raises(CheckpointError, match="compressed"):
        mergekit_lr.curvature(tmp_path / "optimizer.pt", out)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "v.safetensors")
    shutil.copy(tmp_path / "v.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="exists"):
        mergekit_lr.curvature(tmp_path / "v.safetensors", tmp_path / "out.safetensors")
    mergekit_lr.curvature(tmp_path / "v.safetensors", tmp_path / "out.safetensors", overwrite=True)
    assert list(load_file(tmp_path / "out.safetensors")) == ["w.exp_avg_sq"]
