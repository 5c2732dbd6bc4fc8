"""One training loop for every language model of the zoo: seeded by step, resumable to the bit.

The batch of step ``s`` is drawn from a Philox generator keyed by ``(seed, s)``: nothing of the data order
lives in a state that an interruption could lose.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zoo.text import Tokens

WINDOW = 256
THREADS = 1  # a model this small gains little from a second thread, and two runs fit on two cores
CHECKPOINT_EVERY = 100


@dataclass(frozen=True)
class Run:
    """What one training run is. ``mixture`` gives each domain's share of the rows of a batch."""

    name: str
    mixture: Mapping[str, float]
    steps: int
    peak_rate: float
    seed: int
    batch: int = 16
    warmup: int = 40
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    muon_rate: float = 0.0  # above 0: Muon for the layers' matrices, AdamW for embeddings and vectors

    def scale(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to ``final_fraction``, as a factor of the peak rates."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = self.final_fraction
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def draw_batch(run: Run, data: Mapping[str, Tokens], step: int) -> tuple[Tensor, Tensor]:
    """Token ids ``(batch, 256)`` of step ``step``, and each row's domain ``(batch,)``, both int64.

    Rows are windows at uniform offsets of domains drawn by share; a domain's number is its place among the
    mixture's names in alphabetical order.
    """
    random = np.random.Generator(np.random.Philox(key=[run.seed, step]))
    domains = sorted(run.mixture)
    shares = np.array([run.mixture[d] for d in domains])
    rows = []
    choices = random.choice(len(domains), size=run.batch, p=shares / shares.sum())
    for choice in choices:
        tokens = data[domains[choice]]
        start = int(random.integers(0, len(tokens) - WINDOW + 1))
        rows.append(tokens[start : start + WINDOW].astype(np.int64))
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(choices.astype(np.int64))


@dataclass
class Trained:
    """What a run leaves. ``names`` are the weights of the (first) AdamW in the order of its state."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    names: list[str]
    history: list[float]


# Rows of these stand for tokens or experts one by one, so their updates should not be orthogonalised together.
_NOT_BY_MUON = re.compile(r"embed|lm_head|\.gate\.")


def _set_up(model: nn.Module, run: Run) -> Trained:
    """Optimizers for ``run``: matrices with weight decay first, vectors without it second.

    That is the Hugging Face Trainer's order, so a saved state numbers weights as the Trainer would.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    by_muon = [(n, p) for n, p in named if run.muon_rate and p.ndim == 2 and not _NOT_BY_MUON.search(n)]
    others = [(n, p) for n, p in named if not any(p is q for _, q in by_muon)]
    decayed = [(n, p) for n, p in others if p.ndim > 1]
    plain = [(n, p) for n, p in others if p.ndim <= 1]
    groups = [{"params": [p for _, p in decayed], "weight_decay": run.weight_decay},
              {"params": [p for _, p in plain], "weight_decay": 0.0}]  # fmt: skip
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=run.peak_rate, betas=run.betas)]
    if by_muon:
        optimizers.append(
            torch.optim.Muon(
                [p for _, p in by_muon], lr=run.muon_rate, weight_decay=run.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )  # fmt: skip
    return Trained(model, optimizers, [n for n, _ in (*decayed, *plain)], [])


LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor]


def language_loss(model: nn.Module, ids: Tensor, domains: Tensor) -> Tensor:
    """Mean cross-entropy of the next token in nats; the rows' domains do not matter to it."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def fit(
    model: nn.Module,
    run: Run,
    data: Mapping[str, Tokens],
    checkpoint: Path | None = None,
    *,
    loss: LossFunction = language_loss,
    stop_after: int | None = None,
    report: Callable[[str], None] = print,
) -> Trained:
    """Train ``model`` in place; continue from ``checkpoint`` if it holds this very run.

    Weights and the optimizers' moments are float32; products run in bfloat16 under autocast where the processor has
    matrix units for it. ``stop_after`` ends the call early, after a checkpoint, as an interruption would.
    """
    torch.set_num_threads(THREADS)
    model.train()
    trained = _set_up(model, run)
    start = _restore(trained, run, checkpoint)
    end = run.steps if stop_after is None else min(run.steps, stop_after)
    began = time.monotonic()
    for step in range(start, end):
        trained.history.append(_step(trained, run, loss, draw_batch(run, data, step), step))
        if (step + 1) % CHECKPOINT_EVERY == 0:
            speed = (step + 1 - start) * run.batch * WINDOW / (time.monotonic() - began)
            recent = sum(trained.history[-50:]) / len(trained.history[-50:])
            report(f"{run.name}: step {step + 1}/{run.steps}, loss {recent:.3f}, {speed:,.0f} tokens/s")
            _save(trained, run, step + 1, checkpoint)
    if end < run.steps:
        _save(trained, run, end, checkpoint)
    model.eval()
    return trained


def _step(trained: Trained, run: Run, objective: LossFunction, batch: tuple[Tensor, Tensor], step: int) -> float:
    for optimizer, peak in zip(trained.optimizers, (run.peak_rate, run.muon_rate), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = peak * run.scale(step)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16_units()):
        loss = objective(trained.model, *batch)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_((p for p in trained.model.parameters() if p.requires_grad), run.clip)
    for optimizer in trained.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def has_bfloat16_units() -> bool:
    """Whether bfloat16 products are faster here than float32 ones."""
    return bool(torch.cpu._is_amx_tile_supported())


def _identity(run: Run) -> str:
    return json.dumps(asdict(run), sort_keys=True)


def _save(trained: Trained, run: Run, step: int, checkpoint: Path | None) -> None:
    if checkpoint is None:
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(".partial")
    torch.save(
        {"run": _identity(run), "step": step, "model": trained.model.state_dict(),
         "optimizers": [o.state_dict() for o in trained.optimizers], "history": trained.history},
        partial,
    )  # fmt: skip
    partial.replace(checkpoint)


def _restore(trained: Trained, run: Run, checkpoint: Path | None) -> int:
    """Load ``checkpoint`` if it belongs to this run; a changed run starts anew. Returns the next step."""
    if checkpoint is None or not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["run"] != _identity(run):
        return 0
    trained.model.load_state_dict(state["model"])
    for optimizer, saved in zip(trained.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    trained.history.extend(state["history"])
    return int(state["step"])


@torch.inference_mode()
def heldout_loss(model: nn.Module, tokens: Tokens, windows: int | None = None) -> float:
    """Mean next-token loss in nats over consecutive windows of 256 tokens, float32 throughout.

    The text is cut into whole windows (a shorter rest is left out); within each, every token but the first
    is predicted, so a window counts 255 times. ``windows`` limits how many of the first are used.
    """
    count = len(tokens) // WINDOW
    rows = torch.from_numpy(tokens[: count * WINDOW].astype(np.int64)).view(count, WINDOW)[:windows]
    total = 0.0
    for part in torch.split(rows, 16):
        logits = model(input_ids=part, use_cache=False).logits.float()
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        total += nn.functional.cross_entropy(flat, part[:, 1:].reshape(-1), reduction="sum").item()
    return total / (len(rows) * (WINDOW - 1))
