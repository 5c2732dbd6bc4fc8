"""A task model as `reversible` sees it: pairs, tensors kept whole, and what of its config is not the base's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergekit_lr.checkpoint.adapter import tied_embedding
from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.graph.nodes import Source
from mergekit_lr.lowrank.adapters import changes
from mergekit_lr.lowrank.peft import is_embedding
from mergekit_lr.lowrank.preparing import FullTask, pair_name
from mergekit_lr.lowrank.ranks import RankRule
from mergekit_lr.lowrank.sorting import LORA, Embeddings, sort_tensors, stored_transposed

EDITED = ("vocab_size", "tie_word_embeddings")


@dataclass(frozen=True)
class Pair:
    """One module of one task. ``a``, ``b``: the factors' tensors in the task's file of factors, B A times ``scale``
    being the change in PEFT's orientation. ``path``: the module's name for PEFT."""

    a: str
    b: str
    rows: int
    columns: int
    rank: int
    scale: float
    transposed: bool
    embedding: bool
    dtype: str
    path: str
    magnitude: Source | None = None


@dataclass
class Model:
    """One task.

    ``factors``: number of the opened file that its pairs are in, None where they are not known yet. ``pairs``: by
    weight. ``whole``: tensor -> where it is read from. ``saved``: the same tensors by the adapter's name for them.
    ``untied``: heads that are the base's embedding, apart from the task's own. ``impossible``: tensors that no adapter
    can hold. ``config_edits``: what the task's config says otherwise than the base's. ``tied``: head and embedding are
    one tensor.
    """

    name: str
    label: str
    number: int
    checkpoint: Checkpoint
    full: bool
    factors: int | None = None
    pairs: dict[str, Pair] = field(default_factory=dict)
    whole: dict[str, Source] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    impossible: set[str] = field(default_factory=set)
    config_edits: dict[str, Any] = field(default_factory=dict)
    tied: bool = False

    def sources(self, weight: str) -> tuple[Source, Source]:
        """Where a module's B and A are read from; the weight itself where there are no pairs yet."""
        if self.factors is None:
            return Source(self.number, weight), Source(self.number, weight)
        pair = self.pairs[weight]
        return Source(self.factors, pair.b), Source(self.factors, pair.a)

    def read_from(self, number: int) -> Model:
        """With the adapter's file as input ``number``: its factors and what it saved whole are read from there."""

        def placed(source: Source | None) -> Source | None:
            return None if source is None else Source(number, source.tensor)

        pairs = {w: replace(p, magnitude=placed(p.magnitude)) for w, p in self.pairs.items()}
        return replace(
            self, factors=number, pairs=pairs, whole={n: Source(number, s.tensor) for n, s in self.whole.items()}
        )

    def prepared(self, factors: int, pairs: Checkpoint, differs: Sequence[str]) -> Model:
        """With the ranks that the decomposition found, and without what does not differ from the base."""
        found = {}
        for weight, pair in self.pairs.items():
            name = pair_name(self.name, weight, "a")
            if name in pairs.tensors:
                found[weight] = replace(pair, rank=pairs.tensors[name].shape[0])
        whole = {n: s for n, s in self.whole.items() if n in differs}
        saved = {n: k for n, k in self.saved.items() if n in whole}
        return replace(
            self, factors=factors, pairs=found, whole=whole, saved=saved, impossible=self.impossible & {*whole, *found}
        )


def model_of(
    name: str, label: str, number: int, checkpoint: Checkpoint, base: Checkpoint, embeddings: Embeddings, rule: RankRule
) -> Model:
    """A task model, from headers.

    Raises:
        CheckpointError: it does not fit the base, or changes a bias by LoRA.
    """
    own, old = checkpoint.config or {}, base.config or {}
    edits = {k: own[k] for k in EDITED if k in own and own[k] != old.get(k)}
    if isinstance(checkpoint, AdaptedCheckpoint):
        model = _adapter(name, label, number, checkpoint)
    else:
        model = _full(name, label, number, checkpoint, base, embeddings, rule)
    model.config_edits = edits
    embedding = tied_embedding(base)
    model.tied = (
        embedding is not None
        and not model.untied
        and not any(n not in base.tensors for n in (*model.pairs, *model.whole))
    )
    return model


def _adapter(name: str, label: str, number: int, checkpoint: AdaptedCheckpoint) -> Model:
    found = changes(checkpoint)
    if found.biases:
        raise CheckpointError(
            "lora_bias is not packed", where=checkpoint.reference, fix="merge it into its base, and pack the model"
        )
    heads = [w for w in found.modules if w not in checkpoint.base.tensors]
    if heads:
        raise CheckpointError(
            f"the adapter changes {heads[0]!r}, which the base ties to its embeddings",
            where=checkpoint.reference,
            fix="merge it into its base, and pack the model",
        )
    model = Model(name, label, number, checkpoint, full=False)
    for weight, m in found.modules.items():
        # The magnitude is read through the adapter's file, whose number is not known yet: a name stands for it.
        magnitude = None if m.magnitude is None else Source(-1, m.magnitude)
        model.pairs[weight] = Pair(
            m.a, m.b, m.rows, m.columns, m.rank, m.scale, m.transposed, m.embedding, m.dtype, m.path, magnitude
        )
    for target, stored in found.saved.items():
        model.whole[target] = Source(-1, stored)
        model.saved[target] = stored
    for weight, update in checkpoint.updates.items():
        if update.a is None and update.replaced is None and update.added is None and update.start is not None:
            model.untied[weight] = update.start
    return model


def _full(
    name: str,
    label: str,
    number: int,
    checkpoint: Checkpoint,
    base: Checkpoint,
    embeddings: Embeddings,
    rule: RankRule,
) -> Model:
    model = Model(name, label, number, checkpoint, full=True)
    found = sort_tensors(checkpoint, base, embeddings=embeddings)
    kinds = dict(found.rules)
    for tensor in found.impossible:
        info = checkpoint.tensors[tensor]
        if len(info.shape) == 2 and {info.dtype, base.tensors[tensor].dtype} <= AVERAGED:
            kinds[tensor] = LORA  # a matrix under a name that PEFT does not know: packed all the same
        else:
            model.whole[tensor] = Source(number, tensor)
        model.impossible.add(tensor)
    for weight, kind in kinds.items():
        if kind != LORA:
            model.whole[weight] = Source(number, weight)
            model.saved[weight] = weight
            continue
        turned = stored_transposed(weight, base)
        rows, columns = checkpoint.tensors[weight].shape[::-1] if turned else checkpoint.tensors[weight].shape
        a, b = pair_name(name, weight, "a"), pair_name(name, weight, "b")
        dtype, path = checkpoint.tensors[weight].dtype, weight.removesuffix(".weight")
        rank = rule.most(rows, columns)
        model.pairs[weight] = Pair(a, b, rows, columns, rank, 1.0, turned, is_embedding(weight), dtype, path)
    return model


def full_task(model: Model) -> FullTask:
    """What must be found out about a full fine-tune."""
    return FullTask(model.name, model.checkpoint, tuple(model.pairs), tuple(model.whole))
