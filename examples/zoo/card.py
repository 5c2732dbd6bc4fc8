"""Model cards: what a model was trained on, how, and what it reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo.text import read_summary
from zoo.train import WINDOW, Run

_TITLES = {
    "base": "Example base",
    "python": "Example expert: Python",
    "c": "Example expert: C",
    "german": "Example expert: German",
    "joint": "Example joint fine-tune",
    "lora-python": "Example LoRA adapter: Python",
    "lora-german": "Example LoRA adapter: German",
    "qwen3-moe": "Example Qwen3-MoE",
    "mixtral": "Example Mixtral",
}


def header(tags: Sequence[str], library: str, base: str = "", relation: str = "") -> str:
    """The YAML block that model hubs read."""
    lines = ["---", "license: apache-2.0", "language: [en, de]", f"library_name: {library}"]
    if library == "transformers":
        lines.append("pipeline_tag: text-generation")
    if base:
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---", ""]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def loss_table(losses: Mapping[str, float]) -> str:
    """Held-out losses, one column per domain."""
    return table(tuple(losses), [[f"{value:.4f}" for value in losses.values()]])


def _training(run: Run) -> str:
    summary = read_summary()
    total = sum(run.mixture.values())
    rows = [
        [domain, f"{share / total:.0%}", f"{summary[domain]['bytes'] / 1e6:.1f} MB", f"{summary[domain]['tokens']:,}"]
        for domain, share in run.mixture.items()
    ]
    seen = run.steps * run.batch * WINDOW
    optimizer = f"AdamW, peak rate {run.peak_rate:g}, betas {run.betas}"
    if run.muon_rate:
        optimizer = f"Muon for the layers' matrices, peak rate {run.muon_rate:g}; for the rest " + optimizer
    return (
        table(("domain", "share of batches", "text", "tokens available"), rows)
        + f"\n{run.steps} steps of {run.batch} windows of {WINDOW} tokens ({seen:,} tokens), seed {run.seed}.\n"
        f"{optimizer}, weight decay {run.weight_decay:g}, {run.warmup} steps of warm-up, then a cosine to "
        f"{run.final_fraction:.0%}.\nTrained in float32 (products in bfloat16 where the processor has matrix units "
        "for it), stored in bfloat16.\n"
    )


def body(name: str, what: str, run: Run, losses: Mapping[str, float], more: str = "") -> str:
    """The card's text after the YAML block."""
    return f"""# {_TITLES[name]}

{what}

It is an example for merging and for tests, not a language model for use: too small to be right about anything.

## Held-out loss
Nats per token on the fixed slices in `examples/text/heldout`, consecutive windows of {WINDOW} tokens:

{loss_table(losses)}
{more}## Training
{_training(run)}
The text is what a Debian machine with Python has on its disk: manual pages, the language reference and the
sources of Python's standard library, C headers, German manual pages and message catalogues. No passage of three
lines of the held-out text is in it. `examples/zoo/build.py` rebuilds the model; the same seeds on another
processor or another version of torch give other bits and nearly the same losses.

## Licence
Apache-2.0. The texts it learned from have their own licences; `examples/text/README.md` lists those of the
slices in the repository.
"""


def write(folder: Path, text: str) -> None:
    """Write the card last: a folder with a card is a finished part."""
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_dense(folder: Path, run: Run, losses: Mapping[str, float]) -> None:
    """The card of the base, an expert or the joint fine-tune."""
    shape = "A Llama of 1.8 M parameters (4 layers, width 192, vocabulary 1,536, tied embeddings)"
    if run.name == "base":
        what = f"{shape} trained from scratch on English, Python, C and German, with English as the largest part."
        tags = ["llama", "example"]
        text = header(tags, "transformers") + body(run.name, what, run, losses)
    else:
        domains = ", ".join(d for d, share in run.mixture.items() if share > 0.2)
        what = f"{shape}: a full fine-tune of the example base on {domains}."
        tags = ["llama", "example", "fine-tune"]
        text = header(tags, "transformers", "base", "finetune") + body(run.name, what, run, losses)
    write(folder, text)
