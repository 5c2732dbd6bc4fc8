"""Truncated SVDs, low-rank sums and task Grams against ``torch.linalg.svd`` and ``torch.svd_lowrank``, in one run.

    python benchmarks/svd.py --device cpu --threads 1 [--part standard|batched|large|mixtral|quick]

Contestants take turns, ``--repeats`` times; medians of process CPU seconds (CUDA: of synchronised wall seconds) are
compared, because other work on a machine changes wall time more than work done. "Excess" is
``||A - U S V||_F / tau_r - 1`` with the optimum tau_r from float64. ``torch.linalg.svd`` is timed on A and on its
transpose: on the CPU the wide orientation takes up to four times as long, and both ratios are given. The other parts
add to an earlier result: ``batched`` several matrices in one call, ``large`` 14336 x 8192, ``mixtral`` the order-8192
eigenproblem of its experts (many minutes each). ``quick`` is a trial on small shapes that writes nothing.

Writes ``results/svd-DEVICE.json`` and the tables between the markers of ``docs/linalg.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import machine
from torch import Tensor

from mergekit_lr.linalg import joint_left_subspaces, project_combine, sum_svd, task_gram, truncated_svd

HERE = Path(__file__).parent
OVERSAMPLING, ITERATIONS = 32, 2  # of torch.svd_lowrank
SHAPES = [(768, 8192, (64, 384)), (1024, 4096, (64, 512)), (2048, 2048, (64,)), (4096, 4096, (64,))]
BATCHES = [(8, 768, 2048, 384), (4, 1536, 4096, 768)]
LARGE = (14336, 8192, (64,))
SPECTRA = ("gauss", "i^-0.7")
WHAT = {"ours": "all factors", "subspace": "subspace"}


@dataclass
class Row:
    """One line of a table: what was computed and the seconds of each contestant."""

    case: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def ratio(self, ours: str = "ours", other: str = "svd") -> float:
        return median(self.seconds[other]) / median(self.seconds[ours])


class Clock:
    """Seconds of one call: CPU seconds of the process, or wall seconds between device synchronisations."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        now = time.process_time if self.device == "cpu" else time.perf_counter
        self._settle()
        begin = now()
        result = work()
        self._settle()
        return now() - begin, result

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def make(m: int, n: int, spectrum: str, device: str, seed: int = 0) -> Tensor:
    """An fp32 matrix with a flat (Gaussian) or a power-law spectrum."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=g).to(device)
    if spectrum == "gauss":
        return a
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=g).to(device))[0]
    v = torch.linalg.qr(torch.randn(n, p, generator=g).to(device))[0]
    return (u * torch.arange(1, p + 1, device=device) ** -0.7) @ v.T


def residual(a: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """``||A - U S V||_F`` in float64, a strip of rows at a time."""
    total = 0.0
    for i in range(0, a.shape[0], 1024):
        part = a[i : i + 1024].double() - (u[i : i + 1024].double() * s.double()) @ vh.double()
        total += float((part * part).sum())
    return math.sqrt(total)


def spectrum_squared(a: Tensor) -> Tensor:
    """Squared singular values, descending, from a float64 Gram."""
    a = a if a.shape[0] <= a.shape[1] else a.T
    g = torch.zeros(a.shape[0], a.shape[0], dtype=torch.float64, device=a.device)
    for i in range(0, a.shape[1], 2048):
        part = a[:, i : i + 2048].double()
        g.addmm_(part, part.T)
    return torch.linalg.eigvalsh(g).flip(0)


def run_truncated(clock: Clock, m: int, n: int, ranks: tuple[int, ...], spectrum: str, repeats: int) -> list[Row]:
    a = make(m, n, spectrum, clock.device)
    rows = {r: Row(f"{m}x{n} r={r} {spectrum}") for r in ranks}
    full: dict[str, list[float]] = {"svd": [], "svd of A^T": []}
    answers: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
    for turn in range(repeats):
        if turn < max(1, repeats // 2) or m * n < 1 << 23:  # the slow ones take fewer turns
            for name, given in (("svd", a), ("svd of A^T", a.T.contiguous()))[: 1 if m > 10_000 else 2]:
                seconds, factors = clock(lambda given=given: torch.linalg.svd(given, full_matrices=False))
                full[name].append(seconds)
                sigma = factors[1]
        for r, row in rows.items():
            seconds, found = clock(lambda r=r: truncated_svd(a, r))
            row.seconds.setdefault("ours", []).append(seconds)
            answers[r, "ours"] = (found.u, found.s, found.vh)
            row.note = f"{found.certificate.route}, certified {found.certificate.excess:.0e}"
            seconds = clock(lambda r=r: joint_left_subspaces([[a]], r))[0]
            row.seconds.setdefault("subspace", []).append(seconds)
            q = min(r + OVERSAMPLING, m, n)
            seconds, low = clock(lambda q=q: torch.svd_lowrank(a, q=q, niter=ITERATIONS))
            row.seconds.setdefault("svd_lowrank", []).append(seconds)
            answers[r, "svd_lowrank"] = (low[0][:, :r], low[1][:r], low[2][:, :r].T)
    # float64 for the optimum; above order 4096 the fp32 SVD's values must do (the tail is right to 1e-6)
    squared = spectrum_squared(a) if min(m, n) <= 4096 else sigma.double() ** 2
    for (r, name), (u, s, vh) in answers.items():
        rows[r].excess[name] = residual(a, u, s, vh) / math.sqrt(float(squared[r:].sum())) - 1.0
    for row in rows.values():
        row.seconds |= {name: seconds for name, seconds in full.items() if seconds}
    return list(rows.values())


def run_batched(clock: Clock, count: int, m: int, n: int, rank: int, repeats: int) -> Row:
    """Several matrices of one shape in one call, as a layer of experts comes."""
    batch = torch.stack([make(m, n, "gauss", clock.device, seed) for seed in range(count)])
    flipped, q = batch.mT.contiguous(), min(rank + OVERSAMPLING, m, n)
    row = Row(f"{count} of {m}x{n} r={rank} gauss")
    for turn in range(repeats):
        if turn == 0:
            row.seconds["svd"] = [clock(lambda: torch.linalg.svd(batch, full_matrices=False))[0]]
            row.seconds["svd of A^T"] = [clock(lambda: torch.linalg.svd(flipped, full_matrices=False))[0]]
        seconds, found = clock(lambda: [truncated_svd(a, rank) for a in batch])
        row.seconds.setdefault("ours", []).append(seconds)
        seconds = clock(lambda: joint_left_subspaces([[a] for a in batch], rank))[0]
        row.seconds.setdefault("subspace", []).append(seconds)
        seconds, low = clock(lambda: torch.svd_lowrank(batch, q=q, niter=ITERATIONS))
        row.seconds.setdefault("svd_lowrank", []).append(seconds)
    tails = [math.sqrt(float(spectrum_squared(a)[rank:].sum())) for a in batch]
    answers = {
        "ours": [(f.u, f.s, f.vh) for f in found],
        "svd_lowrank": [(u[:, :rank], s[:rank], v[:, :rank].T) for u, s, v in zip(*low, strict=True)],
    }
    for name, factors in answers.items():
        row.excess[name] = max(residual(a, *f) / t - 1.0 for a, f, t in zip(batch, factors, tails, strict=True))
    row.note = f"{found[0].certificate.route}, certified {max(f.certificate.excess for f in found):.0e}"
    return row


def run_low_rank(clock: Clock, repeats: int) -> Row:
    g = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(4096, r, generator=g), torch.randn(r, 4096, generator=g)) for r in (16, 16, 64)]
    pairs = [(b.to(clock.device), a.to(clock.device)) for b, a in pairs]
    row = Row("sum of three LoRA pairs 4096x4096, ranks 16+16+64 to 64")
    dense = sum((b @ a for b, a in pairs), torch.zeros(()).to(clock.device))
    for turn in range(repeats):
        if turn == 0:
            row.seconds["svd"] = [clock(lambda: torch.linalg.svd(dense, full_matrices=False))[0]]
        seconds, found = clock(lambda: sum_svd(pairs, rank=64))
        row.seconds.setdefault("ours", []).append(seconds)
        seconds = clock(lambda: torch.svd_lowrank(dense, q=64 + OVERSAMPLING, niter=ITERATIONS))[0]
        row.seconds.setdefault("svd_lowrank", []).append(seconds)
    exact = sum((b.double() @ a.double() for b, a in pairs), torch.zeros(()).to(clock.device))
    row.excess["ours"] = residual(exact, found.u, found.s, found.vh) / found.certificate.residual - 1.0
    return row


def run_task_gram(clock: Clock, repeats: int, length: int) -> Row:
    g = torch.Generator().manual_seed(2)
    vectors = list(torch.randn(8, length, generator=g).to(clock.device))
    stacked = torch.stack(vectors)
    row = Row(f"T x T Gram of 8 x {length // 10**6}M")
    for turn in range(repeats):
        if turn == 0:
            row.seconds["svd"] = [clock(lambda: torch.linalg.svd(stacked, full_matrices=False))[0]]
        row.seconds.setdefault("ours", []).append(clock(lambda: task_gram(vectors))[0])
    return row


@dataclass(frozen=True)
class Layer:
    """One kind of joint decomposition in a model: groups of k matrices in each layer."""

    model: str
    name: str
    d_out: int
    d_in: int
    members: int
    groups: int
    matrices: int
    layers: int


LAYERS = [
    Layer("Qwen3-30B-A3B 128->64", "gate and up", 768, 2048, 2, 64, 2, 48),
    Layer("Qwen3-30B-A3B 128->64", "down", 2048, 768, 2, 64, 1, 48),
    Layer("Mixtral-8x7B 8->4", "down", 4096, 14336, 2, 4, 1, 32),
]
MIXTRAL_UP = Layer("Mixtral-8x7B 8->4", "gate and up", 14336, 4096, 2, 4, 2, 32)


def run_layer(clock: Clock, layer: Layer, share: float, sample: int) -> dict[str, Any]:
    """Seconds for ``sample`` groups of synthetic bf16 experts, scaled to the whole model."""
    g = torch.Generator().manual_seed(3)
    groups = [
        [
            torch.randn(layer.d_out, layer.d_in, generator=g).to(torch.bfloat16).to(clock.device)
            for _ in range(layer.members)
        ]
        for _ in range(sample)
    ]
    rank = max(1, round(share * min(layer.d_out, layer.members * layer.d_in)))
    weights = [1.0 / layer.members] * layer.members

    def work() -> int:
        names = [f"{layer.name} {i}" for i in range(sample)]
        for group, joint in zip(groups, joint_left_subspaces(groups, rank, names=names), strict=True):
            project_combine(joint, group, weights)
        return sample

    if clock.device == "cuda" or layer.d_out * layer.d_in < 1 << 22:
        work()  # warm
    seconds = clock(work)[0]
    whole = seconds / sample * layer.groups * layer.matrices * layer.layers
    return {**asdict(layer), "rank": rank, "sample": sample, "seconds": seconds, "whole_model_seconds": whole}


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """The goals beside what was reached: ratios of CPU seconds to ``torch.linalg.svd`` of the same matrix."""
    goals = [
        ("768x8192", 12.0),
        ("1024x4096", 12.0),
        ("4096x4096 r=64", 20.0),
        ("sum of three", 100.0),
        ("T x T", 30.0),
    ]
    found = []
    for prefix, goal in goals:
        for row in rows:
            if row.case.startswith(prefix):
                for ours in ("ours", "subspace"):
                    if ours in row.seconds:
                        reached = row.ratio(ours)
                        what = f"{row.case}, {WHAT[ours]}"
                        found.append({"case": what, "target": goal, "reached": reached, "met": reached >= goal})
    return found


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = result["machine"]
    lines = [
        f"{where['cpu']}, {where['cores']} cores, {result['threads']} thread(s), torch {result['torch']}, "
        f"{result['date']}, load average {result['load'][0]:.1f} at the start and {result['load'][1]:.1f} at the end. "
        f"{result['unit']}, medians of {result['repeats']} (one run where an SVD takes minutes).",
        "",
        "| case | svd (s) | svd of A^T (s) | svd_lowrank (s) | ours: subspace (s) | ours: U, S, V (s) | ratio to svd "
        "| to svd of A^T | to svd_lowrank | excess ours / svd_lowrank | route |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in (Row(**r) for r in result["rows"]):
        known = {name: f"{median(s):.3g}" for name, s in row.seconds.items()}
        cells = [known.get(name, "–") for name in ("svd", "svd of A^T", "svd_lowrank", "subspace", "ours")]
        cells += [f"{row.ratio(other=k):.3g}" if k in known else "–" for k in ("svd", "svd of A^T", "svd_lowrank")]
        excess = " / ".join(f"{row.excess[k]:.0e}" if k in row.excess else "–" for k in ("ours", "svd_lowrank"))
        lines.append("| " + " | ".join([row.case, *cells, excess, row.note]) + " |")
    lines += ["", "| target (ratio to svd) | target | reached | met |", "|---|---:|---:|---|"]
    for t in result["targets"]:
        lines.append(f"| {t['case']} | {t['target']:.0f} | {t['reached']:.1f} | {'yes' if t['met'] else 'no'} |")
    lines += ["", "| model, r = n/2 | matrices | rank | measured | whole model |", "|---|---|---:|---:|---:|"]
    for e in result["models"]:
        count = e["groups"] * e["matrices"] * e["layers"]
        what = f"{e['name']}: {count} groups of {e['members']} x {e['d_out']}x{e['d_in']}"
        measured, whole = f"{e['seconds']:.3g} s for {e['sample']}", f"{e['whole_model_seconds'] / 60:.3g} min"
        lines.append(f"| {e['model']} | {what} | {e['rank']} | {measured} | {whole} |")
    return "\n".join(lines)


def write_docs(page: Path, device: str, text: str) -> None:
    """Replace what stands between the markers of ``page``."""
    begin, end = f"<!-- svd-{device}:begin -->", f"<!-- svd-{device}:end -->"
    old = page.read_text()
    head, rest = old.split(begin)
    page.write_text(head + begin + "\n" + text + "\n" + end + rest.split(end)[1])


def measure(clock: Clock, part: str, repeats: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows and whole-model estimates of one part."""
    shapes = {"quick": [(96, 512, (8, 48))], "large": [LARGE], "standard": SHAPES}.get(part, [])
    rows: list[Row] = []
    for m, n, ranks in shapes:
        for spectrum in SPECTRA[:1] if part == "large" else SPECTRA:
            rows += run_truncated(clock, m, n, ranks, spectrum, 1 if part == "large" else repeats)
            print(rows[-1].case, f"{rows[-1].ratio():.1f}x", rows[-1].note, flush=True)
    if part == "standard":
        rows += [run_low_rank(clock, repeats), run_task_gram(clock, repeats, 10_000_000)]
    if part in ("standard", "batched"):
        rows += [run_batched(clock, *batch, repeats) for batch in BATCHES]
    layers = {"mixtral": [MIXTRAL_UP], "standard": LAYERS}.get(part, [])
    return rows, [run_layer(clock, layer, 0.5, 8 if clock.device == "cuda" else 1) for layer in layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["standard", "batched", "large", "mixtral", "quick"], default="standard")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, start = Clock(args.device), os.getloadavg()[0]
    rows, models = measure(clock, args.part, args.repeats)
    result = {
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}),
        "torch": torch.__version__,
        "threads": args.threads,
        "date": datetime.date.today().isoformat(),
        "load": [start, os.getloadavg()[0]],
        "unit": "Process CPU seconds" if args.device == "cpu" else "Wall seconds",
        "repeats": args.repeats,
    }
    file = HERE / "results" / f"svd-{args.device}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    if args.part != "quick" and earlier.get("machine") == result["machine"]:  # the other parts' rows stay
        cases, names = {row.case for row in rows}, {(m["model"], m["name"]) for m in models}
        rows = [Row(**r) for r in earlier["rows"] if r["case"] not in cases] + rows
        models = [m for m in earlier["models"] if (m["model"], m["name"]) not in names] + models
    result |= {"rows": [asdict(r) for r in rows], "targets": targets(rows), "models": models}
    text = tables(result)
    print(text)
    if args.part != "quick":
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        write_docs(HERE.parent / "docs" / "linalg.md", args.device, text)


if __name__ == "__main__":
    main()
