"""Where second moments are kept: one reader for each kind of training checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.small_files import read_json
from mergekit_lr.curvatures.moments import Moment, Moments, bare_name, moment_of
from mergekit_lr.curvatures.names import Parameters, assign, named_list, parameters_of
from mergekit_lr.curvatures.state import State, open_state
from mergekit_lr.errors import CheckpointError

OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin")
LORA = ("lora_A", "lora_B", "lora_embedding")


def read_moments(checkpoint: Path, model: Path | None = None, names: Path | None = None) -> Moments:
    """Second moments of a training checkpoint: a folder of any kind below, or the file itself.

    A Trainer folder or ``optimizer.pt`` (parameters by number, or by name as FSDP saves them whole; AdamW, 8-bit Adam,
    Adafactor), a torch.distributed.checkpoint folder, a DeepSpeed universal checkpoint, or a safetensors file with
    second moments under the weights' names.

    Raises:
        CheckpointError: nothing of the kind is there, or it does not fit the model.
    """
    place = checkpoint
    if place.is_dir():
        found = next((place / n for n in OPTIMIZER_FILES if (place / n).is_file()), None)
        folder = next((p for p in (place, *sorted(place.glob("optimizer*"))) if (p / ".metadata").is_file()), None)
        zero = next((p for p in (place / "zero", *sorted(place.glob("*_universal/zero"))) if p.is_dir()), None)
        if found is not None:
            return _numbered_or_named(found, model or place, names)
        if folder is not None:
            return _distributed(folder)
        if zero is not None:
            return _deepspeed(zero)
        raise _nothing(place)
    if place.suffix == ".safetensors":
        return _safetensors(place)
    if place.name == ".metadata":
        return _distributed(place.parent)
    if place.is_file():
        return _numbered_or_named(place, model or place.parent, names)
    raise CheckpointError("no such checkpoint", where=str(place), fix="check the path")


def _nothing(folder: Path) -> CheckpointError:
    partitions = any(folder.glob("**/*_optim_states.pt"))
    why = "there is no optimizer.pt, no .metadata and no zero/ folder in it"
    fix = "give the folder of a training checkpoint, or estimate from text with --text FILE"
    if partitions:
        why = "its DeepSpeed optimizer is in flat partitions"
        fix = "convert it first: python -m deepspeed.checkpoint.ds_to_universal"
    return CheckpointError("holds no optimizer state that is read", where=str(folder), why=why, fix=fix)


def _parts(state: State, prefix: str) -> dict[str, dict[str, str]]:
    """Parameter key -> {last name: entry} of every tensor below ``prefix``."""
    found: dict[str, dict[str, str]] = {}
    for entry in state.tensors.tensors:
        path, _, part = entry.rpartition("/")
        if path.startswith(prefix):
            key = path.removeprefix(prefix).removesuffix("/__bnb_optimizer_quant_state__")
            found.setdefault(key, {})[part] = entry
    return found


def _step(state: State, key: str) -> float | None:
    value = state.plain.get(f"state/{key}/step")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _numbered_or_named(path: Path, model: Path, names: Path | None) -> Moments:
    state = open_state("torch", path)
    try:
        root = next((p for p in ("", "optimizer/", "optim/") if f"{p}param_groups/0/lr" in state.plain), "")
        if root:
            state.plain = {k.removeprefix(root): v for k, v in state.plain.items()}
        parts = _parts(state, f"{root}state/")
        if not parts:
            raise moments_missing(state)
        numbered = all(k.isdigit() for k in parts)
        named = _by_number(state, parts, model, names, path) if numbered else {k: bare_name(k) for k in parts}
        refuse_lora(named.values(), path)
        betas = _betas(state)
        entries: dict[str, Moment] = {}
        for key, entry in parts.items():
            beta2 = betas.get(key, betas.get(named[key], betas.get("")))
            entries[named[key]] = moment_of(state.tensors, entry, _step(state, key), beta2, named[key])
    except BaseException:
        state.close()
        raise
    source = "trainer" if numbered else "names"
    return Moments(source, entries, _trainer_facts(path.parent), close=state.close)


def moments_missing(state: State) -> CheckpointError:
    return CheckpointError(
        "the optimizer kept no second moments",
        where=state.tensors.reference,
        why="there is no exp_avg_sq in it: SGD, Lion and Muon keep none",
        fix="estimate them from text: mergekit-lr curvature MODEL OUT --text FILE",
    )


def _groups(state: State) -> list[dict[str, Any]]:
    """``param_groups`` as plain data, in order."""
    found: dict[int, dict[str, Any]] = {}
    for path, value in state.plain.items():
        kind, _, rest = path.partition("/")
        number, _, key = rest.partition("/")
        if kind == "param_groups" and number.isdigit() and "/" not in key:
            found.setdefault(int(number), {})[key] = value
    return [found[i] for i in sorted(found)]


def _betas(state: State) -> dict[str, float]:
    """beta2 by parameter key; under "" the one of the first group."""
    found: dict[str, float] = {}
    for group in _groups(state):
        betas = group.get("betas")
        if isinstance(betas, list) and len(betas) == 2 and isinstance(betas[1], int | float):
            found.setdefault("", float(betas[1]))
            params = group.get("params", [])
            found |= {str(p): float(betas[1]) for p in (params if isinstance(params, list) else [])}
    return found


def _by_number(
    state: State, parts: Mapping[str, Mapping[str, str]], model: Path, names: Path | None, path: Path
) -> dict[str, str]:
    groups = _groups(state)
    numbers = [[int(p) for p in g.get("params", [])] for g in groups]
    own = [g.get("param_names") for g in groups]
    if all(isinstance(n, list) and len(n) == len(ids) for n, ids in zip(own, numbers, strict=True)) and groups:
        listed = [bare_name(str(n)) for group in own for n in group or []]
        return {str(i): n for i, n in zip((i for g in numbers for i in g), listed, strict=True)}
    shapes = {int(k): moment_of(state.tensors, p, None, None, k).shape for k, p in parts.items()}
    if names is not None:
        listed = named_list(names)
        flat = [i for g in numbers for i in g]
        if len(listed) != len(flat):
            why = f"{len(listed)} names for {len(flat)} parameters"
            raise CheckpointError("the names do not fit the optimizer", where=str(names), why=why)
        return {str(i): n for i, n in zip(flat, listed, strict=True)}
    if (model / "adapter_config.json").exists() and not (model / "config.json").exists():
        refuse_lora(["lora_A"], path)
    known: Parameters = parameters_of(model)
    return {str(i): n for i, n in assign(numbers, shapes, known, str(path)).items() if str(i) in parts}


def refuse_lora(names: Iterable[str], path: Path) -> None:
    """Second moments of a LoRA's factors say nothing about the weights."""
    if any(part in n for n in names for part in LORA):
        raise CheckpointError(
            "the optimizer's state is of a LoRA's factors, not of the weights",
            where=str(path),
            why="the curvature of A and B does not give that of W + BA",
            fix="merge the adapter into its base and estimate from text: mergekit-lr curvature MODEL OUT --text FILE",
        )


def _trainer_facts(folder: Path) -> dict[str, str]:
    """Batch size of a Trainer run, where ``trainer_state.json`` says it."""
    path = folder / "trainer_state.json"
    content = read_json(path) if path.is_file() else None
    size = content.get("train_batch_size") if isinstance(content, dict) else None
    return {"batch_size": str(size)} if isinstance(size, int) and size > 0 else {}


def _distributed(folder: Path) -> Moments:
    """Keys such as ``optimizer.state.NAME.exp_avg_sq``."""
    state = open_state("dcp", folder)
    try:
        entries: dict[str, Moment] = {}
        betas = [v for k, v in state.plain.items() if k.endswith("betas") and isinstance(v, list) and len(v) == 2]
        for key in state.tensors.tensors:
            path = key.removesuffix(".exp_avg_sq")
            name = bare_name(path.partition("state.")[2] or path)
            step = state.plain.get(f"{path}.step")
            beta2 = float(betas[0][1]) if betas else None
            step = float(step) if isinstance(step, int | float) else None
            entries[name] = moment_of(state.tensors, {"exp_avg_sq": key}, step, beta2, name)
        if not entries:
            raise moments_missing(state)
        refuse_lora(entries, folder)
        numbered = next((n for n in entries if n.isdigit()), None)
        if numbered is not None:
            why = "its parameters are numbered across ranks"
            fix = "save the optimizer with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
            raise CheckpointError("the parameters have no names", where=str(folder), why=why, fix=fix)
    except BaseException:
        state.close()
        raise
    return Moments("dcp", entries, _trainer_facts(folder.parent), close=state.close)


def _deepspeed(folder: Path) -> Moments:
    state = open_state("deepspeed", folder)
    try:
        parts = _parts(state, "state/")
        if not parts:
            raise moments_missing(state)
        entries = {
            bare_name(k): moment_of(state.tensors, p, _step(state, k), None, k) for k, p in parts.items()
        }  # fmt: skip
        refuse_lora(entries, folder)
    except BaseException:
        state.close()
        raise
    return Moments("deepspeed", entries, close=state.close)


def _safetensors(path: Path) -> Moments:
    """A file under the weights' names, full or as sums; the way to compress one, or to correct its bias."""
    from mergekit_lr.checkpoint.companion import COLUMN, ROW, open_companion
    from mergekit_lr.curvature_weights import COMPANION

    opened = open_companion(str(path), COMPANION.suffixes, what="second moments", make=COMPANION.make, factored=True)
    facts = dict(opened.facts)
    inner = opened.inner
    assert inner is not None

    def number(key: str) -> float | None:
        try:
            return float(facts[key]) if facts.get("bias_corrected") != "true" else None
        except (KeyError, ValueError):
            return None

    def reader(name: str, entry: str) -> Moment:
        info = opened.tensors[name]

        def read() -> Any:
            import torch

            if not entry.endswith(ROW):
                return opened.read(name, 0, info.numel).to(torch.float32).reshape(info.shape)
            both = (entry, entry.removesuffix(ROW) + COLUMN)
            return tuple(
                inner.read(e, 0, inner.tensors[e].numel).to(torch.float32).reshape(inner.tensors[e].shape) for e in both
            )

        unbiased = facts.get("bias_corrected") == "true"
        return Moment(info.shape, read, entry.endswith(ROW), number("step"), number("beta2"), unbiased)

    entries = {name: reader(name, entry) for name, entry in opened.entries.items()}
    kept: dict[str, str] = {k: facts[k] for k in ("batch_size", "step", "beta2") if k in facts}
    return Moments(facts.get("source", "names"), entries, kept, close=opened.close)
