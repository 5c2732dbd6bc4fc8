"""Lays out a mixture built from dense models, and writes its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lr.checkpoint.dtypes import RECIPE_DTYPES
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.experts.mixtures import MATRICES, MIXTURES, MLP, RANDOM, Mixture, Prompts, fitting, mixture_named
from mergekit_lr.graph.nodes import Result, Sink, Source, Task
from mergekit_lr.lazy import torch
from mergekit_lr.rewrite import Desk, Outline, model_order

if TYPE_CHECKING:
    from mergekit_lr.recipe.schema import Recipe

GATES = "gates.safetensors"
KEY = "gates from prompts"


@dataclass(frozen=True)
class Changed:
    """An expert's matrix with noise and a factor: ``(x + noise * normal) * scale``."""

    noise: float
    scale: float
    key: int


@dataclass(frozen=True)
class Drawn:
    """A random gate."""

    shape: tuple[int, int]
    uniform: bool
    key: int


@dataclass(frozen=True)
class Zeros:
    """A bias that the base has none of."""

    count: int


def key_of(*parts: object) -> int:
    """128 bits for the random numbers of one tensor."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


class Building:
    """One recipe, its parameters and inputs checked.

    ``experts`` and ``shared``: (reference, parameters) in order.
    """

    def __init__(self, recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> None:
        assert recipe.base_model is not None
        self.recipe, self.base = recipe, inputs[str(recipe.base_model)]
        self.models = model_order(recipe)
        self.inputs = inputs
        self.p: Any
        self.p, parameters = recipe.resolve("", 0.0)
        listed: list[tuple[str, Any]] = [
            (str(e.reference), p) for e, p in zip(recipe.groups[0].inputs, parameters, strict=True)
        ]
        self.experts = [(m, q) for m, q in listed if not q.shared]
        self.shared = [(m, q) for m, q in listed if q.shared]
        self.mixture = self._mixture()
        self.layers = self._layers()
        out = recipe.output_dtype
        self.dtype = RECIPE_DTYPES[out] if out else None

    @property
    def hidden(self) -> int:
        return self.base.tensors["model.layers.0.mlp.gate_proj.weight"].shape[1]

    def prompts(self) -> list[Prompts]:
        """Of every expert, then of the shared one where it has a gate."""
        gated = self.shared if self.mixture.shared_gate else []
        return [(tuple(q.positive_prompts), tuple(q.negative_prompts)) for _, q in (*self.experts, *gated)]

    def _mixture(self) -> Mixture:
        types = {m: str((self.inputs[m].config or {}).get("model_type")) for m in self.models}
        where, kind = self.base.reference, types[self.base.reference]
        odd = [m for m, t in types.items() if t != kind]
        if odd:
            raise CheckpointError(
                "experts must be of the base's architecture",
                where=odd[0],
                why=f"its model_type is {types[odd[0]]!r}, that of {where} {kind!r}",
                fix="take fine-tunes of one base",
            )
        found = fitting(kind, len(self.shared))
        if self.p.architecture is None:
            if found:
                return found[0]
        else:
            wanted = mixture_named(self.p.architecture)
            if wanted is not None and wanted in found:
                return wanted
        able = "; ".join(
            f"{m.name} from {', '.join(m.takes)} with {m.least_shared}"
            f"{f' to {m.most_shared}' if m.most_shared > m.least_shared else ''} shared experts"
            for m in MIXTURES
        )
        name = self.p.architecture or "mixture"
        raise CheckpointError(
            f"no {name} can be built of these models",
            where=where,
            why=f"they are of type {kind!r} with {len(self.shared)} shared experts; there are {able}",
            fix="change the shared experts or the architecture",
        )

    def _layers(self) -> int:
        """How many layers there are; every expert must have the base's MLPs."""
        sizes = {n: i.shape for n, i in self.base.tensors.items() if MLP.match(n)}
        odd = [n for n in self.base.tensors if ".mlp." in n and not MLP.match(n)]
        problems = [f"{self.base.reference}: {n!r} has no place in {self.mixture.name}" for n in odd[:3]]
        if self.mixture.name == "mixtral":
            biased = [n for n in self.base.tensors if ".self_attn." in n and n.endswith(".bias")]
            problems += [f"{self.base.reference}: {n!r} has no place in mixtral; build qwen2_moe" for n in biased[:1]]
        for model in dict.fromkeys(m for m, _ in (*self.experts, *self.shared)):
            for name, shape in sizes.items():
                found = self.inputs[model].tensors.get(name)
                if found is None or found.shape != shape:
                    has = "is missing" if found is None else f"has shape {list(found.shape)}"
                    problems.append(f"{model}: tensor {name!r} {has} where {self.base.reference} has {list(shape)}")
        if not sizes:
            problems.append(f"{self.base.reference}: it has no gated MLPs model.layers.N.mlp.gate_proj")
        if problems:
            raise join_problems(CheckpointError, problems[:20])
        return 1 + max(int(m[1]) for n in sizes if (m := MLP.match(n)))

    def outline(self, prepared: Path | None) -> Outline:
        """The whole output."""
        gates = None
        if prepared is not None and (prepared / GATES).exists():
            gates = open_file(prepared / GATES, KEY)
        models = (*self.models, *((KEY,) if gates else ()))
        writer = _Layout(self, models)
        for name, info in self.base.tensors.items():
            if not MLP.match(name):
                writer.copy(name, self.base.reference, name, info, "copied: of the base")
        for layer in range(self.layers):
            writer.layer(layer, has_gates=gates is not None)
        config = dict(self.base.config or {})
        made = self.mixture.configure(config, len(self.experts), len(self.shared), self.p.experts_per_token)
        return Outline(
            models=models,
            sinks=tuple(writer.sinks),
            tasks=tuple(writer.tasks),
            dropped=tuple(self._dropped()),
            config=made,
            extra={KEY: gates} if gates else {},
            warnings=tuple(self._warnings(gates)),
            details={
                "architecture": self.mixture.name,
                "experts": [m for m, _ in self.experts],
                "shared_experts": [m for m, _ in self.shared],
                "gate_mode": self.p.gate_mode,
            },
        )

    def _dropped(self) -> list[tuple[str, str, str]]:
        used = {m for m, _ in (*self.experts, *self.shared)}
        found = []
        for model in self.models:
            base = model == self.base.reference
            for name in self.inputs[model].tensors:
                if MLP.match(name):
                    if model not in used:
                        found.append((model, name, "an MLP of the base, in whose place the experts are"))
                elif not base:
                    found.append((model, name, "not of an MLP: an expert gives only those"))
        return found

    def _warnings(self, gates: Checkpoint | None) -> list[str]:
        found = [self.mixture.warning] if self.mixture.warning else []
        count = len(self.experts)
        if count & (count - 1):
            found.append(f"{count} experts are no power of two, which some runtimes ask for")
        if len({m for m, _ in self.experts}) == 1 and not any(q.noise_scale for _, q in self.experts):
            found.append("all experts are one model: the output computes what that model does, at more cost")
        if self.p.gate_mode not in RANDOM and gates is None:
            found.append("the gates are found by running the base on the prompts; a plan does not do that")
        if gates is not None:
            from mergekit_lr.experts.gates import degenerate

            read = {int(n): gates.read(n, 0, i.numel).view(i.shape)[:count] for n, i in gates.tensors.items()}
            layers = degenerate(read)
            if layers:
                which = "all layers" if len(layers) == self.layers else f"layers {', '.join(map(str, layers))}"
                found.append(f"the gates of {which} are nearly dependent: the prompts are too much alike")
        return found


class _Layout:
    """Collects what is written."""

    def __init__(self, job: Building, models: Sequence[str]) -> None:
        self.job, self.number = job, {m: i for i, m in enumerate(models)}
        self.sinks: list[Sink] = []
        self.tasks: list[Task] = []
        self.order = sorted(job.base.tensors, key=job.base.file_position)

    def copy(self, name: str, model: str, own: str, info: Any, rule: str, change: Changed | None = None) -> None:
        """A tensor of a model as it is, cast where the output has another dtype, or changed."""
        dtype = self.job.dtype if self.job.dtype and info.dtype in ("F32", "F16", "BF16", "F64") else info.dtype
        source = Source(self.number[model], own)
        if dtype == info.dtype and change is None:
            self.sinks.append(Sink(name, dtype, info.shape, source, rule))
        else:
            self._task(name, dtype, info.shape, (source,), change, rule)

    def layer(self, layer: int, *, has_gates: bool) -> None:
        job = self.job
        for e, (model, q) in enumerate(job.experts):
            for matrix in MATRICES:
                self._matrix(job.mixture.expert(layer, e, matrix), model, q, layer, matrix, f"expert {e}")
        for model, q in job.shared:
            for matrix in MATRICES:
                self._matrix(job.mixture.shared_expert(layer, matrix), model, q, layer, matrix, "shared expert")
        rows = len(job.experts)
        self._gate(job.mixture.gate(layer), layer, 0, rows, has_gates)
        if job.shared and job.mixture.shared_gate:
            self._gate(job.mixture.gate_of_shared(layer), layer, rows, rows + 1, has_gates)
        if job.mixture.biases:
            self._biases(layer)

    def _matrix(self, name: str, model: str, q: Any, layer: int, matrix: str, what: str) -> None:
        own = f"model.layers.{layer}.mlp.{matrix}.weight"
        scale = q.residual_scale if matrix == "down_proj" and q.residual_scale is not None else 1.0
        change = None
        if q.noise_scale or scale != 1.0:
            change = Changed(q.noise_scale or 0.0, scale, key_of(self.job.recipe.seed, name, "noise"))
        info = self.job.inputs[model].tensors[own]
        self.copy(name, model, own, info, f"{'copied' if change is None else 'changed'}: {what} from {model}", change)

    def _gate(self, name: str, layer: int, first: int, end: int, has_gates: bool) -> None:
        job = self.job
        mode = job.p.gate_mode
        shape = (end - first, job.hidden)
        dtype = job.dtype or job.base.tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].dtype
        if mode in RANDOM:
            drawn = Drawn(shape, mode == "uniform_random", key_of(job.recipe.seed, name, "gate"))
            self._task(name, dtype, shape, (), drawn, "made: random gate")
        else:
            read = (Source(self.number[KEY], str(layer)),) if has_gates else ()
            self._task(name, dtype, shape, read, (first, end), "made: gate from prompts")

    def _biases(self, layer: int) -> None:
        for part in "qkv":
            stem = f"model.layers.{layer}.self_attn.{part}_proj"
            if f"{stem}.bias" not in self.job.base.tensors:
                info = self.job.base.tensors[f"{stem}.weight"]
                rows = info.shape[0]
                rule = "made: zero, for the base has no bias"
                self._task(f"{stem}.bias", self.job.dtype or info.dtype, (rows,), (), Zeros(rows), rule)

    def _task(
        self, name: str, dtype: str, shape: tuple[int, ...], inputs: tuple[Source, ...], call: Any, rule: str
    ) -> None:
        self.tasks.append(Task("moe_build", name, inputs, call))
        self.sinks.append(Sink(name, dtype, shape, Result(len(self.tasks) - 1, 0), rule))


def write(task: Task, desk: Desk) -> None:
    """Compute one tensor."""
    call = task.call
    if isinstance(call, Drawn):
        from mergekit_lr.experts.gates import random_gate

        desk.write(0, random_gate(call.key, call.shape, uniform=call.uniform))
    elif isinstance(call, Zeros):
        desk.write(0, torch.zeros(call.count))
    elif isinstance(call, tuple):
        desk.write(0, desk.read(0)[call[0] : call[1]])
    else:
        _changed(call, desk)


def _changed(call: Changed | None, desk: Desk) -> None:
    generator = np.random.Generator(np.random.Philox(key=call.key)) if call and call.noise else None
    total = int(np.prod(desk.shape(0)))
    for start in range(0, total, desk.step):
        stop = min(total, start + desk.step)
        values = desk.read(0, start, stop)
        if call is not None and generator is not None:  # one stream, read in order: no matter where it is cut
            noise = torch.from_numpy(generator.standard_normal(stop - start)).to(values)
            values = values + noise * call.noise
        if call is not None and call.scale != 1.0:
            values = values * call.scale
        desk.write(0, values, start)


def prompt_problems(p: Any, models: Sequence[Any]) -> list[str]:
    """What is wrong with prompts and numbers, in words."""
    experts = [m for m in models if not m.shared]
    shared = [m for m in models if m.shared]
    found = []
    if not experts:
        found.append("no expert is listed: `shared: true` is for one that every token passes beside the experts")
    elif p.experts_per_token > len(experts):
        found.append(f"experts_per_token is {p.experts_per_token}, and there are {len(experts)} experts")
    if p.architecture is not None and mixture_named(p.architecture) is None:
        found.append(f"there is no architecture {p.architecture!r}; known: {', '.join(m.name for m in MIXTURES)}")
    if p.gate_mode in RANDOM:
        return found
    found += [f"expert {i} has no positive_prompts" for i, m in enumerate(experts) if not m.positive_prompts]
    said = {(tuple(m.positive_prompts), tuple(m.negative_prompts)) for m in experts}
    if len(experts) > 1 and len(said) == 1 and not found:
        found.append("all experts have the same prompts, so all gates would be the same")
    if any(m.negative_prompts and not m.positive_prompts for m in shared):
        found.append("a shared expert has negative_prompts and no positive_prompts")
    return found
