r"""Masks learned on text: which bits make a recovered model predict what its expert predicts.

A mask begins as the threshold's. Every bit gets a score, the threshold's margin in units of tau,
``s = (|D| - lambda |tau - D|) / |tau|`` within -1 .. 1, and is set where the score is positive. Scores follow Adam on

    KL(expert || recovered) + label_weight * cross-entropy(recovered, text)      mean over predicted tokens, nats

with the gradient passed straight through the sign, ``d/ds = d/dW * tau``, and a rate that falls to nothing. The last
quarter of the text judges: the masks with the least loss there are kept. What is stored is what thresholds give: base,
vector and one bit an entry. Masks of a fixed network learned in this way are those of Mallya et al., "Piggyback", ECCV
2018, arXiv:1801.06519; theirs choose weights, and begin from nothing.

Windows are run two at a time on a CPU, one thread each, and gradients are added in their order, so masks do not depend
on the number of threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.bundle.grid import Open, batches_of
from mergekit_lr.bundle.masking import Parts
from mergekit_lr.bundle.masks import pack
from mergekit_lr.bundle.memory import FilePart, MemoryDesk
from mergekit_lr.checkpoint.dtypes import torch_dtype
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.open import local_path
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.evaluation import check_memory, load_for_evaluation
from mergekit_lr.lazy import torch
from mergekit_lr.localize import wanted
from mergekit_lr.method import GRID
from mergekit_lr.rewrite import Preparation

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-12  # Adam's epsilon: gradients by scores are small, being multiples of tau
BATCH, AT_ONCE = 8, 2  # windows of a step, and of one forward pass on a CPU
HELD_BACK = 4  # the last quarter of the windows judges
JUDGED = 10  # times that the masks are judged on the way


@dataclass(frozen=True)
class Course:
    """How masks are learned: ``steps`` of Adam from ``rate`` down to nothing, and what the text's own tokens count."""

    steps: int
    rate: float
    label_weight: float


@dataclass
class Scores:
    """One tensor of one task while it is learned. ``place``: its parameter in the recovered model.

    Flat tensors on the model's device: base and vector as they are stored, scores in fp32.
    """

    name: str
    place: Tensor
    base: Tensor
    vector: Tensor
    score: Tensor

    def put(self) -> None:
        """Give the model the weights of these bits, rounded as they would be recovered."""
        moved = torch.addcmul(self.base.float(), self.vector.float(), (self.score > 0).float())
        self.place.detach().copy_(moved.to(self.base.dtype).view(self.place.shape))

    def pull(self, gradient: Tensor | None) -> None:
        """The score's gradient from the weight's; none where the weight plays no part."""
        self.score.grad = None if gradient is None else gradient.reshape(-1) * self.vector.float()


def learn(work: Preparation, tensors: Sequence[Open], tasks: Sequence[str], course: Course) -> None:
    """For each of ``tasks`` its masks, packed, into a file of its own; a task whose file is there is not done again.

    Raises:
        RecipeError: there is no text, or less than four windows of it for a task.
        CheckpointError: the base does not load, or a masked tensor is no parameter of it.
        ResourceError: weights, scores and gradients exceed the budget.
    """
    left = [(i, t) for i, t in enumerate(tasks) if not _file(work.folder, i).exists()]
    if not left:
        return
    if work.recipe.calibration is None or not work.recipe.calibration.text:
        raise RecipeError(
            "masks: learned needs text files", where="calibration", fix="add `calibration: {text: [FILE]}`"
        )
    assert work.recipe.base_model is not None
    gradients = 1 + (min(work.threads, BATCH // AT_ONCE) if work.device == "cpu" else 1)
    copies = 2 + 2 + 3 + gradients  # the two models; base and tau; scores and their moments
    check_memory([x for t in tensors for x in t.checkpoints], copies, work.limit, "learning masks")
    folder = local_path(work.recipe.base_model.model)
    (recovered, tokenizer), (expert, _) = (load_for_evaluation(folder, work.device) for _ in range(2))
    for number, task in left:
        windows = torch.cat(batches_of(work.recipe, task, tokenizer))
        if len(windows) < HELD_BACK:
            raise RecipeError(
                f"{len(windows)} windows of text are too few for task {task!r}",
                where="calibration",
                fix=f"give at least {HELD_BACK} windows of {work.recipe.calibration.sequence_length} tokens",
            )
        learning = Learning(recovered, expert, list(_scores(recovered, expert, tensors, task)), course)
        best, losses = learning.run(windows, work, (number, len(tasks)))
        for tensor in tensors:  # stored beside the weight that it is tied to, and not what the model runs with
            if task in tensor.tasks and tensor.packing.name not in best:
                score = _begin(tensor, tensor.tasks.index(task))[2]
                best[tensor.packing.name] = pack(score > 0)
        write_safetensors(_file(work.folder, number), best, {"losses": json.dumps(losses)})


def learned_masks(prepared: Path | None, tasks: Sequence[str]) -> dict[str, Checkpoint]:
    """What `learn` made: task -> opened file of masks, each called like its tensor; nothing before."""
    if prepared is None or not all(_file(prepared, i).exists() for i in range(len(tasks))):
        return {}
    return {t: open_file(_file(prepared, i), f"masks of {t}") for i, t in enumerate(tasks)}


def _file(folder: Path, number: int) -> Path:
    return folder / f"learned-{number:05d}.safetensors"


@dataclass
class Learning:
    """One task's masks, the model that has them in place, and the expert that it should be like."""

    recovered: Any
    expert: Any
    tensors: list[Scores]
    course: Course

    def run(self, windows: Tensor, work: Preparation, place: tuple[int, int]) -> tuple[dict[str, Tensor], list[float]]:
        """The best masks, packed, and the loss on what judges, each time from the start on."""
        steps, rate = self.course.steps, self.course.rate
        cut = len(windows) - len(windows) // HELD_BACK
        drawn = self._batches(windows[:cut], torch.Generator().manual_seed(work.recipe.seed))
        adam = torch.optim.Adam([x.score for x in self.tensors], lr=rate, eps=TINY)
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        best: dict[str, Tensor] = {}
        losses: list[float] = []
        with ThreadPoolExecutor(work.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for step in range(steps + 1):
                self._put()
                if step % -(-steps // JUDGED) == 0 or step == steps:
                    losses.append(self.loss(windows[cut:], pool))
                    if losses[-1] <= min(losses):
                        best = {x.name: pack(x.score > 0) for x in self.tensors}
                if step < steps:
                    for x, gradient in zip(self.tensors, self.gradients(next(drawn), pool), strict=True):
                        x.pull(gradient)
                    adam.step()
                    falling.step()
                    done = place[0] * steps + step + 1
                    work.tell(done, place[1] * steps, f"learning masks, loss {losses[-1]:.4f}")
        return best, losses

    def _put(self) -> None:
        with torch.no_grad():
            for x in self.tensors:
                x.score.clamp_(-1, 1)
                x.put()

    def _batches(self, windows: Tensor, draw: torch.Generator) -> Iterator[Tensor]:
        """Eight windows at a time (all, where there are less), each as often as any other."""
        order: list[int] = []
        while True:
            if len(order) < min(BATCH, len(windows)):
                order += torch.randperm(len(windows), generator=draw).tolist()
            yield windows[order[:BATCH]]
            order = order[BATCH:]

    def loss(self, windows: Tensor, pool: ThreadPoolExecutor) -> float:
        """Mean over predicted tokens."""

        def one(part: Tensor) -> float:
            with torch.no_grad():  # a thread's own setting
                return float(self._sum(part))

        return math.fsum(pool.map(one, self._parts(windows))) / windows[:, 1:].numel()

    def gradients(self, windows: Tensor, pool: ThreadPoolExecutor) -> list[Tensor | None]:
        """Of the mean loss by each tensor, added up part by part in their order; None where it plays no part."""
        places = [x.place for x in self.tensors]
        tokens = windows[:, 1:].numel()

        def one(part: Tensor) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(self._sum(part) / tokens, places, allow_unused=True)

        total: list[Tensor | None] = [None] * len(places)
        for found in pool.map(one, self._parts(windows)):
            total = [g if t is None else t if g is None else t.add_(g) for t, g in zip(total, found, strict=True)]
        return total

    def _parts(self, windows: Tensor) -> tuple[Tensor, ...]:
        device = self.recovered.device
        return torch.split(windows.to(device), AT_ONCE if device.type == "cpu" else BATCH)

    def _sum(self, windows: Tensor) -> Tensor:
        """The loss over all predicted tokens, added up."""
        said, meant = (
            network(input_ids=windows[:, :-1], use_cache=False).logits.float().flatten(0, 1)
            for network in (self.recovered, self.expert)
        )
        said = said.log_softmax(-1)
        meant = meant.detach().log_softmax(-1)
        total = torch.nn.functional.kl_div(said, meant, log_target=True, reduction="sum")
        if self.course.label_weight:
            own = torch.nn.functional.nll_loss(said, windows[:, 1:].flatten(), reduction="sum")
            total = total + self.course.label_weight * own
        return total


def _scores(recovered: Any, expert: Any, tensors: Sequence[Open], task: str) -> Iterator[Scores]:
    """The task's tensors with the scores of their thresholds; its weights are put into ``expert``."""
    recovered.requires_grad_(True)
    expert.requires_grad_(False)
    places, theirs = dict(recovered.named_parameters()), dict(expert.named_parameters())
    own = {t.packing.name: t for t in tensors if task in t.tasks}
    unlike = [n for n, p in places.items() if n not in own or own[n].packing.shape != tuple(p.shape)]
    if unlike:
        raise CheckpointError(
            f"the masks of task {task!r} cannot be learned",
            where=str(tensors[0].checkpoints[0].reference) if tensors else task,
            why=f"the base needs {unlike[0]!r} to run, and the task does not have it by that name in the base's shape",
            fix="use masks: threshold",
        )
    for name, place in places.items():  # a tied weight once, by the name that transformers has it under
        base, vector, score, whole = (x.to(place.device) for x in _begin(own[name], own[name].tasks.index(task)))
        theirs[name].detach().copy_(whole.view(place.shape))
        yield Scores(name, place, base, vector, score)


def _begin(tensor: Open, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Base and vector as they are stored, the scores that stand for the threshold's mask, and the task's weights."""
    job = tensor.packing
    desk = MemoryDesk([FilePart(c, job.name) for c in tensor.checkpoints], torch.empty(0), job.out)
    parts = Parts(job, desk)
    lam = parts.fitted()[index]
    base, vector = (torch.empty(job.numel, dtype=torch_dtype(job.out)) for _ in range(2))
    score, own = torch.empty(job.numel), torch.empty(job.numel)
    for start, raw in parts.blocks():
        for s in range(0, raw[0].numel(), GRID):
            e = min(raw[0].numel(), s + GRID)
            part = parts.part(raw, start, s, e)
            here = slice(start + s, start + e)
            base[here], vector[here], own[here] = raw[0][s:e], part.narrow, raw[1 + index][s:e]
            d, tau = part.deltas[index], part.vector
            margin = (d.abs() - lam * (tau - d).abs()) / tau.abs().clamp_min(1e-30)
            # A bit is the threshold's to begin with, also where the margin is lost in rounding.
            least = torch.where(wanted(d, tau, lam), 1e-6, -1.0)
            most = torch.where(wanted(d, tau, lam), 1.0, 0.0)
            score[here] = margin.clamp(least, most)
    return base, vector, score, own


def losses_of(masks: Checkpoint) -> list[float]:
    """What a task's masks were judged by: the loss of the threshold's first, of the last step's last."""
    found: list[float] = json.loads(read_header(next(iter(masks.files.values()))).metadata["losses"])
    return found
