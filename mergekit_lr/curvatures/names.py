"""From the numbers by which an optimizer knows parameters to the names of the weights, checked by shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.foreign_code import check_loadable
from mergekit_lr.checkpoint.small_files import read_json
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Parts of names that the transformers Trainer gives no weight decay."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameters:
    """A model's parameters in the order of ``named_parameters``: shapes, and which sit in a `torch.nn.LayerNorm`."""

    shapes: Shapes
    layer_norms: frozenset[str] = frozenset()

    def groupings(self) -> dict[str, list[list[str]]]:
        """Group orders that training programs use, the Trainer's first."""
        names = list(self.shapes)
        plain = [n for n in names if n in self.layer_norms or NO_DECAY.search(n.lower())]
        vectors = [n for n in names if len(self.shapes[n]) <= 1]
        return {
            "the Trainer's (decay, no decay)": [_without(names, plain), plain],
            "matrices, then vectors": [_without(names, vectors), vectors],
            "one group": [names],
        }


def _without(names: Sequence[str], excluded: Sequence[str]) -> list[str]:
    left_out = set(excluded)
    return [n for n in names if n not in left_out]


def parameters_of(folder: Path) -> Parameters:
    """The parameters of a model folder in module order, from its config alone: no weights, no code of the folder.

    Raises:
        CheckpointError: transformers does not know the architecture, or there is no config.
    """
    config_path = folder / "config.json"
    if not config_path.exists():
        raise CheckpointError(
            "the order of the model's parameters is not known",
            where=str(folder),
            why="there is no config.json, and the optimizer numbers its parameters",
            fix="give --model FOLDER, or --names FILE.json with the parameters' names in the optimizer's order",
        )
    config = read_json(config_path)
    check_loadable(folder)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = _built(config, loaded) or AutoModelForCausalLM.from_config(loaded, trust_remote_code=False)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        fix = "give --names FILE.json with the parameters' names in the optimizer's order"
        raise CheckpointError("transformers cannot build the model", where=str(folder), why=why, fix=fix) from e
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    norms = {
        f"{module}.{n}" if module else n
        for module, part in model.named_modules()
        if isinstance(part, torch.nn.LayerNorm)
        for n, _ in part.named_parameters(recurse=False)
    }
    return Parameters(shapes, frozenset(norms))


def _built(config: Any, loaded: Any) -> Any:
    """The model of the class that the config names, where transformers has it."""
    import transformers

    names = config.get("architectures") if isinstance(config, dict) else None
    kind: Any = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    known: Any = kind
    return known._from_config(loaded)


def named_list(path: Path) -> list[str]:
    """Names in the optimizer's own order from a JSON file: a list of texts."""
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(n, str) for n in found) or len(set(found)) != len(found):
        raise CheckpointError("not a list of different names", where=str(path), fix='write ["name", ...]')
    return found


def assign(
    groups: Sequence[Sequence[int]], shapes: Mapping[int, tuple[int, ...]], parameters: Parameters, where: str
) -> dict[int, str]:
    """Names for the numbers in ``groups``, by the first grouping whose sizes and shapes all fit.

    Raises:
        CheckpointError: none fits; says how far the nearest one came.
    """
    given = [list(g) for g in groups if g]
    wrong: list[str] = []
    for title, names in parameters.groupings().items():
        wanted = [g for g in names if g]
        if [len(g) for g in given] != [len(g) for g in wanted]:
            wrong.append(f"{title}: {[len(g) for g in wanted]} parameters, not {[len(g) for g in given]}")
            continue
        pairs = [p for a, b in zip(given, wanted, strict=True) for p in zip(a, b, strict=True)]
        bad = next(((i, n) for i, n in pairs if i in shapes and shapes[i] != parameters.shapes[n]), None)
        if bad is None:
            return dict(pairs)
        i, n = bad
        wrong.append(f"{title}: number {i} is {list(shapes[i])} where {n} is {list(parameters.shapes[n])}")
    raise CheckpointError(
        "the optimizer's numbered parameters do not fit the model",
        where=where,
        why="; ".join(wrong),
        fix="give the model that was trained with --model, or the names in the optimizer's order with --names "
        "(frozen parameters left out); the state of a LoRA run is of the adapter and cannot be used",
    )
