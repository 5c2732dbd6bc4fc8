"""A PEFT LoRA adapter as plain data: its configuration, and which base tensor each of its tensors changes.

No weight is read here. Whatever would change the result and is not understood is refused: a setting that is
silently ignored gives a model that nobody trained.

References: LoRA, Hu et al., arXiv:2106.09685, section 4.1 (W + alpha/r B A); rsLoRA, Kalajdzievski,
arXiv:2312.03732 (alpha/sqrt(r)); DoRA, Liu et al., arXiv:2402.09353, eq. 5 (m V / ||V||).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.errors import CheckpointError, join_problems

# Settings that do not change W + scale * B A: what was targeted (the tensors themselves say), training-time
# settings, notes.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_USED = {
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias",
    "peft_type", "r", "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a
# part of W into the adapter, so that W + scale * B A is not the trained model unless the adapter was converted.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})

_PREFIX = "base_model.model."
_PARTS = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<factor>lora_A|lora_B)(?:\.default)?\.(?P<kind>weight|bias)"
    r"|(?P<embedding>lora_embedding_A|lora_embedding_B)(?:\.default)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r")"
)
# Where transformers' module names differ from the names on disk of the same model.
_RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model.language_model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json decides the result."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    ties_embeddings: bool
    base_model: str | None

    def rank_of(self, module: str) -> int:
        """Rank that the configuration claims for a module."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass(frozen=True)
class Update:
    """How one tensor of the adapted model comes about.

    ``start`` is the base tensor it starts from, or ``replaced`` the adapter's own copy of it. On it, as a matrix of
    ``rows x columns``, comes ``scale * left @ right``; ``transposed`` says that left and right are stored as
    A^T and B^T. ``magnitude`` rescales each row (``by_column``: each column) to that norm. ``added`` is a vector
    that comes on it times ``scale``.
    """

    start: str | None = None
    replaced: str | None = None
    a: str | None = None
    b: str | None = None
    transposed: bool = False
    scale: float = 1.0
    magnitude: str | None = None
    by_column: bool = False
    added: str | None = None


def read_config(folder: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        CheckpointError: it is no LoRA, or has a setting that cannot be applied exactly.
    """
    path = inside(folder, "adapter_config.json")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise CheckpointError("adapter_config.json does not hold an object", where=str(path))

    def wrong(what: str, fix: str = "") -> CheckpointError:
        return CheckpointError(what, where=str(path), fix=fix or "merge it into its base with PEFT first")

    if raw.get("peft_type") != "LORA":
        raise wrong(f"peft_type is {str(raw.get('peft_type'))[:60]!r}; only LORA adapters are applied")
    init = raw.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise wrong(
            f"init_lora_weights is {str(init)[:60]!r}, which moves part of the base weights into the adapter",
            "save it again with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    unknown = sorted(k for k, v in raw.items() if k not in _NEUTRAL | _USED and v not in (None, False, [], {}))
    if unknown:
        raise wrong(f"the setting {unknown[0][:60]!r} ({str(raw[unknown[0]])[:60]}) is not supported")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or alpha is None or not _is_number(alpha):
        raise wrong("r and lora_alpha must be numbers, r at least 1", "mend the adapter's configuration")
    patterns: list[dict[str, Any]] = []
    for key in ("rank_pattern", "alpha_pattern"):
        value = raw.get(key) or {}
        if not isinstance(value, dict) or not all(_is_number(v) and v > 0 for v in value.values()):
            raise wrong(f"{key} must map module names to positive numbers", "mend the adapter's configuration")
        for pattern in value:
            _check_pattern(pattern, path)
        patterns.append(value)
    base = raw.get("base_model_name_or_path")
    return AdapterConfig(
        rank,
        float(alpha),
        patterns[0],
        patterns[1],
        bool(raw.get("use_rslora")),
        bool(raw.get("use_dora")),
        bool(raw.get("fan_in_fan_out")),
        bool(raw.get("ensure_weight_tying")),
        base if isinstance(base, str) else None,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _check_pattern(pattern: str, path: Path) -> None:
    """Patterns are regular expressions from a stranger: none that can take exponential time is run."""
    quantifiers = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > 512 or quantifiers > 2 or re.search(r"\)[*+?{]", pattern):
        raise CheckpointError(
            f"the module pattern {pattern[:60]!r} is not run",
            where=str(path),
            why="it is long, or repeats groups, and could take for ever",
            fix="name the modules plainly",
        )
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as e:
        raise CheckpointError(f"bad module pattern {pattern[:60]!r}", where=str(path), why=str(e)) from e


def _by_pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def plan_updates(base: Checkpoint, adapter: Checkpoint, config: AdapterConfig) -> dict[str, Update]:
    """Which tensor of ``base`` each tensor of the adapter changes, and how.

    Raises:
        CheckpointError: a tensor of the adapter has no place in the base, or does not fit; all such at once.
    """
    modules, whole = module_parts(adapter.tensors)
    problems: list[str] = []
    updates: dict[str, Update] = {}
    for plain, name in whole.items():
        target = resolve(plain, base.tensors)
        if target is None and _is_head(plain) and tied_embedding(base) is not None:
            target = plain
        if target is None:
            problems.append(f"adapter tensor {name!r} has no place in the base model")
        elif target in base.tensors and base.tensors[target].dtype not in AVERAGED:
            problems.append(f"{target!r} is stored as {base.tensors[target].dtype} and cannot be replaced")
        else:
            updates[target] = Update(replaced=name)
    for module, roles in modules.items():
        try:
            _add_module(updates, module, roles, base, adapter, config)
        except CheckpointError as e:
            problems.append(e.what)
    if problems:
        problems = [f"{adapter.reference}: {p}" for p in problems]
        raise join_problems(CheckpointError, problems)
    return updates


def module_parts(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """An adapter's tensors by what they are: module -> role (``lora_A``, ``lora_B.bias``, ...) -> name.

    And those that replace a tensor of the base whole: the base's name -> name.
    """
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in names:
        plain = name.removeprefix(_PREFIX)
        parts = _PARTS.fullmatch(plain)
        if parts is None:
            plain = re.sub(r"\.modules_to_save(\.default)?\.", ".", plain)
            whole[plain.replace(".base_layer.", ".")] = name
            continue
        role = parts["factor"] or parts["embedding"] or parts["magnitude"]
        if parts["kind"] == "bias":
            role += ".bias"
        modules.setdefault(parts["module"], {})[role] = name
    return modules, whole


def _add_module(
    updates: dict[str, Update],
    module: str,
    roles: dict[str, str],
    base: Checkpoint,
    adapter: Checkpoint,
    config: AdapterConfig,
) -> None:
    """Add the updates of one adapted module: of its weight, and of its bias if the adapter has one."""
    embedding = "lora_embedding_A" in roles or "lora_embedding_B" in roles
    a, b = (roles.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if a is None or b is None or ("lora_A" in roles and embedding):
        raise CheckpointError(f"module {module!r} has not both of A and B")
    target = resolve(f"{module}.weight", base.tensors)
    start = target
    if target is None and _is_head(f"{module}.weight"):
        start, target = tied_embedding(base), f"{module}.weight"
    if target is None or start is None:
        raise CheckpointError(f"adapter module {module!r} has no weight in the base model")
    before = updates.get(target, Update(start=start))
    shape = (adapter.tensors[before.replaced] if before.replaced else base.tensors[start]).shape
    rank, transposed = _fit(module, shape, adapter.tensors[a], adapter.tensors[b], embedding, config, base)
    if base.tensors[start].dtype not in AVERAGED:
        raise CheckpointError(f"{target!r} is stored as {base.tensors[start].dtype}; LoRA needs floating point")
    scale = config.scale_of(module, rank)
    magnitude = roles.get("lora_magnitude_vector")
    if config.dora != (magnitude is not None):
        raise CheckpointError(f"module {module!r}: use_dora is {config.dora}, but its tensors say otherwise")
    if magnitude is not None and adapter.tensors[magnitude].numel != adapter.tensors[b].shape[0]:
        raise CheckpointError(f"module {module!r}: the magnitude vector has the wrong length")
    updates[target] = replace(
        before, a=a, b=b, transposed=transposed, scale=scale, magnitude=magnitude, by_column=transposed
    )
    if "lora_B.bias" in roles:
        bias = resolve(f"{module}.bias", base.tensors)
        if bias is None or base.tensors[bias].shape != adapter.tensors[roles["lora_B.bias"]].shape:
            raise CheckpointError(f"module {module!r}: lora_bias, but the base has no such bias")
        updates[bias] = replace(updates.get(bias, Update(start=bias)), added=roles["lora_B.bias"], scale=scale)
    if "lora_A.bias" in roles:
        raise CheckpointError(f"module {module!r} has a bias on A, which no LoRA has")


def _fit(
    module: str,
    shape: tuple[int, ...],
    a: TensorInfo,
    b: TensorInfo,
    embedding: bool,
    config: AdapterConfig,
    base: Checkpoint,
) -> tuple[int, bool]:
    """Rank, and whether the weight is stored ``in x out`` (Conv1D, embeddings), from the shapes."""
    if len(shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"module {module!r} is no matrix {list(shape)}; LoRA on it is not supported")
    rank, fan_in = a.shape
    fan_out = b.shape[0]
    if b.shape[1] != rank or rank < 1:
        raise CheckpointError(f"module {module!r}: A {list(a.shape)} and B {list(b.shape)} do not multiply")
    if config.rank_of(module) != rank:
        raise CheckpointError(f"module {module!r} has rank {rank}, the configuration {config.rank_of(module)}")
    plain, turned = shape == (fan_out, fan_in), shape == (fan_in, fan_out)
    if not plain and not turned:
        raise CheckpointError(
            f"module {module!r}: A {list(a.shape)} and B {list(b.shape)} do not fit its weight {list(shape)}"
        )
    if embedding:
        if not turned:
            raise CheckpointError(f"module {module!r}: the embedding factors do not fit its weight {list(shape)}")
        return rank, True
    if plain and turned:  # a square weight: the shapes do not say
        model_type = (base.config or {}).get("model_type")
        conv1d = model_type in CONV1D_MODELS and not _is_head(f"{module}.weight")
        return rank, conv1d or config.fan_in_fan_out
    return rank, turned


def resolve(name: str, tensors: dict[str, TensorInfo]) -> str | None:
    """The tensor on disk that a module path means; None if there is none, or more than one that fits."""
    if name in tensors:
        return name
    for inner, disk in _RENAMED:
        if name.startswith(inner) and disk + name[len(inner) :] in tensors:
            return disk + name[len(inner) :]
    _, _, rest = name.partition(".")
    if rest in tensors:  # a headless model was saved, without its prefix
        return rest
    longer = [n for n in tensors if n.endswith("." + name)]
    return longer[0] if len(longer) == 1 else None


def _is_head(name: str) -> bool:
    return name in ("lm_head.weight", "embed_out.weight")


def tied_embedding(base: Checkpoint) -> str | None:
    """Name of the input embedding, if the model's output head is that same tensor and not stored; else None."""
    named = (base.config or {}).get("architectures")
    classes = [str(a) for a in named] if isinstance(named, list) else []
    if not any("CausalLM" in a or "Generation" in a for a in classes) and "GPT2LMHeadModel" not in classes:
        return None
    if any(_is_head(n) or n.endswith(".lm_head.weight") for n in base.tensors):
        return None
    ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    found = [n for n in base.tensors if n.endswith(ends)]
    return found[0] if len(found) == 1 else None
