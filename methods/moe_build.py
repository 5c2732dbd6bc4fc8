"""A mixture of experts whose experts are the MLPs of dense models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError
from mergekit_lr.experts.building import GATES, Building, prompt_problems, write
from mergekit_lr.experts.mixtures import RANDOM, GateMode
from mergekit_lr.graph.nodes import Task
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe.schema import Recipe
from mergekit_lr.rewrite import Desk, Outline, Preparation, Rewrite


class MoeBuild(Rewrite):
    r"""Dense models as the experts of one mixture: each gives its MLPs, the base everything else.

    The router's row of expert e in layer l is ``v / |v|``, v the hidden state that enters layer l of the base at the
    last token of e's positive prompts (``hidden_avg``: its mean over their tokens; ``cheap_embed``: the sum of their
    embeddings), averaged over the prompts, less the same for its negative ones; or random. An expert's matrices
    ``[out, in]`` are copied to the bit, or ``(W + noise_scale * normal) * residual_scale``, the factor on
    ``down_proj`` alone; fp32, one cast.

    Source: Komatsuzaki et al., "Sparse upcycling: Training mixture-of-experts from dense checkpoints", ICLR 2023,
    arXiv:2212.05055 (experts from dense MLPs); gates from prompts as in mergekit-moe 0.1.5.
    """

    name = "moe_build"
    summary = "dense models as the experts of a mixture, gates from prompts or random"
    source = Source("Sparse upcycling", arxiv="2212.05055")
    base = Base.FRAME
    commutes = False
    stochastic = True
    prepares = True

    class Merge(Parameters):
        gate_mode: GateMode = parameter("hidden", description="what the router's rows are made of")
        experts_per_token: int = parameter(2, ge=1, description="experts that a token is sent to")
        architecture: str | None = parameter(
            None, description="mixtral, deepseek, qwen2_moe or qwen3_moe; absent: the first that fits the models"
        )

    class PerModel(Parameters):
        positive_prompts: list[str] = parameter([], description="text that the expert is for")
        negative_prompts: list[str] = parameter([], description="text that it is not for")
        noise_scale: float | None = parameter(
            None, ge=0, allow_inf_nan=False, description="standard deviation of normal noise on the expert's matrices"
        )
        residual_scale: float | None = parameter(
            None, allow_inf_nan=False, description="factor on the expert's down projection"
        )
        shared: bool = parameter(False, description="every token passes it, beside the experts it is sent to")

    def problems(self, merge: Any, models: tuple[Any, ...]) -> list[str]:
        return prompt_problems(merge, models)

    def prepare(self, work: Preparation) -> None:
        job = Building(work.recipe, work.inputs)
        mode = job.p.gate_mode
        if mode in RANDOM or (work.folder / GATES).exists():
            return
        prompts = job.prompts()
        if not all(positive for positive, _ in prompts):
            raise CheckpointError(
                f"a shared expert of {job.mixture.name} has a gate of its own",
                where=job.base.reference,
                fix="give the shared expert positive_prompts, or use `gate_mode: random`",
            )
        from mergekit_lr.experts.gates import gates_from_prompts

        gates = gates_from_prompts(work, job.base, prompts, mode)
        write_safetensors(work.folder / GATES, {str(layer): g.contiguous() for layer, g in gates.items()})

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        return Building(recipe, inputs).outline(prepared)

    def compute(self, task: Task, desk: Desk) -> None:
        write(task, desk)
