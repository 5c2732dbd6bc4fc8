"""Build the example models: ``python examples/zoo/build.py [PART ...]`` (all parts when none is named).

A part that is finished is skipped, an interrupted one continues from its last checkpoint. Results go to
``examples/zoo/build/``. A part that another one needs is built first, unless the repository carries it
(held-out text, tokenizer and base). ``--publish`` copies the base, the experts and the table of losses to
``examples/models/``; ``--heldout`` draws new held-out slices, after which no earlier loss compares.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mergekit_lr.errors import MergekitLrError, ResourceError, UsageError
from zoo import COMMITTED, HELDOUT, WORK


@dataclass(frozen=True)
class Part:
    """One thing that can be built: its recipe, what must be there first, and the file that says it is done."""

    what: str
    make: Callable[[], None]
    result: Path
    needs: tuple[str, ...] = ()
    committed: Path | None = None
    last: bool = False  # depends on whatever else there is: made anew each time, after everything else

    @property
    def done(self) -> bool:
        return self.result.exists() and not self.last


def _text() -> None:
    from zoo import text

    if not (HELDOUT / "manifest.json").is_file():
        text.write_heldout()
    text.write_tokens()


def _tokenizer() -> None:
    from zoo import text, tokenizer

    if not (HELDOUT / "manifest.json").is_file():
        text.write_heldout()
    tokenizer.build(text.training_documents)


def _dense(name: str) -> Callable[[], None]:
    def make() -> None:
        from zoo import dense

        dense.build(name)

    return make


def _adapter(domain: str) -> Callable[[], None]:
    def make() -> None:
        from zoo import lora

        lora.build(domain)

    return make


def _mixture_of_experts(name: str) -> Callable[[], None]:
    def make() -> None:
        from zoo import moe

        moe.build(name)

    return make


def _digits() -> None:
    from zoo import vision

    vision.build()


def _losses() -> None:
    from zoo import losses

    losses.write(WORK / "LOSSES.json")


def parts() -> dict[str, Part]:
    """Every part by name, in an order in which they can be built."""
    table = {
        "tokenizer": Part(
            "byte-level BPE, 1,536 tokens", _tokenizer, WORK / "tokenizer" / "tokenizer.json",
            committed=COMMITTED / "base" / "tokenizer.json",
        ),
        "text": Part("training text of four domains as tokens", _text, WORK / "text" / "summary.json", ("tokenizer",)),
        "base": Part(
            "Llama, 1.8 M parameters, four domains", _dense("base"), WORK / "base" / "README.md", ("text",),
            committed=COMMITTED / "base" / "README.md",
        ),
    }  # fmt: skip
    for name in ("python", "c", "german"):
        table[name] = Part(
            f"full fine-tune of the base on {name}, with Adam's moments", _dense(name),
            WORK / name / "README.md", ("base", "text"),
        )  # fmt: skip
    table["joint"] = Part(
        "one fine-tune on all three: the ceiling for merges", _dense("joint"), WORK / "joint" / "README.md",
        ("base", "text"),
    )  # fmt: skip
    for name in ("python", "german"):
        table[f"lora-{name}"] = Part(
            f"PEFT LoRA adapter of the base on {name}", _adapter(name), WORK / f"lora-{name}" / "README.md",
            ("base", "text"),
        )  # fmt: skip
    for name, what in (("qwen3-moe", "Qwen3-MoE, 16 experts, top-4"), ("mixtral", "Mixtral, 8 experts, top-2")):
        table[name] = Part(what, _mixture_of_experts(name), WORK / name / "README.md", ("text",))
    table["digits"] = Part("three MLPs and two ViTs on digits", _digits, WORK / "digits" / "README.md")
    table["losses"] = Part(
        "held-out loss of every model built", _losses, WORK / "LOSSES.json", ("base", "python", "c", "german"),
        last=True,
    )
    return table


def plan(names: Sequence[str]) -> list[str]:
    """``names`` and what they need that is neither built nor in the repository, needs first."""
    table = parts()
    ordered: list[str] = []

    def visit(name: str) -> None:
        part = table[name]
        carried = part.committed is not None and part.committed.exists() and name not in names
        if name in ordered or part.done or carried:
            return
        for need in part.needs:
            visit(need)
        ordered.append(name)

    for name in names:
        visit(name)
    return ordered


def build(names: Sequence[str], jobs: int) -> None:
    """Build ``names`` and what they need; with several jobs, parts that are ready run beside each other."""
    table, waiting = parts(), plan(names)
    if jobs == 1 or len(waiting) == 1:
        for name in waiting:
            began = time.monotonic()
            table[name].make()
            print(f"{name}: done in {time.monotonic() - began:.0f} s", flush=True)
        return
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        unfinished = {*waiting, *running}
        ready = [n for n in waiting if unfinished == {n} or not (table[n].last or unfinished & set(table[n].needs))]
        for name in ready[: jobs - len(running)]:
            waiting.remove(name)
            running[name] = subprocess.Popen([sys.executable, __file__, "--jobs", "1", name])
        ended = {name: process.returncode for name, process in running.items() if process.poll() is not None}
        for name, code in ended.items():
            del running[name]
            if code:
                for other in running.values():
                    other.wait()
                raise ResourceError(
                    f"part {name} did not finish", where="examples/zoo", why=f"exit code {code}, see its message above",
                    fix="mend the cause and run the same command: finished parts and checkpoints are kept",
                )  # fmt: skip
        time.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the example models.")
    parser.add_argument("part", nargs="*", help="what to build; see --list")
    parser.add_argument("--list", action="store_true", help="print the parts and which are built")
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time, one thread each (default 2)")
    parser.add_argument("--publish", action="store_true", help="copy what the repository carries to examples/models")
    parser.add_argument("--heldout", action="store_true", help="draw new held-out slices first")
    options = parser.parse_args(arguments)
    table = parts()
    if options.list:
        for name, part in table.items():
            print(f"{name:14s} {'built  ' if part.done else '-      '} {part.what}")
        return 0
    try:
        if unknown := [name for name in options.part if name not in table]:
            raise UsageError(f"no part named {', '.join(unknown)}", fix=f"parts: {', '.join(table)}")
        if options.jobs < 1:
            raise UsageError(f"--jobs {options.jobs} is not a positive number")
        if options.heldout:
            from zoo import text

            text.write_heldout()
        build(options.part or list(table), options.jobs)
        if options.publish:
            from zoo import publish

            publish.publish()
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except MergekitLrError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    # No network is needed; without this transformers looks for files on the Hub that a local folder lacks.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
