"""Lays out the bundle of `reversible`: what is stored, and how each task's tensors come back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_lr.bundle.manifest import BASE, Entry, Manifest
from mergekit_lr.bundle.manifest import Task as Packed
from mergekit_lr.bundle.packing import identity, storage_table, task_names
from mergekit_lr.checkpoint.dtypes import AVERAGED, ITEM_BYTES, RECIPE_DTYPES
from mergekit_lr.checkpoint.layout import nbytes_of
from mergekit_lr.checkpoint.lora import AdaptedCheckpoint
from mergekit_lr.checkpoint.model import Checkpoint, open_folder
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.graph.build import refuse_quantised
from mergekit_lr.graph.nodes import Result, Sink, Source, Task
from mergekit_lr.lowrank import budget
from mergekit_lr.lowrank.adapters import check_bases
from mergekit_lr.lowrank.as_adapter import AsAdapter
from mergekit_lr.lowrank.merging import WIDTH
from mergekit_lr.lowrank.packing import PackCall, Side, group_of, stored_names
from mergekit_lr.lowrank.preparing import DIFFERS, PAIRS, SPECTRA, prepare_pairs, prepare_spectra
from mergekit_lr.lowrank.ranks import RankRule
from mergekit_lr.lowrank.sorting import Embeddings, stored_transposed
from mergekit_lr.lowrank.tasks import Model, Pair, full_task, model_of
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Outline, Preparation, model_order
from mergekit_lr.sizes import parse_size


@dataclass
class Bundling:
    """The outline of a bundle while it grows. ``prepared`` is None where nothing was prepared (a plan)."""

    recipe: Recipe
    inputs: Mapping[str, Checkpoint]
    prepared: Path | None
    sinks: list[Sink] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.recipe.slices:
            raise RecipeError("task models are packed whole", where="slices", fix="list them under models")
        self.models = model_order(self.recipe)
        self.base = self.inputs[self.models[0]]
        refuse_quantised([self.inputs[m] for m in self.models])
        listed = self.recipe.groups[0].inputs
        merge: Any = self.recipe.resolve("", 0.0)[0]
        self.merge = merge
        checkpoints = [self.inputs[str(e.reference)] for e in listed]
        self.warnings = check_bases(checkpoints, self.base, different=merge.different_bases)
        self.extra: dict[str, Checkpoint] = {}
        differs = self._prepared_json(DIFFERS) or {}
        pairs = self._open_pairs()
        self.members: list[Model] = []
        adapted = [isinstance(c, AdaptedCheckpoint) for c in checkpoints]
        if not all(adapted) and merge.rank is merge.energy is merge.ratio is None:
            plain = checkpoints[adapted.index(False)].reference
            raise RecipeError(
                f"{plain} is a full model, and no rank is given",
                where="parameters",
                fix="set rank, energy or ratio; or write an adapter as BASE_MODEL+ADAPTER",
            )
        for name, entry, checkpoint in zip(task_names(listed), listed, checkpoints, strict=True):
            label = str(entry.reference)
            how: Embeddings = "lora" if merge.embeddings == "low_rank" else "save"
            member = model_of(name, label, self.models.index(label), checkpoint, self.base, how, self._rule())
            if isinstance(checkpoint, AdaptedCheckpoint):
                member = member.read_from(self._number(f"adapter of {label}", checkpoint.adapter))
            elif pairs is not None:
                member = member.prepared(self._number("prepared", pairs), pairs, differs.get(name, []))
            self.members.append(member)
        unprepared = [m.name for m in self.members if m.full and m.factors is None]
        if unprepared:
            self.warnings.append(
                f"{', '.join(unprepared)}: which tensors differ from the base, and so what is stored, is found out "
                "by the merge; this is the most that it can be"
            )

    def _rule(self) -> RankRule:
        return RankRule(self.merge.rank, self.merge.energy, self.merge.ratio)

    def prepare_pairs(self, work: Preparation) -> None:
        """Decompose the task vectors of full fine-tunes.

        Raises:
            RecipeError: there are some, and no rank is given.
        """
        full = [full_task(m) for m in self.members if m.full]
        prepare_pairs(work, self.base, full, self._rule(), lambda w: stored_transposed(w, self.base))

    def prepare_spectra(self, work: Preparation) -> None:
        """Find out what each number of basis vectors would leave; the pairs must be prepared."""
        from mergekit_lr.lowrank.adapters import read_whole
        from mergekit_lr.lowrank.packing import canonical, spectra

        calls = self.calls()

        def spectra_of(weight: str) -> dict[str, Any]:
            call = calls[weight]
            places = [m.sources(weight) for m in self.members if weight in m.pairs]
            given = [tuple(read_whole(self._checkpoint(s), s.tensor).double() for s in pair) for pair in places]
            return spectra(call, canonical([(b, a) for b, a in given], call.scales, call.rank, call.gauge))

        try:
            prepare_spectra(work, calls, spectra_of)
        finally:
            for name, checkpoint in self.extra.items():
                if name == "prepared":
                    checkpoint.close()

    def _checkpoint(self, source: Source) -> Checkpoint:
        name = self.models[source.model]
        return self.extra.get(name) or self.inputs[name]

    def _prepared_json(self, name: str) -> Any:
        path = None if self.prepared is None else self.prepared / name
        return json.loads(path.read_bytes()) if path is not None and path.exists() else None

    def _open_pairs(self) -> Checkpoint | None:
        folder = None if self.prepared is None else self.prepared / PAIRS
        has_any = folder is not None and any(folder.glob("*.safetensors"))
        return open_folder(folder, "prepared") if folder is not None and has_any else None

    def _number(self, name: str, checkpoint: Checkpoint) -> int:
        if name not in self.models:
            self.models.append(name)
            self.extra[name] = checkpoint
        return self.models.index(name)

    def calls(self) -> dict[str, PackCall]:
        """Every module that is packed, with p still the most that is useful."""
        found = {}
        for weight in self.base.tensors:
            having = [m for m in self.members if weight in m.pairs]
            if having:
                found[weight] = self._call(weight, [m.name for m in having], [m.pairs[weight] for m in having])
        return found

    def _call(self, weight: str, tasks: list[str], pairs: list[Pair]) -> PackCall:
        if len({(p.transposed, p.embedding) for p in pairs}) > 1:
            raise CheckpointError(f"the tasks have {weight!r} in different orientations")
        first = pairs[0]
        rank = max(p.rank for p in pairs)
        if self.merge.rank is not None:
            rank = min(rank, self.merge.rank)
        return PackCall(
            weight=weight,
            tasks=tuple(tasks),
            scales=tuple(p.scale for p in pairs),
            rank=rank,
            a=self._side(first.columns, rank, len(tasks)),
            b=self._side(first.rows, rank, len(tasks)),
            gauge=self.merge.gauge,
            dtype=self._dtype([p.dtype for p in pairs]),
        )

    def _side(self, positions: int, rank: int, tasks: int) -> Side:
        group = group_of(self.merge.granularity, positions)
        most = min(group * rank, tasks - 1)
        return Side(positions, group, most if self.merge.basis is None else min(self.merge.basis, most))

    def _dtype(self, stored: list[str]) -> str:
        if self.recipe.output_dtype:
            return RECIPE_DTYPES[self.recipe.output_dtype]
        widest = max(stored, key=lambda d: WIDTH[d])
        return "F32" if len(set(stored)) > 1 and WIDTH[widest] == 0 else widest

    def outline(self, method: str) -> Outline:
        """Everything that will be stored.

        Raises:
            UsageError: a byte budget that not even means and leftovers fit into.
        """
        calls = self.calls()
        for member in self.members:
            self._verbatim(member)
        calls = self._sized(calls)
        for call in calls.values():
            self._module(call, method)
        self._recovered(calls)
        adapters = AsAdapter(self.base, self.models[0], self.members, calls, self._info).adapters()
        checkpoints = [m.checkpoint for m in self.members]
        storage = storage_table(self.sinks, checkpoints)
        storage["ratio_to_pairs"] = self._ratio_to_pairs()
        manifest = Manifest(
            method=method,
            tasks=tuple(Packed(m.name, m.label, _facts(m)) for m in self.members),
            parameters=self.recipe.canonical()["parameters"],
            base={"model": self.models[0], "files": identity(self.base)},
            entries=tuple(self.entries),
            adapters=adapters if adapters.entries else None,
            storage=storage,
        )
        return Outline(
            models=tuple(self.models),
            sinks=tuple(self.sinks),
            tasks=tuple(self.tasks),
            extra=self.extra,
            warnings=tuple(self.warnings),
            details={"storage": storage},
            bundle=manifest,
        )

    def _verbatim(self, member: Model) -> None:
        for target, source in member.whole.items():
            info = self._info(source)
            name = f"own/{member.name}/{target}"
            self.sinks.append(Sink(name, info.dtype, info.shape, source, "stored verbatim: no low-rank change"))
            dtype = self.base.tensors[target].dtype if target in self.base.tensors else info.dtype
            dtype = dtype if {dtype, info.dtype} <= AVERAGED else info.dtype
            self.entries.append(Entry(target, dtype, info.shape, "copy", (), {member.name: (name,)}))
        for weight, pair in member.pairs.items():
            if pair.magnitude is not None:
                info = self._info(pair.magnitude)
                name = f"own/{member.name}/{weight}.magnitude"
                self.sinks.append(
                    Sink(name, info.dtype, info.shape, pair.magnitude, "stored verbatim: DoRA's magnitude")
                )

    def _info(self, source: Source) -> Any:
        return self._checkpoint(source).tensors[source.tensor]

    def _sized(self, calls: dict[str, PackCall]) -> dict[str, PackCall]:
        """Choose every side's p where a budget or an error decides."""
        if self.merge.basis is not None:
            return calls
        found = self._prepared_json(SPECTRA)
        if found is None:
            self.warnings.append("how many basis vectors are stored is found out by the merge; these are the most")
            return calls
        table: dict[str, budget.Spectrum] = {}
        fixed = sum(nbytes_of(s) for s in self.sinks)
        for weight, call in calls.items():
            item = ITEM_BYTES[call.dtype]
            for letter, side in (("a", call.a), ("b", call.b)):
                step = item * (side.positions * call.rank + len(call.tasks) * side.groups)
                own = found[weight][letter]
                table[f"{letter} {weight}"] = budget.Spectrum(tuple(own["tail"]), own["energy"], step)
                fixed += item * side.positions * call.rank
        if self.merge.max_bytes is not None:
            chosen = budget.by_bytes(table, parse_size(str(self.merge.max_bytes)) - fixed)
        else:
            chosen = budget.by_error(table, self.merge.max_error)
        return {
            w: replace(c, a=replace(c.a, p=chosen[f"a {w}"]), b=replace(c.b, p=chosen[f"b {w}"]))
            for w, c in calls.items()
        }

    def _module(self, call: PackCall, method: str) -> None:
        number = len(self.tasks)
        having = [m for m in self.members if m.name in call.tasks]
        sources = [s for m in having for s in m.sources(call.weight)]
        elements = len(call.tasks) * call.rank * (call.a.positions + call.b.positions)
        self.tasks.append(Task(method, call.weight, tuple(sources), call, fixed=8 * 10 * elements, held=2))
        index = 0
        for letter, side in (("A", call.a), ("B", call.b)):
            for kind, shape in side.shapes(len(call.tasks), call.rank):
                name = f"{kind}/{call.weight}/{letter}"
                self.sinks.append(Sink(name, call.dtype, shape, Result(number, index), f"stored: {kind}"))
                index += 1

    def _recovered(self, calls: Mapping[str, PackCall]) -> None:
        """How each task's model comes back: packed, stored whole, or the base's."""
        for name, info in self.base.tensors.items():
            plain = [m.name for m in self.members if name not in m.pairs and name not in m.whole]
            if plain:
                own: dict[str, tuple[str, ...]] = dict.fromkeys(plain, ())
                self.entries.append(Entry(name, info.dtype, info.shape, "copy", (BASE + name,), own))
            if name not in calls:
                continue
            call = calls[name]
            for dora in (False, True):
                chosen = {m.name: m for m in self.members if name in m.pairs and bool(m.pairs[name].magnitude) == dora}
                if chosen:
                    self._low_rank(call, list(chosen), dora)
        for member in self.members:
            for head, embedding in member.untied.items():
                info = self.base.tensors[embedding]
                self.entries.append(Entry(head, info.dtype, info.shape, "copy", (BASE + embedding,), {member.name: ()}))

    def _low_rank(self, call: PackCall, tasks: list[str], dora: bool) -> None:
        info = self.base.tensors[call.weight]
        first = next(m.pairs[call.weight] for m in self.members if m.name in call.tasks)
        self.entries.append(
            Entry(
                call.weight,
                info.dtype,
                info.shape,
                "low_rank",
                (BASE + call.weight, *stored_names(call)),
                {t: ((f"own/{t}/{call.weight}.magnitude",) if dora else ()) for t in tasks},
                call={
                    "a": [call.a.p, call.a.group],
                    "b": [call.b.p, call.b.group],
                    "rank": call.rank,
                    "transposed": first.transposed,
                    "dora": dora,
                },
                numbers={t: {"row": call.tasks.index(t)} for t in tasks},
            )
        )

    def _ratio_to_pairs(self) -> float:
        """Bytes that are stored for pairs, over those of the pairs themselves in the same dtype."""
        packed = sum(nbytes_of(s) for s in self.sinks if not s.name.startswith("own/"))
        pairs = 0
        for member in self.members:
            for weight, pair in member.pairs.items():
                item = ITEM_BYTES[self._dtype([m.pairs[weight].dtype for m in self.members if weight in m.pairs])]
                pairs += item * pair.rank * (pair.rows + pair.columns)
        return round(packed / pairs, 6) if pairs else 0.0


def _facts(member: Model) -> dict[str, Any]:
    found: dict[str, Any] = {"files": identity(member.checkpoint)}
    return found | ({"config": member.config_edits} if member.config_edits else {})
