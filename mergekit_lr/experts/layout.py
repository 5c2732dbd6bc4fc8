"""The output of a reduction, tensor by tensor: what is copied, what is computed from what, what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mergekit_lr.arch.moe import MoeLayer, RouterTensor, Stored
from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.experts.decision import LayerDecision
from mergekit_lr.experts.partition import Group
from mergekit_lr.experts.tasks import Combine, Decode, Fitted, MatrixMerge, Recipe, nameless
from mergekit_lr.graph.nodes import Operation, Result, Sink, Source, Task
from mergekit_lr.method import Call, Space
from mergekit_lr.registry import tensor_method

KEPT = "copied: no part of a router or of a routed expert"
ALONE = "copied: expert kept as it was"
SLABS = "copied: the slabs of the experts that are kept"
MEAN = "merged: weighted mean of experts"
ROWS = "copied: the router's rows of the experts that are kept"
MEAN_ROWS = "merged: weighted mean of the router's rows"
TIED = "copied: the whole router, its rows tied"
DECODED = "decoded from FP8"
NAMES = {"aligned": "aligned mean of experts", "union": "union decomposition of experts", "mean": "mean of experts"}
NewExpert = tuple[int, Group, tuple[float, ...]]
"""(its number, who it is made of, their shares)."""

MATRIX_TEMPORARIES = 4
"""Experts in fp32 that a merge of matrices may hold beside its members."""


@dataclass(frozen=True)
class Spec:
    """How to write what was decided: ``dtype`` is a safetensors code or None for each tensor's own."""

    method: str
    merge: str = "mean"
    router: str = "mean"
    rank: str | int | float = "full"
    dtype: str | None = None
    requantise: bool = False
    width: int | None = None
    whiten: bool = False


@dataclass
class Composition:
    """Sinks and tasks in the making. Input 0 is the model; ``fitted`` and ``statistics`` are (input, opened file)."""

    checkpoint: Checkpoint
    spec: Spec
    decisions: Mapping[str, LayerDecision]
    layers: Sequence[MoeLayer]
    fitted: tuple[int, Checkpoint] | None = None
    statistics: tuple[int, Checkpoint] | None = None
    sinks: list[Sink] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    dropped: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        alone = all(g.alone for d in self.decisions.values() for g in d.partition.groups) and self.fitted is None
        quantised = {layer.quantised for layer in self.layers} - {""}
        #: FP8 weights are written as floating point throughout: some experts are no longer what the scales belong to
        self.decode = "fp8" in quantised and not alone and not self.spec.requantise
        #: config.json must no longer say that the weights are quantised
        self.unquantised = bool(quantised) and not alone and not self.spec.requantise

    def run(self) -> None:
        """Every tensor of the model, in the order of its files."""
        owner = {name: layer for layer in self.layers for name in layer.names}
        begun: set[str] = set()
        for name, info in self.checkpoint.tensors.items():
            layer = owner.get(name)
            if layer is None:
                self._other(info)
            elif layer.block not in begun:
                begun.add(layer.block)
                self._layer(layer, self.decisions[layer.block])

    def _other(self, info: TensorInfo) -> None:
        scale = f"{info.name}_scale_inv"
        if self.decode and info.name.endswith("_scale_inv"):
            self.dropped.append((self.checkpoint.reference, info.name, "scales of weights that were decoded"))
        elif self.decode and scale in self.checkpoint.tensors:
            self._decoded(info.name, scale, info.name)
        else:
            self.sinks.append(self._copy(info.name, info.name, KEPT))

    def _copy(self, source: str, name: str, rule: str) -> Sink:
        """A tensor as it is, in the output's dtype."""
        info = self.checkpoint.tensors[source]
        dtype = self._dtype(info.dtype)
        own = Source(0, source)
        if dtype == info.dtype:
            return Sink(name, dtype, info.shape, own, rule)
        method = tensor_method("passthrough")
        call = Call(name, info.shape, method.Merge(), (method.PerModel(),), has_base=False)
        return Sink(name, dtype, info.shape, Operation("passthrough", call, (own,), None, Space.WEIGHT), rule)

    def _dtype(self, stored: str) -> str:
        return (self.spec.dtype or stored) if stored in AVERAGED else stored

    def _decoded(self, source: str, scales: str, name: str) -> None:
        info = self.checkpoint.tensors[source]
        rows, columns = info.shape
        task = self._task(name, [source, scales], Decode(rows, columns), held=4)
        self.sinks.append(Sink(name, self._floating, info.shape, Result(task, 0), DECODED))

    @property
    def _floating(self) -> str:
        """The dtype of what was quantised before."""
        return self.spec.dtype or "BF16"

    def _task(self, key: str, names: Sequence[str], call: Any, *, fixed: int = 0, held: int = 4) -> int:
        sources = tuple(Source(0, n) for n in names)
        return self._raw_task(key, sources, call, fixed, held)

    def _raw_task(self, key: str, sources: tuple[Source, ...], call: Any, fixed: int, held: int) -> int:
        self.tasks.append(Task(self.spec.method, key, sources, call, fixed, held))
        return len(self.tasks) - 1

    def _layer(self, layer: MoeLayer, decision: LayerDecision) -> None:
        for r in layer.router:
            self._router(r, decision)
        fused = layer.stored[0].slot.fused
        if fused:
            self._fused(layer, decision)
        else:
            for j, group in enumerate(decision.partition.groups):
                self._numbered(layer, j, group, decision.shares[j])
        for e in () if fused else decision.partition.dropped:
            for s in layer.stored:
                self.dropped.append((self.checkpoint.reference, s.names[e], "expert left out"))

    def _router(self, router: RouterTensor, decision: LayerDecision) -> None:
        """Kept in its stored dtype, whatever the output's."""
        if self.spec.router == "tied":
            self.sinks.append(Sink(router.name, router.dtype, router.shape, Source(0, router.name), TIED))
            return
        count = router.shape[router.axis]
        numel = 1
        for d in router.shape:
            numel *= d
        numel //= count
        rows = tuple(tuple((0, e * numel, s) for e, s in row) for row in decision.router)
        shape = tuple(len(rows) if i == router.axis else d for i, d in enumerate(router.shape))
        task = self._task(router.name, [router.name], Combine(numel, rows, router.dtype))
        rule = ROWS if all(len(r) == 1 for r in rows) else MEAN_ROWS
        self.sinks.append(Sink(router.name, router.dtype, shape, Result(task, 0), rule))

    def _fits(self, layer: MoeLayer, j: int) -> tuple[str, ...]:
        """Names of the matrices of new expert j that were worked out before."""
        if self.fitted is None:
            return ()
        stem = f"{layer.block}.experts.{j}."
        every = (f"{m}{b}" for b in ("", "_bias") for m in ("gate", "up", "down"))
        return tuple(m for m in every if stem + m in self.fitted[1].tensors)

    def _numbered(self, layer: MoeLayer, j: int, group: Group, shares: tuple[float, ...]) -> None:
        """A new expert where every expert has tensors of its own."""
        if group.alone and not self._fits(layer, j):
            for s in layer.stored:
                self._alone(s, group.centre, j)
        elif self._plain(layer) and not self._fits(layer, j):
            for s in layer.stored:
                row = tuple((i, 0, share) for i, share in enumerate(shares) if share > 0)
                names = [s.names[e] for e in group.members]
                task = self._task(s.names[j], names, Combine(s.numel, (row,), s.dtype))
                self.sinks.append(Sink(s.names[j], self._dtype(s.dtype), s.shape, Result(task, 0), MEAN))
        else:
            self._matrices(layer, f"{layer.block}.experts.{j}", [(j, group, shares)])

    def _alone(self, s: Stored, e: int, j: int) -> None:
        if self.decode and s.suffix == "_scale_inv":
            return
        if self.decode and s.names[e] + "_scale_inv" in self.checkpoint.tensors:
            self._decoded(s.names[e], s.names[e] + "_scale_inv", s.names[j])
        else:
            self.sinks.append(self._copy(s.names[e], s.names[j], ALONE))

    def _plain(self, layer: MoeLayer) -> bool:
        """Whether averaging stored numbers is averaging experts."""
        return self.spec.merge in ("mean", "least_squares") and not layer.quantised

    def _fused(self, layer: MoeLayer, decision: LayerDecision) -> None:
        """New experts where one tensor holds them all."""
        groups = decision.partition.groups
        fits = any(self._fits(layer, j) for j in range(len(groups)))
        alone = all(g.alone for g in groups)
        if fits or not (alone or self._plain(layer)):
            self._matrices(
                layer, f"{layer.block}.experts", list(zip(range(len(groups)), groups, decision.shares, strict=True))
            )
            return
        for s in layer.stored:
            rows = tuple(
                tuple((0, e * s.numel, f) for e, f in zip(g.members, shares, strict=True) if f > 0)
                for g, shares in zip(groups, decision.shares, strict=True)
            )
            task = self._task(s.names[0], s.names, Combine(s.numel, rows, s.dtype))
            shape = (len(groups), *s.shape)
            self.sinks.append(Sink(s.names[0], self._dtype(s.dtype), shape, Result(task, 0), SLABS if alone else MEAN))

    def _matrices(self, layer: MoeLayer, key: str, experts: list[NewExpert]) -> None:
        """New experts whose matrices are merged as such, or were fitted."""
        inputs = _Inputs()
        recipes, grams = [], []
        fits: set[str] = set()
        for j, group, shares in experts:
            own = self._fits(layer, j)
            fits |= set(own)
            needs_members = not {"gate", "up", "down"} <= set(own)
            members = [(e, f) for e, f in zip(group.members, shares, strict=True) if f > 0 or e == group.centre]
            places = [
                tuple((inputs.number(Source(0, slab.tensor)), slab.start) for slab in layer.slabs(e))
                for e, _ in (members if needs_members else ())
            ]
            centre = [e for e, _ in members].index(group.centre)
            taken = tuple(Fitted(m, inputs.number(self._fitted(layer, j, m))) for m in own)
            recipes.append(Recipe(tuple(places), tuple(f for _, f in members), centre, taken))
            if self.spec.whiten:
                grams.append(self._grams(layer, [e for e, _ in members], inputs))
        slots = layer.family.slots
        call = MatrixMerge(
            nameless(layer.stored),
            slots,
            tuple(recipes),
            self.spec.merge,
            self.spec.rank,
            self.spec.requantise and layer.quantised == "fp8",
            tuple(grams),
        )
        largest = max(len(r.members) for r in recipes) + MATRIX_TEMPORARIES
        matrices = layer.width * layer.hidden * 3 * 4
        if self.spec.whiten:
            largest += 2 * (layer.hidden + layer.width) // max(layer.width, 1)
        task = self._raw_task(key, inputs.sources(), call, largest * matrices, 0)
        rule = f"merged: {NAMES.get(self.spec.merge, 'experts')}" + (", fitted" if fits else "")
        self.sinks += self._results(layer, experts, task, rule, quantised=call.requantise)

    def _results(
        self, layer: MoeLayer, experts: list[NewExpert], task: int, rule: str, quantised: bool
    ) -> Iterator[Sink]:
        width = self.spec.width or layer.width
        by_slot = {(s.slot.name, s.suffix): s for s in layer.stored}
        stems = [f"{layer.block}.{slot.name}" for slot in layer.family.slots]
        for suffix in ("", "_scale_inv") if quantised else ("",):
            for i, (slot, stem) in enumerate(zip(layer.family.slots, stems, strict=True)):
                if suffix and slot.bias:
                    continue
                known = by_slot.get((slot.name, suffix))
                shape = known.resized(layer.width, width) if known else _plain_shape(slot, layer.hidden, width)
                stored = known.dtype if known else "BF16"
                dtype = stored if quantised and not slot.bias else self._dtype(stored if stored in AVERAGED else "BF16")
                name = stem.format(e=experts[0][0]) + suffix
                whole = (len(experts), *shape) if slot.fused else shape
                index = i + (len(stems) if suffix else 0)
                yield Sink(name, dtype, whole, Result(task, index), rule)

    def _fitted(self, layer: MoeLayer, j: int, matrix: str) -> Source:
        assert self.fitted is not None
        return Source(self.fitted[0], f"{layer.block}.experts.{j}.{matrix}")

    def _grams(
        self, layer: MoeLayer, members: list[int], inputs: _Inputs
    ) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        """Where the Gram of the layer's inputs is, and those of the members' hidden layers."""
        assert self.statistics is not None
        number, _ = self.statistics
        hidden = inputs.number(Source(number, f"{layer.block}.experts.hidden_gram"))
        n = layer.width
        places = tuple((hidden, e * n * n, n) for e in members)
        return inputs.number(Source(number, f"{layer.block}.experts.input_gram")), places


class _Inputs:
    """A task's inputs, each once."""

    def __init__(self) -> None:
        self._numbers: dict[Source, int] = {}

    def number(self, source: Source) -> int:
        return self._numbers.setdefault(source, len(self._numbers))

    def sources(self) -> tuple[Source, ...]:
        return tuple(self._numbers)


def _plain_shape(slot: Any, hidden: int, width: int) -> tuple[int, ...]:
    """One expert's part of a slot in floating point, where it was stored as blocks."""
    rows = hidden if slot.holds == ("down",) else width * len(slot.holds)
    if slot.bias:
        return (rows,)
    columns = width if slot.holds == ("down",) else hidden
    return (columns, rows) if slot.transposed else (rows, columns)


def even_decisions(layers: Sequence[MoeLayer], experts: int, spec_router: str, *, prunes: bool) -> list[LayerDecision]:
    """Stand-ins of the right size while nothing is decided: the plan's bytes and shapes do not depend on who."""
    from mergekit_lr.experts.partition import partition
    from mergekit_lr.experts.router import router_rows

    found = []
    for layer in layers:
        cut = [i * layer.experts // experts for i in range(experts + 1)]
        members = [tuple(range(a, a + 1 if prunes else b)) for a, b in pairwise(cut)]
        own = partition([Group(m, m[0]) for m in members], layer.experts)
        shares = tuple(tuple(1 / len(m) for _ in m) for m in members)
        rows = router_rows(spec_router, own, [1.0] * layer.experts, layer.experts)
        found.append(LayerDecision(layer.block, own, shares, rows))
    return found
