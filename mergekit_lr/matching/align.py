"""Aligning the models of a recipe: before its output is laid out, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.matching.activations import Cost, record, widened, with_activations
from mergekit_lr.matching.ascent import Matching, Tell, match_weights
from mergekit_lr.matching.diagnose import agreements, mean_agreement
from mergekit_lr.matching.inputs import Reader, Table, specs_of
from mergekit_lr.matching.learned import Learned, learn
from mergekit_lr.matching.many import match_many
from mergekit_lr.matching.member import Member, Read, apply, identity
from mergekit_lr.matching.running import Samples, check_labels, loaded
from mergekit_lr.matching.saved import load_members
from mergekit_lr.matching.soft import Plans, soft_apply, soft_match
from mergekit_lr.matching.vocabulary import ROWS, row_map

DIAGNOSED = 1024
"""Order up to which matrices are diagnosed during a merge; `mergekit-lr barrier` has no such limit."""
LOW = 0.5
"""Mean weighted agreement after matching below which a barrier is to be expected."""
How = Literal["permutation", "learned", "transport"]


@dataclass(frozen=True)
class Wanted:
    """How to align. ``samples`` gives what a model is run on, for activations and for what is learned."""

    matching: How = "permutation"
    seed: int = 0
    restarts: int = 3
    only: tuple[str, ...] = ()
    to_first: bool = False
    cost: Cost = "weights"
    activation: str = "relu"
    regularization: float = 0.0
    steps: int = 200
    rate: float = 0.01
    keep: int = 0
    threads: int = 1
    tell: Tell | None = None
    samples: Callable[[Checkpoint], Samples] | None = None

    def sampled(self, model: Checkpoint) -> Samples:
        assert self.samples is not None
        return self.samples(model)


@dataclass(frozen=True)
class Aligned:
    """Of each model, the first included: its spec, its member, and plans where it is mixed too."""

    specs: tuple[SymmetrySpec, ...]
    members: tuple[Member, ...]
    plans: tuple[Plans, ...]
    reads: tuple[Reader, ...]
    report: Mapping[str, Any]

    def read(self, i: int) -> Read:
        """Tensors of model i, aligned; token rows that it lacks are those of the first model."""
        rows = self.reads[i].rows

        def of(name: str) -> Tensor:
            found = apply(self.specs[i], self.members[i], self.reads[i], name)
            if self.plans[i]:
                found = soft_apply(self.specs[0], self.plans[i], name, found)
            if rows is not None and name in ROWS:
                absent = (rows < 0).reshape(-1, *[1] * (found.ndim - 1))
                found = torch.where(absent, self.reads[0](name).to(found.dtype), found)
            return found

        return of


def align(models: Sequence[Checkpoint], permutations: str | None, wanted: Wanted) -> Aligned:
    """Align every model to the first, or all to each other where three or more are matched by their weights.

    Raises:
        CheckpointError: the models do not fit each other or the spec.
        LinalgError: weights are not finite.
    """
    specs = specs_of(permutations, models, widths=wanted.matching != "transport")
    rows = [None, *(row_map(models[0], m) for m in models[1:])]
    reads = tuple(Reader(m, wanted.keep // len(models), r) for m, r in zip(models, rows, strict=True))
    plans: list[Plans] = [{} for _ in models]
    found: dict[int, Matching] = {}
    learned: dict[int, Learned] = {}
    if permutations and permutations.endswith(".safetensors"):
        members, loaded_plans = load_members(Path(permutations), specs, mixed=wanted.matching == "transport")
        plans = list(loaded_plans)
    elif len(models) == 2 or wanted.to_first or wanted.cost != "weights" or wanted.matching != "permutation":
        found = _each_to_first(specs, models, reads, rows, wanted)
        members = [found[i].member if i in found else identity(s) for i, s in enumerate(specs)]
        if wanted.matching == "learned":
            learned = _learned(specs[0], models, reads, members, wanted)
            members = [learned[i].member if i in learned else m for i, m in enumerate(members)]
    else:
        more = {"seed": wanted.seed, "only": wanted.only, "threads": wanted.threads, "tell": wanted.tell}
        members = list(match_many(specs[0], reads, **more).members)  # type: ignore[arg-type]
    if wanted.matching == "transport" and not any(plans):
        plans = [{}, *(_plans(specs, models, reads, members, i, wanted) for i in range(1, len(models)))]
    aligned = Aligned(specs, tuple(members), tuple(plans), reads, {})
    return Aligned(specs, tuple(members), tuple(plans), reads, _report(models, aligned, found, learned))


def _each_to_first(
    specs: Sequence[SymmetrySpec], models: Sequence[Checkpoint], reads: Sequence[Reader],
    rows: Sequence[Tensor | None], wanted: Wanted,
) -> dict[int, Matching]:  # fmt: skip
    """Matchings of the models that are as wide as the first."""
    seen: dict[int, Mapping[str, Tensor]] = {}
    same = [i for i, s in enumerate(specs) if i and s.groups == specs[0].groups]
    if wanted.cost != "weights":
        for i in (0, *same):
            if rows[i] is not None:
                raise CheckpointError(
                    "its activations cannot be compared with those of the first model",
                    where=models[i].reference,
                    why="their tokenizers differ, so that no token of a text is the same",
                    fix="match by weights",
                )
            network = loaded(models[i], Table(list(models[i].tensors), reads[i]), wanted.activation)
            seen[i] = record(network, specs[0], wanted.sampled(models[i]).batches)
    found = {}
    for i in same:
        used: tuple[SymmetrySpec, Read, Read] = (specs[0], reads[0], reads[i])
        if seen:
            used = with_activations(specs[0], (reads[0], reads[i]), (seen[0], seen[i]), wanted.cost)
        m = match_weights(
            *used, seed=wanted.seed, restarts=wanted.restarts, only=wanted.only, threads=wanted.threads,
            tell=wanted.tell,
        )  # fmt: skip
        found[i] = Matching(widened(specs[0], m.member), *list(vars(m).values())[1:])
    return found


def _learned(
    spec: SymmetrySpec, models: Sequence[Checkpoint], reads: Sequence[Reader], members: Sequence[Member], wanted: Wanted
) -> dict[int, Learned]:
    first = Table(list(models[0].tensors), reads[0])
    network = loaded(models[0], first, wanted.activation)
    samples = check_labels(network, wanted.sampled(models[0]), models[0].reference)
    a = dict(first)
    return {
        i: learn(
            spec, network, a, dict(Table(first.names, reads[i])), samples, members[i], steps=wanted.steps,
            rate=wanted.rate, seed=wanted.seed, only=wanted.only, tell=wanted.tell,
        )
        for i in range(1, len(models))
    }  # fmt: skip


def _plans(
    specs: Sequence[SymmetrySpec], models: Sequence[Checkpoint], reads: Sequence[Read], members: Sequence[Member],
    i: int, wanted: Wanted,
) -> Plans:  # fmt: skip
    names = list(models[0].tensors)
    moved = Table(names, lambda name: apply(specs[i], members[i], reads[i], name))
    return soft_match(
        specs[0], specs[i], Table(names, reads[0]), moved, regularization=wanted.regularization,
        threads=wanted.threads, only=wanted.only,
    )  # fmt: skip


def _report(
    models: Sequence[Checkpoint], aligned: Aligned, found: Mapping[int, Matching], learned: Mapping[int, Learned]
) -> dict[str, Any]:
    spec = aligned.specs[0]
    matrices = [
        n
        for n, t in models[0].tensors.items()
        if len(t.shape) > 1 and spec.of_tensor[n][0].groups() and _small(t.shape)
    ]
    rows = []
    for i in range(1, len(models)):
        same = aligned.specs[i].groups == spec.groups
        before = agreements(matrices, aligned.reads[0], aligned.reads[i]) if same else []
        after = agreements(matrices, aligned.reads[0], aligned.read(i))
        row: dict[str, Any] = {
            "model": models[i].reference,
            "moved": aligned.members[i].moved(),
            "agreement_before": mean_agreement(before).get("weighted"),
            "agreement_after": mean_agreement(after).get("weighted"),
        }
        if aligned.plans[i]:
            row["mixed"] = {g: list(p.shape) for g, p in aligned.plans[i].items()}
        if i in found:
            m = found[i]
            row |= {
                "objective_before": m.start,
                "objective_after": m.objective,
                "objective_at_most": m.norms[0] * m.norms[1],
                "sweeps": m.sweeps,
                "restart": m.restart,
            }
        if i in learned:
            best = learned[i]
            row |= {"loss_matched": best.start, "loss_learned": best.loss, "step": best.step, "tried": best.tried}
        rows.append(row)
    return {"family": spec.family, "groups": len(spec.groups), "aligned_to": models[0].reference, "models": rows}


def _small(shape: tuple[int, ...]) -> bool:
    rest = 1
    for d in shape[1:]:
        rest *= d
    return min(shape[0], rest) <= DIAGNOSED


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What a user should know of an alignment."""
    found = []
    for row in report["models"]:
        if not row["moved"] and "mixed" not in row:
            found.append(
                f"{row['model']} is aligned with {report['aligned_to']} as it is: nothing was permuted. Fine-tunes of "
                "one base are; for those, methods such as ties or task_arithmetic do better than weight_matching"
            )
        elif row["agreement_after"] is not None and row["agreement_after"] < LOW:
            found.append(
                f"{row['model']} agrees little with {report['aligned_to']} even after matching (mean weighted "
                f"agreement {row['agreement_after']:.2f}): expect a loss barrier; `mergekit-lr barrier` measures it"
            )
    return found
