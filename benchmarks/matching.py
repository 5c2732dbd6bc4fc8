"""Barriers between networks from different seeds: as they are, matched, softly matched, refitted; and the cost.

    python benchmarks/matching.py --work /tmp/matching            # trains what it needs, minutes on one core
    python benchmarks/matching.py --work /tmp/matching --parts timing

Perceptrons (digits; widths 64 to 512, three seeds), the zoo's vision transformers, two small Llamas on the zoo's
English tokens, and the cost of assignments and products at the shapes of Llama 8B. Writes
benchmarks/results/matching.json and the plot benchmarks/results/matching.png; ``--table`` prints the tables of
docs/quality_matching.md from them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from zoo.vision import Perceptron, VisionTransformer, digits, train

from mergekit_lr.arch.spec import spec_for
from mergekit_lr.arch.symmetry import SymmetrySpec
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.linalg.assignment import assign, cross_gram
from mergekit_lr.matching.ascent import match_weights
from mergekit_lr.matching.barrier import loss_barrier
from mergekit_lr.matching.diagnose import agreements, mean_agreement
from mergekit_lr.matching.learned import learn
from mergekit_lr.matching.many import interpolated, match_many, mean_model
from mergekit_lr.matching.member import apply_all, identity
from mergekit_lr.matching.pleas import pleas
from mergekit_lr.matching.running import Samples
from mergekit_lr.matching.soft import soft_apply, soft_match

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "matching.json"
WIDTHS, SEEDS = (64, 128, 256, 512), (0, 1, 2)
SOFTNESS, BUDGET = 0.05, 1.2
STEPS = {64: 200, 128: 200, 256: 200, 512: 50}
TRANSFORMER_STEPS = 100
"""Steps of learned permutations, for perceptrons by width."""
Tensors = dict[str, Tensor]


TRAININGS = {"short": (40, 0.01), "long": (400, 1.0)}
"""Epochs and weight decay. Short: until the training images are learnt; long: ten times that, decaying."""


def perceptrons(work: Path, width: int, training: str) -> list[nn.Module]:
    """Trained once, kept as files."""
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = Perceptron(width)
        path = work / f"mlp-{training}-{width}-{seed}.pt"
        if not path.exists():
            epochs, decay = TRAININGS[training]
            train(model, seed, epochs, decay)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        found.append(model)
    return found


def transformers(work: Path) -> list[nn.Module]:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = VisionTransformer()
        path = work / f"vit-{seed}.pt"
        if not path.exists():
            train(model, seed, 60)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        found.append(model)
    return found


def llamas(work: Path, tokens: Tensor) -> list[Any]:
    """Two-layer Llamas of width 64 from two seeds, 1,500 steps of 16 x 64 tokens of English."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for seed in (0, 1):
        config = LlamaConfig(
            vocab_size=1536, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=1,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        path = work / f"llama-{seed}.pt"
        if not path.exists():
            random = torch.Generator().manual_seed(seed)
            optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
            for step in range(1500):
                for group in optimizer.param_groups:
                    group["lr"] = 4e-3 * min(1.0, (step + 1) / 50) * (1 - step / 1500)
                starts = torch.randint(len(tokens) - 40_000, (16,), generator=random)
                rows = torch.stack([tokens[s : s + 64] for s in starts])
                loss = model(input_ids=rows, labels=rows).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        found.append(model.eval())
    return found


def state(model: nn.Module) -> Tensors:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}


def wide(model: nn.Module, tensors: Tensors) -> nn.Module:
    """Give linear layers the widths of ``tensors``, and load these."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.weight" in tensors:
            out, inside = tensors[f"{name}.weight"].shape
            if (out, inside) != (layer.out_features, layer.in_features):
                parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
                setattr(parent, name.rpartition(".")[2], nn.Linear(inside, out, bias=layer.bias is not None))
    model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    return model


def compare(
    label: str,
    models: list[nn.Module],
    spec: SymmetrySpec,
    loss_of: Callable[[nn.Module], float],
    fresh: Callable[[], nn.Module],
    batches: list[Tensor],
    widened: list[str],
    samples: Samples,
    steps: int = 200,
    other_loss: Callable[[nn.Module], float] | None = None,
) -> dict[str, Any]:
    """One pair of networks through every way of merging. ``other_loss``: on more data, for the matched share alone."""
    scratch = fresh()

    def loss(tensors: Tensors) -> float:
        scratch.load_state_dict(tensors, strict=False)
        return loss_of(scratch)

    a, b = map(state, models)
    begin = time.process_time()
    found = match_weights(spec, a.__getitem__, b.__getitem__, seed=0, restarts=3)
    seconds = time.process_time() - begin
    matched = apply_all(spec, found.member, b)
    begin = time.process_time()
    learned = learn(spec, fresh(), a, b, samples, found.member, steps=steps)
    learning_seconds = time.process_time() - begin
    learned_height, learned_curve = loss_barrier(loss, a, apply_all(spec, learned.member, b))
    plans = soft_match(spec, spec, a, matched, regularization=SOFTNESS)
    soft = {n: soft_apply(spec, plans, n, t).to(t.dtype) for n, t in matched.items()}
    naive, naive_curve = loss_barrier(loss, a, b)
    height, curve = loss_barrier(loss, a, matched)
    ends = (curve[0], curve[-1])
    soft_curve = [loss(interpolated(a, soft, i / 10)) for i in range(11)]
    soft_height = max(v - ((1 - i / 10) * ends[0] + i / 10 * ends[1]) for i, v in enumerate(soft_curve))
    aligned = fresh()
    aligned.load_state_dict(matched, strict=False)
    refitted = {}
    for budget in (1.0, BUDGET):
        budgets = dict.fromkeys(widened, budget) if budget > 1 else {}
        tensors = pleas(spec, models[0], aligned, batches, budgets=budgets)
        tensors.pop("lm_head.weight", None)
        refitted[str(budget)] = loss_of(wide(fresh(), tensors)) - sum(ends) / 2
    both = {}
    if other_loss is not None:
        scored = other_loss

        def on_all(tensors: Tensors) -> float:
            scratch.load_state_dict(tensors, strict=False)
            return scored(scratch)

        both = {"share_all_images": loss_barrier(on_all, a, matched)[0] / loss_barrier(on_all, a, b)[0]}
    matrices = [n for n in a if spec.of_tensor[n][0].groups()]
    agreement = mean_agreement(agreements(matrices, a.__getitem__, matched.__getitem__, top=True))
    before = mean_agreement(agreements(matrices, a.__getitem__, b.__getitem__, top=True))
    row = {
        "pair": label, "loss_a": ends[0], "loss_b": ends[1], "barrier_naive": naive, "barrier_matched": height,
        "barrier_learned": learned_height, "middle_learned": learned_curve[5] - sum(ends) / 2,
        "learned_step": learned.step, "learned_seconds": learning_seconds, **both, "barrier_ot": soft_height,
        "middle_naive": naive_curve[5] - sum(ends) / 2,
        "middle_matched": curve[5] - sum(ends) / 2,
        "middle_pleas": refitted["1.0"], "middle_pleas_wide": refitted[str(BUDGET)], "agreement": agreement,
        "agreement_before": before, "seconds": seconds, "sweeps": found.sweeps,
    }  # fmt: skip
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def class_loss(images: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    def loss_of(model: nn.Module) -> float:
        with torch.inference_mode():
            return float(nn.functional.cross_entropy(model(images).double(), labels))

    return loss_of


def in_batches(images: Tensor, labels: Tensor) -> Samples:
    return Samples(torch.split(images, 256), torch.split(labels, 256))


def digit_rows(work: Path, result: dict[str, Any], save: Callable[[], None], seconds: float) -> None:
    """Perceptron pairs, and MergeMany of the three seeds of each width, for both trainings; then the ViTs.

    What ``result`` holds already stays: to measure all anew, remove it from the file. No row is begun once this
    process has had ``seconds`` of CPU time; the next run goes on.
    """
    images, classes, test, labels = digits()
    held_out = class_loss(test, labels)
    every = class_loss(torch.cat([images, test]), torch.cat([classes, labels]))
    samples = in_batches(images, classes)
    pairs, many = result.setdefault("pairs", []), result.setdefault("many", [])
    for training, width in product(TRAININGS, WIDTHS):
        known = {p["pair"] for p in pairs if p.get("training") == training}
        labelled = {f"MLP {width}, seeds {i} and {j}": (i, j) for i, j in combinations(SEEDS, 2)}
        if set(labelled) <= known and any(m["width"] == width and m["training"] == training for m in many):
            continue
        models = perceptrons(work, width, training)
        spec = spec_for("chain", {n: tuple(t.shape) for n, t in state(models[0]).items()}, None, "mlp")
        for label, (i, j) in labelled.items():
            if time.process_time() > seconds:
                return
            if label not in known:
                row = compare(
                    label, [models[i], models[j]], spec, held_out, lambda w=width: Perceptron(w), [images],
                    list(spec.groups), samples, STEPS[width], every,
                )  # fmt: skip
                pairs.append({"kind": "mlp", "training": training, "width": width, **row})
                save()
        many.append({"training": training, "width": width, **three(models, spec, held_out, width)})
        save()
    if time.process_time() <= seconds and not any(p["kind"] == "vit" for p in pairs):
        vits = transformers(work)
        shapes = {n: tuple(t.shape) for n, t in state(vits[0]).items()}
        spec = spec_for(str(HERE / "matching_vit.yml"), shapes, None, "vit")
        widened = [g for g in spec.groups if g.startswith("ffn")]
        row = compare(
            "ViT, seeds 0 and 1", vits, spec, held_out, VisionTransformer, [images], widened, samples, TRANSFORMER_STEPS
        )  # fmt: skip
        pairs.append({"kind": "vit", **row})
        save()


def three(
    models: list[nn.Module], spec: SymmetrySpec, loss_of: Callable[[nn.Module], float], width: int
) -> dict[str, Any]:
    """MergeMany of three perceptrons."""
    tensors = [state(m) for m in models]
    found = match_many(spec, [t.__getitem__ for t in tensors], seed=0)
    network = Perceptron(width)
    merged = {}
    for kind, members in (("many", list(found.members)), ("naive", [found.members[0]] * 3)):
        network.load_state_dict(mean_model(spec, tensors, members))
        merged[kind] = loss_of(network)
    return {"mean_of_three": sum(map(loss_of, models)) / 3, "rounds": found.rounds, **merged}


def language_row(work: Path) -> dict[str, Any]:
    import numpy as np

    tokens = torch.from_numpy(np.load(HERE.parent / "examples/zoo/build/text/english.npy").astype("int64"))
    models = llamas(work, tokens)
    held_out = tokens[-16_384:].reshape(-1, 64)

    def loss_of(model: nn.Module) -> float:
        with torch.inference_mode():
            logits = model(input_ids=held_out).logits[:, :-1]
            return float(nn.functional.cross_entropy(logits.reshape(-1, 1536).double(), held_out[:, 1:].reshape(-1)))

    def fresh() -> nn.Module:
        return type(models[0])(models[0].config).eval()

    shapes = {n: tuple(t.shape) for n, t in state(models[0]).items()}
    spec = spec_for("llama", shapes, models[0].config.to_dict(), "llama")
    batches = [tokens[: 64 * 64].reshape(-1, 64), tokens[64 * 64 : 128 * 64].reshape(-1, 64)]
    widened = [g for g in spec.groups if g.startswith("ffn")]
    samples = Samples(tuple({"input_ids": b} for b in batches), tuple(batches))
    label = "Llama, seeds 0 and 1"
    row = compare(label, models, spec, loss_of, fresh, batches, widened, samples, TRANSFORMER_STEPS)
    return {"kind": "llama", **row}


def timing() -> dict[str, Any]:
    """CPU seconds on one thread: products and assignments, apart, at shapes of Llama 8B."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(1024, 4096, generator=g, dtype=torch.float64), torch.randn(4096, 4096, generator=g).double()

    def seconds(run: Callable[[], object]) -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin

    peak = min(seconds(lambda: x @ y.T) for _ in range(3))
    rate = 2 * 1024 * 4096 * 4096 / peak / 1e9
    half = [torch.randn(4096, 14336, generator=g).bfloat16() for _ in range(2)]
    gram = seconds(lambda: cross_gram([(half[0], half[1])]))
    found: dict[str, Any] = {
        "gemm_gflops": rate,
        "product_4096x14336_seconds": gram,
        "product_share_of_gemm": 2 * 4096 * 4096 * 14336 / gram / 1e9 / rate,
        "ffn_4096": {},
    }
    for kind, noise in (("random", None), ("planted", 0.5)):
        a = torch.randn(4096, 512, generator=g)
        b = torch.randn(4096, 512, generator=g)
        if noise is not None:
            b = (a + noise * b)[torch.randperm(4096, generator=g)]
        gain = cross_gram([(a, b)])
        found["ffn_4096"][kind] = seconds(lambda m=gain: assign(m))
    return found


def slice_of_8b(work: Path, hidden: int = 4096, inner: int = 14336) -> dict[str, Any]:
    """Neurons of one layer with the shapes of Llama 8B, a planted permutation with noise: CPU seconds on one thread.

    In a process of its own kind of memory: files on disk, as a merge has them. ``peak_gib``: of the whole process.
    """
    import resource

    from mergekit_lr.checkpoint.model import open_file
    from mergekit_lr.matching import steps
    from mergekit_lr.matching.inputs import Reader

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    tensors = {f"model.layers.0.mlp.{n}.weight": torch.randn(s, generator=g).bfloat16() for n, s in shapes.items()}
    config = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    spec = spec_for("llama", {n: tuple(t.shape) for n, t in tensors.items()}, config, "slice")
    planted = identity(spec).with_group("ffn.0", torch.randperm(inner, generator=g))
    paths = []
    for name in "ab":
        paths.append(work / f"slice-{name}.safetensors")
        write_safetensors(paths[-1], tensors)
        if name == "a":
            tensors = {
                n: t + 0.5 * torch.randn(t.shape, generator=g, dtype=torch.bfloat16)
                for n, t in apply_all(spec, planted, tensors).items()
            }
    del tensors
    spent = {"assign": 0.0, "cross_gram": 0.0}

    def timed(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*given: Any, **more: Any) -> Tensor:
            begin = time.process_time()
            found = run(*given, **more)
            spent[name] += time.process_time() - begin
            return found

        return call

    steps.assign, steps.cross_gram = timed("assign", assign), timed("cross_gram", cross_gram)  # type: ignore[assignment]
    begin = time.process_time()
    with open_file(paths[0], "a") as a, open_file(paths[1], "b") as b:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = match_weights(spec, Reader(a, 0), Reader(b, 0), only=["ffn.*"])
    back = planted.permutations["ffn.0"][found.member.permutations["ffn.0"]]
    return {
        "assignment_seconds": spent["assign"], "product_seconds": spent["cross_gram"],
        "all_seconds": time.process_time() - begin, "sweeps": found.sweeps,
        "found": float((back == torch.arange(inner)).double().mean()),
        "peak_gib_before": before / 2**20, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def plot(pairs: list[dict[str, Any]], path: Path) -> None:
    """The diagnostic against the measured barrier, a point for each pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), dpi=100)
    axes = figure.subplots()
    for kind in dict.fromkeys(p["kind"] for p in pairs):
        own = [p for p in pairs if p["kind"] == kind]
        for key, when, mark in (("barrier_naive", "agreement_before", "x"), ("barrier_matched", "agreement", "o")):
            label = f"{kind}, {'matched' if mark == 'o' else 'as they are'}"
            axes.plot([p[when]["weighted"] for p in own], [p[key] for p in own], mark, label=label, ms=4)
    axes.set_xlabel("mean weighted agreement of singular directions")
    axes.set_ylabel("barrier (nats)")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def write_tables(result: dict[str, Any]) -> None:
    """Between the markers of docs/quality_matching.md."""
    page = HERE.parent / "docs" / "quality_matching.md"
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- matching:begin -->\n", "<!-- matching:end -->"
    head, rest = text.split(begin)
    page.write_text(head + begin + "\n".join(table_lines(result)) + "\n" + rest[rest.index(end) :], encoding="utf-8")


def table_lines(result: dict[str, Any]) -> list[str]:
    rows = [*result["pairs"], *([result["language"]] if "language" in result else [])]
    lines = [
        "| pair | training | barrier: as is | matched | share | of all images | learned | share | soft (OT) | "
        "middle: matched | PLeaS | PLeaS, 1.2 x | agreement |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *map(_pair_line, rows),
        "",
        "| three perceptrons | training | mean of their losses | average as they are | MergeMany | share | rounds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for m in result["many"]:
        losses = " | ".join(f"{m[k]:.3f}" for k in ("mean_of_three", "naive", "many"))
        share = (m["many"] - m["mean_of_three"]) / (m["naive"] - m["mean_of_three"])
        lines.append(f"| width {m['width']} | {m['training']} | {losses} | {100 * share:.1f} % | {m['rounds']} |")
    if "timing" in result:
        lines += _timing_lines(result["timing"], result.get("slice"))
    return lines


def _pair_line(r: dict[str, Any]) -> str:
    def share(part: float | None) -> str:
        return "" if part is None else f"{100 * part:.1f} %"

    def number(key: str) -> str:
        return f"{r[key]:.3f}" if key in r else ""

    naive = r["barrier_naive"]
    cells = [
        *(r["pair"], r.get("training", ""), number("barrier_naive"), number("barrier_matched")),
        *(share(r["barrier_matched"] / naive), share(r.get("share_all_images")), number("barrier_learned")),
        share(r["barrier_learned"] / naive if "barrier_learned" in r else None),
        *map(number, ("barrier_ot", "middle_matched", "middle_pleas", "middle_pleas_wide")),
        f"{r['agreement_before']['weighted']:.2f} to {r['agreement']['weighted']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _timing_lines(t: dict[str, Any], layer: dict[str, Any] | None) -> list[str]:
    lines = [
        "",
        "| one core, shapes of Llama 8B | CPU seconds |",
        "|---|---:|",
        f"| assignment of 4096, random gains | {t['ffn_4096']['random']:.2f} |",
        f"| assignment of 4096, a noisy planted permutation | {t['ffn_4096']['planted']:.2f} |",
        f"| product 4096 x 14336 x 4096 from bf16 | {t['product_4096x14336_seconds']:.2f} |",
    ]
    if layer is not None:
        lines += [
            f"| neurons of one layer (14336): the assignment | {layer['assignment_seconds']:.1f} |",
            f"| neurons of one layer: the products | {layer['product_seconds']:.1f} |",
            f"| neurons of one layer: all, reading and checking the objective included | {layer['all_seconds']:.1f} |",
        ]
    lines += [
        "",
        f"The product ran at {100 * t['product_share_of_gemm']:.0f} % of what a plain fp64 product reached in the "
        f"same minute ({t['gemm_gflops']:.0f} GFLOP/s).",
    ]
    if layer is not None:
        lines.append(
            f"The layer's planted permutation was found ({100 * layer['found']:.2f} % of its neurons) in "
            f"{layer['sweeps']} sweep; the process held at most {layer['peak_gib']:.1f} GiB."
        )
    return lines


def publish(result: dict[str, Any]) -> None:
    """Tables and plot."""
    write_tables(result)
    plot([*result["pairs"], *([result["language"]] if "language" in result else [])], RESULT.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/matching"), help="folder for trained models")
    parser.add_argument(
        "--table", action="store_true", help="write the tables of docs/quality_matching.md, measure nothing"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no more rows after so much CPU time")
    parser.add_argument("--parts", nargs="+", default=["digits", "language", "timing", "slice"])
    arguments = parser.parse_args()
    if arguments.table:
        publish(json.loads(RESULT.read_text()))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}

    def save() -> None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for part in arguments.parts:
        if part == "digits":
            digit_rows(arguments.work, result, save, arguments.seconds)
        elif part == "language":
            result["language"] = language_row(arguments.work)
        elif part == "slice":
            result["slice"] = slice_of_8b(arguments.work)
        elif part == "timing":
            result["timing"] = timing()
        result["torch"] = torch.__version__
        save()
    publish(result)


if __name__ == "__main__":
    main()
