"""Lays out the merge of adapters into one; `mergekit_lr.lowrank.merged` computes it module by module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_lr.checkpoint.adapter import tied_embedding
from mergekit_lr.checkpoint.dtypes import AVERAGED, RECIPE_DTYPES
from mergekit_lr.checkpoint.lora import HEAD, AdaptedCheckpoint
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, RecipeError, join_problems
from mergekit_lr.graph.nodes import Result, Sink, Source, Task
from mergekit_lr.graph.places import find_places
from mergekit_lr.lowrank.adapters import Module, changes, check_bases
from mergekit_lr.lowrank.merged import PairCall, SavedCall
from mergekit_lr.lowrank.peft import (
    CONFIG,
    PREFIX,
    Described,
    adapter_config,
    architectures_of,
    config_bytes,
    factor_names,
)
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Outline, model_order

WIDTH = {"F16": 0, "BF16": 0, "F32": 1, "F64": 2}


@dataclass
class Layout:
    """The outline of a merge of adapters while it grows."""

    recipe: Recipe
    inputs: Mapping[str, Checkpoint]
    sinks: list[Sink] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    transposed: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        if self.recipe.slices:
            raise RecipeError("adapters are merged whole", where="slices", fix="list them under models")
        self.models = model_order(self.recipe)
        self.base = self.inputs[self.models[0]]
        self.labels = [str(e.reference) for e in self.recipe.groups[0].inputs]
        opened = [self.inputs[m] for m in self.labels]
        plain = [c.reference for c in opened if not isinstance(c, AdaptedCheckpoint)]
        if plain:
            raise join_problems(
                CheckpointError, [f"{r}: no adapter; write it as BASE_MODEL+ADAPTER, or extract one" for r in plain]
            )
        self.adapted = [c for c in opened if isinstance(c, AdaptedCheckpoint)]
        merge: Any = self.recipe.resolve("", 0.0)[0]
        self.merge = merge
        self.warnings = check_bases(self.adapted, self.base, different=merge.different_bases)
        self.changes = [changes(c) for c in self.adapted]
        self._refuse()
        self.names = [f"adapter of {m}" for m in self.labels]
        self.models += self.names
        self.places = {p.name: p.t for p in find_places(self.recipe, self.inputs).every}

    def _refuse(self) -> None:
        problems = []
        for checkpoint, change in zip(self.adapted, self.changes, strict=True):
            if any(m.magnitude for m in change.modules.values()):
                problems.append(
                    f"{checkpoint.reference}: a DoRA adapter is not a low-rank change; merge it as a model "
                    "(task_arithmetic), and extract an adapter from the result"
                )
            if change.biases:
                problems.append(f"{checkpoint.reference}: lora_bias is not merged; merge the adapters as models")
        if problems:
            raise join_problems(CheckpointError, problems)

    def outline(self) -> Outline:
        """Everything that will be written.

        Raises:
            CheckpointError: adapters do not fit each other, or a module is missing where that is an error.
        """
        embedding = tied_embedding(self.base)
        self.tied = embedding is not None and self._all_tied(embedding)
        for weight in self._every("modules"):
            self._pair(weight, self.tied and weight == embedding)
        for target in self._every("saved"):
            self._whole(target, self.tied and target == embedding)
        self._check_missing()
        described = Described(
            ranks=self.ranks,
            saved={p for t, p in self.saved.items() if not t.endswith(".bias")},
            biases=any(t.endswith(".bias") for t in self.saved),
            fan_in_fan_out=self.transposed,
            tied=self.tied,
            base=self.models[0],
            architectures=architectures_of(self.base),
        )
        config = adapter_config(described, self.base.tensors)
        return Outline(
            models=tuple(self.models),
            sinks=tuple(self.sinks),
            tasks=tuple(self.tasks),
            files={CONFIG: config_bytes(config)},
            extra={n: c.adapter for n, c in zip(self.names, self.adapted, strict=True)},
            warnings=tuple(self.warnings),
            details={"ranks": self.ranks, "missing": self.missing},
        )

    def _every(self, kind: str) -> list[str]:
        """Base tensors that any adapter changes in this way, in the base's order, new ones last."""
        found = {n for c in self.changes for n in getattr(c, kind)}
        return [n for n in self.base.tensors if n in found] + sorted(found - set(self.base.tensors))

    def _all_tied(self, embedding: str) -> bool:
        """Whether every adapter that changes the shared embedding changes the head with it."""
        touching = [
            c for c in self.adapted if embedding in c.updates or any(n not in self.base.tensors for n in c.updates)
        ]
        tied = [not any(n not in self.base.tensors for n in c.updates) for c in touching]
        if any(tied) and not all(tied):
            raise CheckpointError(
                "some adapters change embedding and head together, others only one of the two",
                why=f"the base ties {embedding!r} and its output head",
                fix="merge the adapters as models (task_arithmetic)",
            )
        return bool(tied) and all(tied)

    def _parameters(self, name: str, present: Sequence[int]) -> tuple[Any, list[Any]]:
        merge, each = self.recipe.groups[0].resolve(name, self.places.get(name, 0.0))
        return merge, [each[i] for i in present]

    def _pair(self, weight: str, twin: bool) -> None:
        present = [i for i, c in enumerate(self.changes) if weight in c.modules]
        if any(weight in c.saved for c in self.changes):
            raise CheckpointError(
                f"{weight!r} is a low-rank pair in one adapter and saved whole in another",
                fix="merge the adapters as models (task_arithmetic)",
            )
        self._note_missing(weight, present)
        modules = [self.changes[i].modules[weight] for i in present]
        first = modules[0]
        if any((m.transposed, m.embedding) != (first.transposed, first.embedding) for m in modules):
            raise CheckpointError(f"the adapters store {weight!r} in different orientations")
        merge, each = self._parameters(weight, present)
        rank = self._rank(first, [m.rank for m in modules], merge)
        call = PairCall(
            name=weight,
            combination=merge.combination,
            rule=merge.rule,
            lam=merge.lam,
            rank=rank,
            scales=tuple(m.scale for m in modules),
            weights=tuple(p.weight for p in each),
            densities=tuple(p.density for p in each),
            seed=self.recipe.seed,
            keys=tuple(self.labels[i] for i in present),
            twin=twin,
        )
        sources = [Source(self._adapter(i), n) for i, m in zip(present, modules, strict=True) for n in (m.b, m.a)]
        dtype = self._dtype([m.dtype for m in modules])
        self.ranks[first.path] = rank
        self.transposed |= first.transposed and not first.embedding
        a, b = factor_names(first.path, embedding=first.embedding)
        outputs = [(b, (first.rows, rank)), (a, (rank, first.columns))]
        if twin:
            head_a, head_b = factor_names(HEAD.removesuffix(".weight"), embedding=False)
            outputs += [(head_b, (first.columns, rank)), (head_a, (rank, first.rows))]
        total = sum(m.rank for m in modules)
        held = 8 * (first.rows + first.columns) * (4 * total + rank) + 8 * 8 * total * total
        self._task(weight, sources, call, outputs, dtype, held)

    def _rank(self, module: Module, ranks: list[int], merge: Any) -> int:
        limit = min(module.rows, module.columns)
        if merge.combination == "peft_linear":
            if len(set(ranks)) > 1:
                raise CheckpointError(
                    f"the adapters have ranks {ranks} at {module.path!r}",
                    why="peft_linear adds factors, so they must be of one rank",
                    fix="use svd or cat",
                )
            return ranks[0]
        if merge.combination == "cat":
            return sum(ranks)
        most = min(sum(ranks), limit)
        return min(merge.rank or (max(ranks) if merge.combination == "svd" else most), most)

    def _whole(self, target: str, twin: bool) -> None:
        present = [i for i, c in enumerate(self.changes) if target in c.saved]
        self._note_missing(target, present)
        names = [self.changes[i].saved[target] for i in present]
        found = [self.adapted[i].adapter.tensors[n] for i, n in zip(present, names, strict=True)]
        start = target if target in self.base.tensors else tied_embedding(self.base)
        assert start is not None
        shapes = {i.shape for i in found} | {self.base.tensors[start].shape}
        if len(shapes) > 1:
            raise CheckpointError(
                f"{target!r} has shapes {sorted(map(list, shapes))} in the adapters and the base",
                fix="give all adapters one vocabulary first",
            )
        if any(i.dtype not in AVERAGED for i in found):
            raise CheckpointError(f"{target!r} is saved as {[i.dtype for i in found]} and cannot be averaged")
        merge, each = self._parameters(target, present)
        plain = re.sub(r"\.modules_to_save(\.default)?\.", ".", names[0].removeprefix(PREFIX))
        self.saved[target] = plain.removesuffix(".weight").removesuffix(".bias")
        outputs = [(f"{PREFIX}{plain}", found[0].shape)]
        if twin:
            outputs.append((f"{PREFIX}{HEAD}", found[0].shape))
        sources = [Source(0, start), *(Source(self._adapter(i), n) for i, n in zip(present, names, strict=True))]
        call = SavedCall(merge.lam, tuple(p.weight for p in each), twin)
        self._task(f"saved {target}", sources, call, outputs, self._dtype([i.dtype for i in found]), 0)

    def _adapter(self, index: int) -> int:
        return self.models.index(self.names[index])

    def _dtype(self, stored: list[str]) -> str:
        """The recipe's dtype, else the widest that is stored; two different halves make fp32."""
        if self.recipe.output_dtype:
            return RECIPE_DTYPES[self.recipe.output_dtype]
        widest = max(stored, key=lambda d: WIDTH[d])
        return "F32" if len({*stored}) > 1 and WIDTH[widest] == 0 else widest

    def _task(
        self,
        key: str,
        sources: list[Source],
        call: PairCall | SavedCall,
        outputs: Sequence[tuple[str, tuple[int, ...]]],
        dtype: str,
        held: int,
    ) -> None:
        number = len(self.tasks)
        self.tasks.append(Task("lora_merge", key, tuple(sources), call, fixed=held, held=2 + len(sources)))
        rule = "merged" if isinstance(call, PairCall) else "merged: saved whole"
        self.sinks += [Sink(n, dtype, s, Result(number, i), rule) for i, (n, s) in enumerate(outputs)]

    def _note_missing(self, name: str, present: list[int]) -> None:
        if len(present) < len(self.labels):
            self.missing[name] = [m for i, m in enumerate(self.labels) if i not in present]

    def _check_missing(self) -> None:
        if not self.missing:
            return
        first = next(iter(self.missing))
        told = f"{first!r} is not adapted by {', '.join(self.missing[first])}; {len(self.missing)} such"
        if self.merge.missing == "error":
            raise CheckpointError(
                "the adapters do not change the same modules",
                why=told,
                fix="set missing: zero to count them as unchanged there",
            )
        self.warnings.append(f"the adapters do not change the same modules, and count as unchanged there: {told}")
