"""The layout of a transplant: which row of a model each token of the donor gets, and how a tensor is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mergekit_lr.arch.tied import config_ties, tied_source
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.small_files import inside, read_json
from mergekit_lr.errors import CheckpointError
from mergekit_lr.graph.nodes import Expression, Operation, Result, Sink, Source, Task
from mergekit_lr.lazy import torch
from mergekit_lr.method import Call, Space
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Outline
from mergekit_lr.tokenizer.approximate import BATCH
from mergekit_lr.tokenizer.axes import vocabulary_rows, vocabulary_tensors
from mergekit_lr.tokenizer.ids import Renaming
from mergekit_lr.tokenizer.rows import Ids
from mergekit_lr.tokenizer.spelling import Key, Matches, match
from mergekit_lr.tokenizer.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

LACKING, ZERO = -1, -2
"""In `Rows.sources`: a token that the model does not have, and a row without a token or without a donor's row."""

ON_SHARED = ("omp", "common_interpolation")
"""Approximations that look at the donor's rows."""

Made: TypeAlias = tuple["Tensor", "Tensor | None"]
"""Rows for a batch of new tokens, and how far each is from the donor's, where that is known."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of one tensor come from; arrays as bytes of int64, for a graph is plain data.

    ``sources``: for each of the output's rows the model's row, `LACKING` or `ZERO`. ``shared``: ids of the donor's
    tokens that the model has itself. ``pieces``: for a method that cuts text, JSON of the ids that each lacking token
    is cut into. ``parameters``: the method's, as JSON.
    """

    name: str
    head: bool
    width: int
    sources: bytes
    shared: bytes
    pieces: str
    parameters: str
    seed: int

    def array(self, which: str) -> Ids:
        return np.frombuffer(getattr(self, which), dtype=np.int64)


@dataclass
class Pair:
    """Model and donor, their tokens, and which of the model's rows the donor's tokens are."""

    model: Checkpoint
    donor: Checkpoint
    own: Vocabulary
    theirs: Vocabulary
    rows: tuple[int, int]
    wanted: Mapping[str, str]  # byte_match and prefix_match, each `no`, `embed`, `lm_head` or `yes`
    _found: dict[bool, Matches] = field(default_factory=dict)

    def matches(self, head: bool) -> Matches:
        if head not in self._found:
            here = ("yes", "lm_head" if head else "embed")
            byte, prefix = (self.wanted[w] in here for w in ("byte_match", "prefix_match"))
            found = match(self.theirs, self.rows[1], self.own, self.rows[0], byte=byte, prefix=prefix)
            self._found[head] = found
        return self._found[head]

    def sources(self, head: bool) -> Ids:
        found = self.matches(head)
        sources = np.full(self.theirs.end, ZERO, dtype=np.int64)
        for part in (found.exact, found.loose):
            sources[list(part.keys())] = list(part.values())
        sources[[self.theirs.ids[t] for t in found.lacking]] = LACKING
        return sources


def open_pair(recipe: Recipe, inputs: Mapping[str, Checkpoint], wanted: Mapping[str, str]) -> Pair:
    """The two models of a transplant.

    Raises:
        CheckpointError: one has no tokenizer, or no embeddings that are known.
    """
    model, donor = inputs[str(recipe.base_model)], inputs[str(recipe.input_models()[0].reference)]
    found, counts = [], []
    for checkpoint in (model, donor):
        vocabulary, rows = read_vocabulary(checkpoint), vocabulary_rows(checkpoint)
        if vocabulary is None or rows is None:
            what = "it has no tokenizer" if vocabulary is None else "its embeddings are not known"
            raise CheckpointError(what, where=checkpoint.reference, fix="name a model with a tokenizer and embeddings")
        found.append(vocabulary)
        counts.append(rows)
    return Pair(model, donor, found[0], found[1], (counts[0], counts[1]), wanted)


def outline_of(
    recipe: Recipe, pair: Pair, parameters: Mapping[str, Any], pieces: Callable[[bool], list[list[int]]]
) -> Outline:
    """Every tensor of the model, those over the vocabulary with the donor's tokens."""
    model, donor = pair.model, pair.donor
    vocabulary = vocabulary_tensors(model)
    dtype = recipe.out_dtype or recipe.dtype
    sinks: list[Sink] = []
    tasks: list[Task] = []
    for name in sorted(model.tensors, key=model.file_position):
        info = model.tensors[name]
        written = RECIPE_DTYPES[dtype] if dtype and info.dtype in AVERAGED else info.dtype
        if name not in vocabulary:
            sinks.append(Sink(name, written, info.shape, _copied(name, info, written), "copied: no row for each token"))
            continue
        if info.dtype not in AVERAGED:
            raise CheckpointError(
                f"tensor {name!r} is stored as {info.dtype}, and no row can be made for it",
                where=model.reference,
                fix="convert the checkpoint to float16, bfloat16 or float32 first",
            )
        task, shape = _task(recipe, pair, name, info, parameters, pieces)
        sinks.append(Sink(name, written, shape, Result(len(tasks), 0), "transplanted: rows of the donor's tokens"))
        tasks.append(task)
    config, warnings = _config(pair)
    files, more = _generation_config(pair)
    told = [*warnings, *more, *_remarks(pair, parameters)]
    found = pair.matches(head=False)
    details = {
        "tokens": pair.theirs.end,
        "matched": len(found.exact),
        "matched_loosely": len(found.loose),
        "approximated": len(found.lacking),
        "shared": len(found.exact),
    }
    return Outline(
        (model.reference, donor.reference),
        tuple(sinks),
        tuple(tasks),
        config=config,
        files=files,
        warnings=tuple(told),
        details=details,
        tokenizer=donor.reference,
    )


def _copied(name: str, info: TensorInfo, dtype: str) -> Expression:
    own = Source(0, name)
    if dtype == info.dtype:
        return own
    from mergekit_lr.registry import tensor_method

    merge, each = (kind() for kind in (tensor_method("passthrough").Merge, tensor_method("passthrough").PerModel))
    call = Call(name, info.shape, merge, (each,), False, keys=(name,))
    return Operation("passthrough", call, (own,), None, Space.WEIGHT)


def _task(
    recipe: Recipe,
    pair: Pair,
    name: str,
    info: TensorInfo,
    parameters: Mapping[str, Any],
    pieces: Callable[[bool], list[list[int]]],
) -> tuple[Task, tuple[int, ...]]:
    flat = len(info.shape) == 1 or info.shape[0] == 1
    head = "embed" not in name and "wte" not in name and "shared" not in name
    method = "zero" if flat else parameters["approximation_method"]  # a bias says how frequent a token is: unknown
    shared = np.array(sorted(pair.matches(head).exact), dtype=np.int64)
    inputs: tuple[Source, ...] = (Source(0, name),)
    fixed = 4 * info.numel
    k = min(parameters["k"], len(shared))
    if method in ON_SHARED:
        theirs = _of_donor(pair, name)
        inputs = (*inputs, Source(1, theirs))
        there = pair.donor.tensors[theirs]
        width = there.shape[1]
        wide = 8 if method != "omp" else 4
        fixed += 4 * there.numel + wide * len(shared) * width
        fixed += BATCH * (16 * len(shared) + 40 * k * width) + BATCH // 4 * k * info.shape[-1] * 8
    call = Rows(
        name,
        head,
        1 if flat else info.shape[1],
        pair.sources(head).tobytes(),
        shared.tobytes(),
        json.dumps(pieces(head)) if method == "subword" else "",
        json.dumps({**parameters, "approximation_method": method, "k": k}, sort_keys=True),
        recipe.seed,
    )
    end = pair.theirs.end
    shape = (1, end) if flat and len(info.shape) == 2 else (end,) if flat else (end, info.shape[1])
    return Task("transplant", f"rows of {name}", inputs, call, fixed=fixed), shape


def _of_donor(pair: Pair, name: str) -> str:
    """The donor's tensor of the same use: of the same name, else its only embeddings or head."""
    there = {n for n in vocabulary_tensors(pair.donor) if len(pair.donor.tensors[n].shape) == 2}
    if name in there:
        return name
    if config_ties(pair.donor.config) and (tied := tied_source(name, there)) is not None:
        return tied
    embeds = [n for n in there if any(w in n for w in ("embed", "wte", "shared"))]
    heads = [n for n in there if n not in embeds] or (embeds if config_ties(pair.donor.config) else [])
    found = embeds if any(w in name for w in ("embed", "wte", "shared")) and "embed_out" not in name else heads
    if len(found) != 1:
        raise CheckpointError(
            f"it has no tensor like {name!r}",
            where=pair.donor.reference,
            why=f"over its vocabulary are {', '.join(sorted(there)) or 'none'}",
            fix="choose another donor, or an approximation_method that needs none, such as subword",
        )
    return found[0]


def _config(pair: Pair) -> tuple[dict[str, Any] | None, list[str]]:
    if pair.model.config is None:
        return None, []
    config, warnings = _renaming(pair).config(pair.model.config, pair.theirs.end)
    if config.pop("auto_map", None) is not None:
        warnings.append(f"{pair.model.reference}: its config points to Python files (auto_map), which are not copied")
    return config, warnings


def _renaming(pair: Pair) -> Renaming:
    return Renaming(pair.own.ids, pair.theirs.ids, pair.theirs.named, pair.donor.config)


def _generation_config(pair: Pair) -> tuple[dict[str, bytes], list[str]]:
    name = "generation_config.json"
    folders = (pair.model.folder, pair.donor.folder)
    own, theirs = (read_json(inside(f, name)) if f and (f / name).is_file() else None for f in folders)
    if not isinstance(own, dict):
        return {}, []
    content, warnings = _renaming(pair).apply(own, name, theirs if isinstance(theirs, dict) else pair.donor.config)
    return {name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()}, warnings


def _remarks(pair: Pair, parameters: Mapping[str, Any]) -> list[str]:
    found = pair.matches(head=False)
    told = []
    if parameters["approximation_method"] in ON_SHARED and len(found.exact) < parameters["k"]:
        told.append(f"only {len(found.exact)} tokens are shared, so combinations have no more than these")
    without = pair.theirs.end - len(found.exact) - len(found.loose) - len(found.lacking)
    if without:
        told.append(f"{without} ids of the donor have no token or no embedding there, and get rows of zeros")
    if not found.exact:
        raise CheckpointError(
            "the two tokenizers share no token",
            where=pair.donor.reference,
            fix="choose a donor that shares at least a part of the vocabulary",
        )
    return told


def write_rows(call: Rows, desk: Desk, own: Tensor, make: Callable[[Ids], Made]) -> None:
    """One tensor, row after row: the model's own, zeros, and what ``make`` gives for new tokens, batch by batch."""
    sources = call.array("sources")
    lacking = np.flatnonzero(sources == LACKING)
    far: list[Tensor] = []
    made = _one_by_one(lacking, make, far)
    table = own.reshape(-1, call.width)
    step = max(1, desk.step // call.width)
    for start in range(0, len(sources), step):
        part = sources[start : start + step]
        block = table[torch.from_numpy(np.maximum(part, 0)).to(table.device)]
        block[torch.from_numpy(part == ZERO).to(table.device)] = 0
        for place in np.flatnonzero(part == LACKING).tolist():
            block[place] = next(made)
        desk.write(0, block, start * call.width)
    facts: dict[str, Any] = {
        "rows": len(sources),
        "taken": int((sources >= 0).sum()),
        "made": len(lacking),
        "zero": int((sources == ZERO).sum()),
    }
    if far:
        apart = torch.cat(far)
        facts |= {"misfit_mean": round(float(apart.mean()), 6), "misfit_max": round(float(apart.max()), 6)}
    desk.note(facts)


def _one_by_one(lacking: Ids, make: Callable[[Ids], Made], far: list[Tensor]) -> Iterator[Tensor]:
    """Rows of new tokens in order. Batches always begin at the same tokens, so that the step decides no bit."""
    for start in range(0, len(lacking), BATCH):
        rows, apart = make(lacking[start : start + BATCH])
        if apart is not None:
            far.append(apart.cpu())
        yield from rows.unbind()


def keys_of(pair: Pair, head: bool) -> list[Key]:
    """What the lacking tokens mean, in the order of their ids."""
    lacking = pair.matches(head).lacking
    return [lacking[t] for t in sorted(lacking, key=pair.theirs.ids.__getitem__)]
