"""From reference to checkpoint: what wins over what, and what the errors say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_lr.checkpoint.open import local_path, open_model
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.lazy import torch

from .conftest import reference, seeded

Folder = Callable[..., Path]


def test_folder_file_and_raw_folder(make_folder: Folder, tmp_path: Path) -> None:
    full = make_folder("full", config={"model_type": "llama"})
    raw = make_folder("raw")
    for path, folder, config in (
        (full, full, {"model_type": "llama"}),
        (raw, raw, None),
        (raw / "model.safetensors", None, None),
    ):
        with open_model(reference(path)) as checkpoint:
            assert (checkpoint.folder, checkpoint.config) == (folder, config)
            assert set(checkpoint.tensors) == {"w", "b"} and checkpoint.revision is None
            assert checkpoint.reference == str(path)


def test_relative_and_home_paths(make_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder("m")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("m", "./m", "m/model.safetensors", "~/m"):
        open_model(ModelReference.parse(text)).close()


def test_a_local_folder_wins_over_a_hub_id(
    make_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    make_folder("org/name")
    monkeypatch.chdir(tmp_path)
    with open_model(ModelReference(Place("org/name"))) as checkpoint:
        assert checkpoint.folder == Path("org/name")


def test_revision_of_a_local_path_is_said_to_be_ignored(make_folder: Folder) -> None:
    with open_model(ModelReference(Place(str(make_folder()), "main"))) as checkpoint:
        assert any("'main' is ignored" in w for w in checkpoint.warnings)


def test_missing_path_names_its_neighbours(make_folder: Folder, tmp_path: Path) -> None:
    folder = make_folder("llama-base")
    with pytest.raises(CheckpointError) as caught:
        open_model(reference(tmp_path / "lama-base"))
    assert "no such model" in str(caught.value) and f"did you mean {folder}" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        open_model(reference(tmp_path / "quite-different"))
    assert "a Hub id written org/name" in str(caught.value)
    with pytest.raises(CheckpointError, match="no such model"):
        open_model(reference(tmp_path / "lama-base" / "model.safetensors"))


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    save_file({"a": seeded(1, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA adapter, not a model"):
        open_model(reference(tmp_path))


def test_bad_adapters(make_folder: Folder, tmp_path: Path) -> None:
    base = make_folder("base")
    adapter = tmp_path / "adapter"
    for step, message in enumerate(
        (
            "no such model",
            "not a PEFT adapter",
            "holds no adapter weights",
            "link that leaves",
            "a LoRA adapter is a folder",
        )
    ):
        if step == 1:
            adapter.mkdir()
        if step == 2:
            (adapter / "adapter_config.json").write_text("{}")
        if step == 3:
            (adapter / "adapter_model.safetensors").symlink_to(base / "model.safetensors")
        target = base / "model.safetensors" if step == 4 else adapter
        with pytest.raises(CheckpointError, match=message):
            open_model(reference(base, target))


def test_a_failed_adapter_leaves_nothing_open(make_folder: Folder, tmp_path: Path) -> None:
    base = make_folder("base")
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(CheckpointError):
        open_model(reference(base, tmp_path / "none"))
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        open_model(reference(tmp_path / "model.gguf"))


def test_local_path(make_folder: Folder, tmp_path: Path) -> None:
    folder = make_folder()
    assert local_path(Place(str(folder))) == folder
    with pytest.raises(CheckpointError):
        local_path(Place(str(tmp_path / "none")))


def test_opening_imports_neither_torch_nor_the_hub(make_folder: Folder) -> None:
    program = """
import sys
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
open_model(ModelReference.parse(sys.argv[1])).close()
print(sorted({"torch", "huggingface_hub", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(make_folder(config={}))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_config_that_is_no_object(make_folder: Folder) -> None:
    folder = make_folder(config={})
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="does not hold an object"):
        open_model(reference(folder))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=30)
    | st.sampled_from(["~nobody/x", "a" * 300, "a/" * 2000, "~", "/", ".", "//", "/proc/1/mem", "/dev/zero"])
)
def test_any_reference_opens_or_raises_one_family(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(place: Place, **_: object) -> None:
        raise CheckpointError("no network in this test", where=str(place))

    monkeypatch.setattr("mergekit_lr.checkpoint.hub.fetch", no_network)
    with pytest.raises((CheckpointError, RecipeError)):
        open_model(ModelReference.parse(text))


def test_a_folder_that_may_not_be_listed_suggests_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user without rights; root would be let in."""
    me = os.geteuid()
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        secret = Path(place) / "secret"
        (secret / "llama-base").mkdir(parents=True)
        Path(place).chmod(0o755)
        secret.chmod(0o311)
        try:
            if me == 0:
                os.seteuid(65534)
            with pytest.raises(CheckpointError, match="no such model") as caught:
                open_model(reference(secret / "lama-base"))
        finally:
            os.seteuid(me)
            secret.chmod(0o755)
        assert caught.value.fix == "give a local path, or a Hub id written org/name"
        with pytest.raises(CheckpointError, match="did you mean"):
            open_model(reference(secret / "lama-base"))


def test_a_pickled_adapter_is_opened_only_if_asked(make_folder: Folder, tmp_path: Path) -> None:
    base = make_folder("base", shards={"model.safetensors": {"layer.weight": seeded(1, 4, 3)}})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    a, b = seeded(2, 1, 3), seeded(3, 4, 1)
    names = [f"base_model.model.layer.lora_{x}.weight" for x in "AB"]
    torch.save(dict(zip(names, (a, b), strict=True)), adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle can run code") as caught:
        open_model(reference(base, adapter))
    assert "adapter_model.bin" in str(caught.value)
    with open_model(reference(base, adapter), allow_pickle=True) as checkpoint:
        got = checkpoint.read("layer.weight", 0, 12).view(4, 3)
        assert torch.allclose(got.double(), seeded(1, 4, 3).double() + 2 * b.double() @ a.double(), atol=1e-6)
