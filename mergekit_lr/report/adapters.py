"""A PEFT LoRA folder, looked at on its own: does its configuration fit its tensors, without the base model?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mergekit_lr.checkpoint.adapter import AdapterConfig, module_parts, read_config
from mergekit_lr.checkpoint.header import TensorInfo, read_header
from mergekit_lr.checkpoint.open import ADAPTER_CONFIG
from mergekit_lr.checkpoint.small_files import inside
from mergekit_lr.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder with an adapter and no model of its own beside it."""
    own = any(not p.name.startswith("adapter_") for p in path.glob("*.safetensors")) if path.is_dir() else True
    return not own and (path / ADAPTER_CONFIG).exists()


@dataclass
class AdapterFindings:
    """``tensors``: header entry and file of each."""

    problems: list[str] = field(default_factory=list)
    tensors: dict[str, tuple[TensorInfo, str]] = field(default_factory=dict)


def check_adapter(folder: Path) -> AdapterFindings:
    """Everything that can be said of an adapter from its configuration and its header."""
    found = AdapterFindings()
    config: AdapterConfig | None = None
    try:
        config = read_config(folder)
    except CheckpointError as e:
        found.problems.append(str(e))
    try:
        path = inside(folder, WEIGHTS)
        if path.exists():
            found.tensors = {n: (info, WEIGHTS) for n, info in read_header(path).tensors.items()}
        else:
            found.problems.append(f"{folder}: holds no {WEIGHTS}")
    except CheckpointError as e:
        found.problems.append(str(e))
    infos = {n: info for n, (info, _) in found.tensors.items()}
    if infos and config is not None:
        found.problems += _modules(infos, config)
    return found


def _modules(tensors: dict[str, TensorInfo], config: AdapterConfig) -> list[str]:
    """Modules whose factors are missing, do not multiply, or are of another rank than the configuration says."""
    modules, _ = module_parts(tensors)
    problems = [] if modules else ["it holds no lora_A and lora_B"]
    for module, roles in sorted(modules.items()):
        a = roles.get("lora_A") or roles.get("lora_embedding_A")
        b = roles.get("lora_B") or roles.get("lora_embedding_B")
        if a is None or b is None:
            problems.append(f"module {module!r} has not both of A and B")
            continue
        left, right = tensors[a].shape, tensors[b].shape
        if len(left) != 2 or len(right) != 2 or left[0] != right[1]:
            problems.append(f"module {module!r}: A {list(left)} and B {list(right)} do not multiply")
            continue
        if config.rank_of(module) != left[0]:
            problems.append(f"module {module!r} has rank {left[0]}, the configuration {config.rank_of(module)}")
        magnitude = roles.get("lora_magnitude_vector")
        if config.dora != (magnitude is not None):
            problems.append(f"module {module!r}: use_dora is {config.dora}, but its tensors say otherwise")
        elif magnitude is not None and tensors[magnitude].numel != right[0]:
            problems.append(f"module {module!r}: the magnitude vector has the wrong length")
    return problems
