"""Which tensor of the base an adapter's tensor changes, and every reason not to apply an adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.checkpoint import adapter as adapter_module
from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

from .adapters import hand_made, pair, whole
from .conftest import reference, seeded

# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        ("transformer.h.0.mlp.c_fc", "h.0.mlp.c_fc"),
        ("h.0.mlp.c_fc", "transformer.h.0.mlp.c_fc"),
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
    ],
)
def test_names_in_memory_and_on_disk(module: str, stored: str, tmp_path: Path) -> None:
    a, b = pair(5, 3)
    base, adapter = hand_made(
        tmp_path, {f"{stored}.weight": seeded(1, 5, 3)}, {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    )
    with open_model(reference(base, adapter)) as checkpoint:
        assert list(checkpoint.updates) == [f"{stored}.weight"]  # type: ignore[attr-defined]


# --- refusals ---------------------------------------------------------------------------------------------------------

W = {"m.weight": seeded(1, 5, 3), "m.bias": seeded(2, 5)}
A, B = pair(5, 3)
AB = {"m.lora_A.weight": A, "m.lora_B.weight": B}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unmatched tensor": ({**AB, "other.weight": A}, {}, "'base_model.model.other.weight' has no place"),
    "unmatched module": ({"n.lora_A.weight": A, "n.lora_B.weight": B}, {}, "module 'n' has no weight"),
    "A without B": ({"m.lora_A.weight": A}, {}, "has not both of A and B"),
    "another naming": ({"lora_unet_m.lora_down.weight": A}, {}, "has no place"),
    "wrong shape": ({"m.lora_A.weight": A, "m.lora_B.weight": seeded(1, 4, 2)}, {}, "do not fit its weight"),
    "ranks differ": ({"m.lora_A.weight": A, "m.lora_B.weight": seeded(1, 5, 3)}, {}, "do not multiply"),
    "rank not as configured": (AB, {"r": 4}, "has rank 2, the configuration 4"),
    "rank pattern not as stored": (AB, {"rank_pattern": {"m": 3}}, "has rank 2, the configuration 3"),
    "dora without magnitude": (AB, {"use_dora": True}, "use_dora is True"),
    "magnitude without dora": ({**AB, "m.lora_magnitude_vector": seeded(1, 5)}, {}, "use_dora is False"),
    "magnitude of wrong length": (
        {**AB, "m.lora_magnitude_vector": seeded(1, 4)}, {"use_dora": True}, "wrong length",
    ),
    "not lora": (AB, {"peft_type": "IA3"}, "only LORA"),
    "pissa": (AB, {"init_lora_weights": "pissa_niter_4"}, "moves part of the base weights"),
    "loftq": (AB, {"init_lora_weights": "loftq"}, "moves part of the base weights"),
    "layer replication": (AB, {"layer_replication": [[0, 1]]}, "'layer_replication'"),
    "expert parameters": (AB, {"target_parameters": ["experts.up"]}, "'target_parameters'"),
    "trainable tokens": (AB, {"trainable_token_indices": [1]}, "'trainable_token_indices'"),
    "activated lora": (AB, {"alora_invocation_tokens": [1]}, "'alora_invocation_tokens'"),
    "a setting of the future": (AB, {"use_new_thing": True}, "'use_new_thing'"),
    "no alpha": (AB, {"lora_alpha": None}, "must be numbers"),
    "alpha infinite": (AB, {"lora_alpha": 1e999}, "must be numbers"),
    "rank zero": (AB, {"r": 0}, "must be numbers"),
    "pattern that explodes": (AB, {"alpha_pattern": {"(a+)+b": 1}}, "could take for ever"),
    "pattern that does not compile": (AB, {"alpha_pattern": {"(": 1}}, "bad module pattern"),
    "pattern to zero": (AB, {"rank_pattern": {"m": 0}}, "positive numbers"),
    "bias on A": ({**AB, "m.lora_A.bias": seeded(1, 2)}, {}, "has a bias on A"),
    "embedding factors the wrong way round": (
        {"m.lora_embedding_A": seeded(1, 2, 3), "m.lora_embedding_B": seeded(1, 5, 2)}, {}, "the embedding factors",
    ),
    "bias without base bias": (
        {**AB, "m.lora_B.bias": seeded(1, 4)}, {"lora_bias": True}, "the base has no such bias",
    ),
    "replacement of another shape": ({"m.weight": seeded(1, 5, 4)}, {}, "by another shape"),
    "convolution": ({"c.lora_A.weight": seeded(1, 2, 3, 1), "c.lora_B.weight": seeded(1, 5, 2, 1)}, {}, "is no matrix"),
    "integers": ({"i.lora_A.weight": A, "i.lora_B.weight": B}, {}, "LoRA needs floating point"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    adapter, config, message = REFUSED[case]
    base = {**W, "c.weight": seeded(1, 5, 3, 1), "i.weight": torch.ones(5, 3, dtype=torch.int8)}
    with pytest.raises(CheckpointError) as caught:
        open_model(reference(*hand_made(tmp_path, base, adapter, **config)))
    assert message in str(caught.value)


def test_all_misfits_at_once(tmp_path: Path) -> None:
    adapter = {f"{n}.weight": A for n in "xyz"}
    with pytest.raises(CheckpointError) as caught:
        open_model(reference(*hand_made(tmp_path, W, adapter)))
    assert len(caught.value.problems) == 3


def test_whole_adapter_or_error_never_in_between(tmp_path: Path) -> None:
    """Every tensor of the adapter is used by some update."""
    base, adapter = hand_made(tmp_path, W, {**AB, "m.bias": seeded(3, 5)})
    with open_model(reference(base, adapter)) as checkpoint:
        assert isinstance(checkpoint, AdaptedCheckpoint)
        used = {x for u in checkpoint.updates.values() for x in (u.a, u.b, u.replaced, u.added, u.magnitude) if x}
        assert used == set(checkpoint.adapter.tensors)


def test_adapter_config_is_part_of_the_identity(tmp_path: Path) -> None:
    base, adapter = hand_made(tmp_path, W, AB)
    with open_model(reference(base, adapter)) as first:
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 99}))
        assert first.changed() == [str((adapter / "adapter_config.json").resolve())]
        with open_model(reference(base, adapter)) as second:
            assert first.identity() != second.identity()


def test_closing_lets_go_of_both(tmp_path: Path) -> None:
    checkpoint = open_model(reference(*hand_made(tmp_path, W, AB)))
    whole(checkpoint, "m.weight")
    assert isinstance(checkpoint, AdaptedCheckpoint)
    assert checkpoint.base._descriptors and checkpoint.adapter._descriptors
    checkpoint.close()
    assert not checkpoint.base._descriptors and not checkpoint.adapter._descriptors


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -1, "LORA", "true", "[[a]", "(?i)q", "a{2}"])
    | st.text(max_size=4)
)
_settings = st.dictionaries(
    st.sampled_from(sorted(adapter_module._USED | {"base_model_name_or_path", "modules_to_save", "new"})),
    _scalars | st.lists(_scalars, max_size=2) | st.dictionaries(st.text(max_size=4), _scalars, max_size=2),
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(changes=_settings)
def test_any_configuration_works_or_raises_one_family(
    changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("c")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of re, about odd sets in patterns
        try:
            with open_model(reference(*hand_made(folder, W, AB, **changes))) as checkpoint:
                assert whole(checkpoint, "m.weight").shape == (5, 3)
        except CheckpointError as e:
            assert "\n" not in str(e)


def test_integers_are_not_replaced_by_an_adapter(tmp_path: Path) -> None:
    base, adapter = hand_made(tmp_path, {**W, "i": torch.ones(3, dtype=torch.int64)}, {**AB, "i": seeded(1, 3)})
    with pytest.raises(CheckpointError, match="'i' is stored as I64"):
        open_model(reference(base, adapter))


def test_reading_order_follows_the_files(tmp_path: Path) -> None:
    base, adapter = hand_made(tmp_path, W, {**AB, "m.bias": seeded(3, 5)})
    with open_model(reference(base, adapter)) as checkpoint:
        weight, bias = (checkpoint.file_position(n) for n in ("m.weight", "m.bias"))
        assert weight == (f"{checkpoint.reference}/model.safetensors", checkpoint.tensors["m.weight"].offset)
        assert bias == (f"{checkpoint.reference}/adapter_model.safetensors", checkpoint.tensors["m.bias"].offset)


def test_configuration_that_is_no_object(tmp_path: Path) -> None:
    base, adapter = hand_made(tmp_path, W, AB)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="does not hold an object"):
        open_model(reference(base, adapter))
