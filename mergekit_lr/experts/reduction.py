"""Methods that make the experts of a mixture fewer: what they share.

A method says which `Parts` it is made of. Preparing collects statistics (or reads those that the recipe names) and
writes the decision; the outline lays the output out in the model's own names; tasks compute it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mergekit_lr.arch.layers import positions
from mergekit_lr.arch.moe import moe_layers
from mergekit_lr.arch.moe_config import groups_of, shrunk_config, top_k
from mergekit_lr.checkpoint.dtypes import RECIPE_DTYPES
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.experts import sidecar
from mergekit_lr.experts.deciding import Parts, Router, decide
from mergekit_lr.experts.decision import Decision, LayerDecision, read_decision, write_decision
from mergekit_lr.experts.layout import Composition, Spec, even_decisions
from mergekit_lr.experts.tasks import compute
from mergekit_lr.method import Base, Parameters, parameter
from mergekit_lr.rewrite import Desk, Outline, Preparation, Rewrite, model_order

if TYPE_CHECKING:
    from mergekit_lr.checkpoint.model import Checkpoint
    from mergekit_lr.graph.nodes import Task
    from mergekit_lr.recipe.schema import Recipe


class ReductionParameters(Parameters):
    """What every method that makes experts fewer is told."""

    num_experts: int = parameter(ge=1, description="experts that each layer keeps")
    experts_per_token: int | None = parameter(
        None, ge=1, description="experts that a token is sent to afterwards; absent: as before, if that many are left"
    )
    seed: int | None = parameter(
        None, ge=0, description="decides windows of text, restarts and ties; absent: the recipe's seed"
    )
    similarity_tokens: int = parameter(
        4096, ge=1, description="calibration tokens on which all experts are run to compare their outputs"
    )


class MergingParameters(ReductionParameters):
    """What every method that merges experts is told beside that."""

    router: Router = parameter(
        "mean",
        description="the router's new rows: `mean`, the weighted mean of the members' rows; `select`, the row of the "
        "group's centre; `tied`, all rows kept and members' gates added up, which needs `sidecar: true`",
    )
    sidecar: bool = parameter(
        False, description="allow an output that needs a model class of its own, written beside the weights"
    )
    requantize: bool = parameter(
        False, description="write merged experts of an FP8 model as FP8 again; otherwise the whole model is decoded"
    )


def libraries(parts: Parts) -> int:
    """Bytes that deciding leaves in memory by what it imports: measured with scipy 1.x, scikit-learn and matplotlib.

    Pruning takes none. Trees are scipy's, K-means is scikit-learn's, a picture of the groups matplotlib's; matching
    neurons and subspaces take more of scipy.
    """
    if parts.prunes:
        return 0
    grouping = 64 << 20 if parts.grouping == "kmeans" else 20 << 20
    picture = 40 << 20 if find_spec("matplotlib") else 0
    return grouping + picture + (0 if parts.merge == "mean" else 16 << 20)


def rank_problems(rank: str | int | float) -> list[str]:
    """What is wrong with a rank, in words."""
    if rank == "full" or (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank <= 1):
        return []
    return [f"rank {rank} is neither full, a whole number from 1, nor a share between 0.0 and 1.0"]


class ExpertReduction(Rewrite):
    """Base of all methods that make experts fewer. Subclasses give `parts` and, where they fit, parameters."""

    base = Base.UNUSED
    max_models = 1
    stochastic = True
    prepares = True
    settings: ClassVar[frozenset[str]] = frozenset({"calibration"})
    required_settings: ClassVar[frozenset[str]] = frozenset({"calibration"})

    class Merge(ReductionParameters):
        """Parameters of the whole reduction."""

    @abstractmethod
    def parts(self, p: Any) -> Parts:
        """What the method is made of, under its parameters."""

    def prepare(self, work: Preparation) -> None:
        job = Job(self, work.recipe, work.inputs)
        if read_decision(work.folder) is None:
            write_decision(work.folder, self._decide(work, job))
        if job.parts.merge == "least_squares":
            from mergekit_lr.experts.fitting import fit_all

            decision = read_decision(work.folder)
            assert decision is not None
            made = {d.block: d for d in decision.layers}
            fit_all(work, job.checkpoint, made, ridge=job.parts.ridge, seed=job.seed)

    def _decide(self, work: Preparation, job: Job) -> Decision:
        from mergekit_lr.experts.evidence import evidence_of, statistics_for
        from mergekit_lr.experts.pictures import write_pictures

        grams = ("input", "hidden") if job.parts.whiten else ()
        with statistics_for(
            work, job.checkpoint, grams=grams, similarity_tokens=job.p.similarity_tokens, seed=job.seed
        ) as statistics:
            entries, needed = job.parts.entries(), [f"{g}_gram" for g in grams]
            evidence = evidence_of(job.layers, statistics, entries, job.checkpoint, needed)
            decision = decide(
                job.parts,
                evidence,
                job.p.num_experts,
                seed=job.seed,
                groups=groups_of(job.checkpoint.config or {}, job.layers[0].family),
                least=job.least,
            )
            write_pictures(work.folder, statistics, decision, job.parts)
        return decision

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        job = Job(self, recipe, inputs)
        decision = None if prepared is None else read_decision(prepared)
        return job.outline(decision, prepared)

    def compute(self, task: Task, desk: Desk) -> None:
        compute(task.call, task.key, desk)


class Job:
    """One recipe against one model: parameters checked, layers found, the output laid out."""

    def __init__(self, method: ExpertReduction, recipe: Recipe, inputs: Mapping[str, Checkpoint]) -> None:
        [self.name] = model_order(recipe)
        self.method, self.recipe, self.checkpoint = method, recipe, inputs[self.name]
        self.layers = moe_layers(self.checkpoint)
        self.p = self._parameters()
        self.parts = method.parts(self.p)
        self.seed: int = recipe.seed if self.p.seed is None else self.p.seed
        self.config = self.checkpoint.config or {}
        self.k = top_k(self.config)
        self._check()

    @property
    def least(self) -> int:
        """Experts that a layer needs for its top k."""
        return int(self.p.experts_per_token or self.k or 1)

    def _parameters(self) -> Any:
        """The parameters, which must be the same for every layer."""
        at = positions(self.checkpoint.tensors)
        found = [self.recipe.resolve(layer.router[0].name, at[layer.router[0].name])[0] for layer in self.layers]
        if any(p != found[0] for p in found):
            raise RecipeError(
                "parameters differ between layers",
                where=str(self.recipe.origin or "recipe"),
                why=f"{self.recipe.merge_method} decides about all layers together",
                fix="give each parameter one value",
            )
        return found[0]

    def _check(self) -> None:
        first, p, ref = self.layers[0], self.p, self.checkpoint.reference
        count = p.num_experts
        if count >= first.experts:
            raise CheckpointError(
                f"num_experts {count} is not fewer than now",
                where=ref,
                why=f"its layers have {first.experts} experts",
                fix=f"give a number below {first.experts}",
            )
        if self.k is not None and p.experts_per_token is None and count < self.k:
            raise CheckpointError(
                f"num_experts {count} is below the number of experts that a token is sent to",
                where=ref,
                why=f"its config.json sends each token to {self.k}",
                fix=f"keep at least {self.k}, or say so: experts_per_token: {count}",
            )
        if p.experts_per_token is not None and p.experts_per_token > count:
            raise CheckpointError(
                f"experts_per_token {p.experts_per_token} is more than num_experts {count}",
                where=ref,
                fix=f"give at most {count}",
            )
        shrunk_config(self.config, first, experts=count, experts_per_token=p.experts_per_token, reference=ref)
        self._check_quantised()
        if first.family.gate_on_input and (self.parts.merge == "least_squares" or self.parts.whiten):
            raise CheckpointError(
                "its experts cannot be fitted or whitened one by one",
                where=ref,
                why=f"in {first.family.name} the router's gate multiplies an expert's input",
                fix="use a merge without least squares and whitening, such as m_smoe",
            )
        if self.needs_sidecar and not p.sidecar:
            why = "a tied router" if self.parts.router == "tied" else "layers with different numbers of experts"
            raise CheckpointError(
                f"{why} cannot be loaded by stock transformers or vLLM",
                where=ref,
                why="config.json holds one number of experts, for router and experts of all layers alike",
                fix="set sidecar: true for an output with its own model class, or use another router or allocation",
            )
        if self.needs_sidecar:
            sidecar.tied_config(self.config, {}, ref)

    @property
    def needs_sidecar(self) -> bool:
        return self.parts.router == "tied" or self.parts.neighbours > 1

    def _check_quantised(self) -> None:
        section = self.config.get("quantization_config")
        if not section:
            return
        method = str(section.get("quant_method")) if isinstance(section, dict) else "unknown"
        kinds = {layer.quantised for layer in self.layers}
        block = section.get("weight_block_size") if isinstance(section, dict) else None
        known = (kinds == {"fp8"} and method == "fp8" and block in (None, [128, 128])) or kinds == {"mxfp4"}
        if not known:
            raise CheckpointError(
                f"the checkpoint is quantised ({method}) in a way that experts cannot be taken from",
                where=self.checkpoint.reference,
                why="FP8 with scales of 128 x 128 blocks, and MXFP4, are understood",
                fix="use the unquantised weights, or dequantise it first",
            )
        if getattr(self.p, "requantize", False) and kinds == {"mxfp4"}:
            raise CheckpointError(
                "merged experts are not written as MXFP4",
                where=self.checkpoint.reference,
                fix="remove requantize: the merged experts are then written as bfloat16; or prune, which keeps MXFP4",
            )

    def outline(self, decision: Decision | None, prepared: Path | None) -> Outline:
        decided = {d.block: d for d in self._every(decision)}
        extra, models = self._extra(prepared)
        spec = Spec(
            method=self.recipe.merge_method,
            merge=self.parts.merge,
            router=self.parts.router,
            rank=self.parts.rank,
            dtype=RECIPE_DTYPES[self.recipe.output_dtype] if self.recipe.output_dtype else None,
            requantise=bool(getattr(self.p, "requantize", False)),
            whiten=self.parts.whiten and decision is not None,
        )
        numbered = {name: (models.index(name), opened) for name, opened in extra.items()}
        found = Composition(
            self.checkpoint, spec, decided, self.layers, numbered.get("fitted"), numbered.get("statistics")
        )
        found.run()
        config, notices = self._config(found, decided)
        files = dict(sidecar.sidecar_files(config["expert_map"])) if self.needs_sidecar else {}
        undecided = ("which experts are kept or merged is decided from calibration text, when the merge runs",)
        from mergekit_lr.experts.report import card, details, picture_files

        return Outline(
            models=tuple(models),
            sinks=tuple(found.sinks),
            tasks=tuple(found.tasks),
            dropped=tuple(found.dropped),
            config=config,
            files={**files, **picture_files(prepared)},
            extra=extra,
            warnings=(*notices, *(decision.remarks if decision else undecided)),
            details=details(self.parts, self.layers, decided, prepared) if decision else {},
            card=card(self.parts, self.layers, decided, prepared) if decision else "",
            libraries=libraries(self.parts),
        )

    def _every(self, decision: Decision | None) -> Sequence[LayerDecision]:
        """A decision for every layer; those that transformers does not run follow the last one that it does."""
        if decision is None:
            return even_decisions(self.layers, self.p.num_experts, self.parts.router, prunes=self.parts.prunes)
        last = decision.layers[-1]
        made = {d.block: d for d in decision.layers}
        return [
            made.get(layer.block) or LayerDecision(layer.block, last.partition, last.shares, last.router)
            for layer in self.layers
        ]

    def _extra(self, prepared: Path | None) -> tuple[dict[str, Checkpoint], list[str]]:
        """Opened files beside the model: fitted matrices, and statistics where tasks read Grams."""
        from mergekit_lr.checkpoint.model import open_file, open_folder
        from mergekit_lr.experts.evidence import STATISTICS
        from mergekit_lr.experts.fitting import FOLDER

        extra: dict[str, Checkpoint] = {}
        if prepared is not None and self.parts.merge == "least_squares":
            extra["fitted"] = open_folder(prepared / FOLDER, "fitted")
        if prepared is not None and self.parts.whiten:
            named = self.recipe.calibration.statistics if self.recipe.calibration else None
            extra["statistics"] = open_file(Path(named) if named else prepared / STATISTICS, "statistics")
        return extra, [self.name, *extra]

    def _config(self, found: Composition, decided: Mapping[str, LayerDecision]) -> tuple[dict[str, Any], list[str]]:
        """config.json of the output, and what changed in it beyond the expert count."""
        notices = []
        if self.needs_sidecar:
            mapping = sidecar.expert_map(self.layers, decided)
            config = sidecar.tied_config(self.config, mapping, self.checkpoint.reference)
            notices.append("the output needs its own model class: load it with trust_remote_code=True")
        else:
            shrunk = shrunk_config(
                self.config,
                self.layers[0],
                experts=self.p.num_experts,
                experts_per_token=self.p.experts_per_token,
                reference=self.checkpoint.reference,
            )
            config, notices = shrunk.config, list(shrunk.notices)
        if found.unquantised:
            config = {k: v for k, v in config.items() if k != "quantization_config"}
            notices.append("the output is not quantised: quantization_config is gone from config.json")
        if self.recipe.output_dtype:
            keys = [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]
            config = {**config, **dict.fromkeys(keys, self.recipe.output_dtype)}
        extra = [layer.prefix for layer in self.layers if layer.extra]
        if extra:
            notices.append(f"{', '.join(extra)}: reduced as the last layer is, for calibration does not run it")
        return config, notices
