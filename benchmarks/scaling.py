"""More than one worker: speed-up on one machine, cost of scheduling, and a simulated cluster on a 1T plan.

    python benchmarks/scaling.py [--size 0.25] [--repeats 3] [--only speed|overhead|simulation]

Writes the result file and the table in docs/scaling.md. Three questions, each in one run on one machine:

* speed: one worker against two, by threads of one run, by two parts, and by Ray, for a merge that computes (TIES) and
  one that copies (linear); and the floor, reading all inputs and writing one output, as ``floor.py`` does it.
* overhead: 10,000 units whose work is empty, against 10,000 units of 32 MiB that are merged.
* simulation: the groups that a cluster of 8 nodes would get of the 1T task arithmetic, handed out as the driver does,
  over links of a given bandwidth, against bytes over bandwidth.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import giant
from checkpoints import LlamaShape, make_family
from measure import machine

HERE = Path(__file__).parent
COMMAND = str(Path(sys.executable).with_name("mergekit-lr"))
COMPUTE = {"merge_method": "ties", "parameters": {"density": 0.5}}
COPY = {"merge_method": "linear"}
UNITS = 10_000
NODES, CPUS, BANDWIDTH = 8, 16, 2e9
SPEED_UP, OVERHEAD = 1.6, 0.05  # targets
MARK = "scaling"


@contextmanager
def timed(into: dict[str, Any], name: str) -> Iterator[None]:
    """Wall seconds, and CPU seconds of this process and of children that ended."""
    before, began = os.times(), time.perf_counter()
    yield
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    into.setdefault(name, []).append({"seconds": time.perf_counter() - began, "cpu": cpu})


def recipe_of(method: dict[str, Any], models: list[Path]) -> dict[str, Any]:
    """Two fine-tunes; their base too where the method takes task vectors."""
    entries = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models[-2:]]
    base = {} if method is COPY else {"base_model": str(models[0])}
    return {**method, **base, "models": entries, "dtype": "bfloat16"}


def speed(work: Path, size: float, repeats: int) -> dict[str, Any]:
    """Seconds of each contestant for each merge, in turns."""
    shape = LlamaShape(layers=max(1, round(12 * size)))
    models = [work / "models" / n for n in make_family(work / "models", shape, 2)]
    found: dict[str, Any] = {"parameters": shape.parameters()}
    for kind, method in (("compute", COMPUTE), ("copy", COPY)):
        recipe = work / f"{kind}.json"
        recipe.write_text(json.dumps(recipe_of(method, models)))
        out = work / "out"

        def once(*options: str, recipe: Path = recipe, out: Path = out) -> subprocess.Popen[bytes]:
            command = [COMMAND, "merge", str(recipe), str(out), "--device", "cpu", "--quiet", *options]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL)

        def all_of(runs: list[subprocess.Popen[bytes]]) -> None:
            codes = [run.wait() for run in runs]
            if any(codes):
                raise RuntimeError("a run failed")

        contestants: dict[str, Callable[[], None]] = {
            "one worker": lambda once=once: all_of([once("--threads", "1")]),
            "two workers": lambda once=once: all_of([once("--threads", "2")]),
            "two parts": lambda once=once: all_of([once("--threads", "1", "--part", f"{i}/2") for i in (1, 2)]),
            "Ray, one worker": lambda once=once: all_of([once("--workers", "1")]),
            "Ray, two workers": lambda once=once: all_of([once("--workers", "2")]),
        }
        taken: dict[str, Any] = {}
        for turn in range(repeats):
            for name in [*contestants, "floor"][:: 1 if turn % 2 == 0 else -1]:
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                with timed(taken, name):
                    if name == "floor":
                        floor(models[1:] if kind == "copy" else models, out)
                    else:
                        contestants[name]()
        found[kind] = taken
    return found


def floor(models: list[Path], out: Path) -> None:
    """Read every input byte into one buffer, write one output, fsync it."""
    out.mkdir()
    buffer = bytearray(8 << 20)
    for number, model in enumerate(models):
        for path in sorted(model.glob("*.safetensors")):
            with path.open("rb", buffering=0) as read, (out / path.name).open("ab", buffering=0) as write:
                while got := read.readinto(buffer):
                    if number == 0:
                        write.write(memoryview(buffer)[:got])
                os.fsync(write.fileno())


def overhead(work: Path) -> dict[str, Any]:
    """Seconds for empty units by each executor, and for units of 32 MiB that are merged."""
    from mergekit_lr import merge
    from mergekit_lr.cluster import worker
    from mergekit_lr.engine import processes
    from mergekit_lr.engine.execute import Worker

    tiny = work / "tiny"
    write_tiny(tiny, UNITS)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(tiny)}]}
    found: dict[str, Any] = {}

    def nothing(self: Worker, unit: Any) -> None:
        self.job.journal.record({"unit": unit.key(self.job.graph), "chunks": []})

    def nothing_on_ray(order: Any, units: Any) -> Any:
        session = worker.session_for(order)
        keys = [worker.Unit(*u).key(session.plan.graph) for u in units]
        return worker.Answer([{"unit": k, "chunks": []} for k in keys])

    original, from_bytes, there = Worker.run, processes.FORK_FROM, worker.do_units
    clock: dict[str, float] = {}
    for name in ("threads", "processes", "Ray"):
        Worker.run, processes.FORK_FROM = nothing, 0 if name == "processes" else sys.maxsize  # type: ignore[method-assign]
        worker.do_units = nothing_on_ray
        how = {"workers": 2} if name == "Ray" else {"threads": 2}
        try:
            with clocked(clock, name):
                merge(recipe, work / f"empty-{name}", device="cpu", **how)
        finally:
            Worker.run, processes.FORK_FROM, worker.do_units = original, from_bytes, there  # type: ignore[method-assign]
        found[name] = {"seconds": clock[name], "units": UNITS}
    found["unit of 32 MiB"] = real_unit(work)
    return found


@contextmanager
def clocked(into: dict[str, float], name: str) -> Iterator[None]:
    """Seconds from handing out the first unit to the last one's record; with Ray, planning in the workers too."""
    from mergekit_lr.cluster.crew import Crew
    from mergekit_lr.engine import run

    def timed_call(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any) -> None:
            began = time.perf_counter()
            call(*arguments)
            into[name] = time.perf_counter() - began

        return wrapped

    here, there = run.drain, Crew.drain
    run.drain, Crew.drain = timed_call(here), timed_call(there)  # type: ignore[method-assign]
    try:
        yield
    finally:
        run.drain, Crew.drain = here, there  # type: ignore[method-assign]


def real_unit(work: Path) -> float:
    """Seconds that one worker takes for 32 MiB of a linear merge of two models, start-up apart."""
    from mergekit_lr import merge

    models = [work / "unit" / n for n in make_family(work / "unit", LlamaShape(layers=1, shards=1), 1)]
    recipe = recipe_of(COPY, models)
    seen: list[float] = []
    taken = []
    for turn in range(3):
        seen.clear()
        result = merge(
            recipe, work / f"real-{turn}", device="cpu", threads=1, progress=lambda e: seen.append(time.perf_counter())
        )
        size = sum(p.stat().st_size for p in result.out.glob("*.safetensors"))
        taken.append((seen[-1] - seen[0] or result.report["run"]["seconds"]) * (32 << 20) / size)
    return min(taken)


def write_tiny(folder: Path, count: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    tensors = {f"model.layers.{i}.w.weight": torch.ones(8, dtype=torch.bfloat16) for i in range(count)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def simulate(work: Path) -> dict[str, Any]:
    """The 1T task arithmetic in parts and in groups on ``NODES`` nodes that each move ``BANDWIDTH`` bytes a second."""
    from mergekit_lr.cluster.crew import AHEAD, LEAST, MOST
    from mergekit_lr.engine.plan import planned
    from mergekit_lr.engine.shares import cut, groups_of, loads_of

    names = ("base", "chat", "code", "math")
    for name in names:
        giant.write(work / name)
    entries = [{"model": str(work / m), "parameters": {"weight": 0.4}} for m in names[1:]]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(work / "base"), "models": entries}
    with planned({**recipe, "dtype": "bfloat16"}, device="cpu", threads=1, headers_only=True) as plan:
        cost = {u: load.cost / len(load.units) for load in loads_of(plan) for u in load.units}
        total = sum(cost.values())
        parts = [sum(cost[u] for u in share) for share in cut(plan, NODES)]
        groups = [sum(cost[u] for u in g) for g in groups_of(plan, AHEAD * NODES * CPUS, LEAST, MOST)]
        units = len(plan.units)
    ideal = total / (NODES * BANDWIDTH)
    found = {"bytes": total, "units": units, "groups": len(groups), "ideal": ideal, "parts": max(parts) / BANDWIDTH}
    for name, stalls in (("eight nodes", {}), ("one of them at half the speed", {0: 0.5})):
        found[name] = hand_out(groups, {n: BANDWIDTH * stalls.get(n, 1.0) for n in range(NODES)})
    found["one of them dies half-way"] = hand_out(groups, dict.fromkeys(range(NODES), BANDWIDTH), dies=(0, ideal / 2))
    return found


def hand_out(groups: list[float], speeds: dict[int, float], dies: tuple[int, float] | None = None) -> float:
    """Seconds until the last group is done.

    Each node works on ``CPUS`` groups at a time, which share its bandwidth; who is free takes the next one. A node
    that dies loses the groups that it had in work, and they are handed out again.
    """
    waiting = list(groups)[::-1]
    lanes = [(0.0, node, lane) for node in speeds for lane in range(CPUS)]
    heapq.heapify(lanes)
    end = 0.0
    while waiting:
        free, node, lane = heapq.heappop(lanes)
        size = waiting.pop()
        until = free + size / (speeds[node] / CPUS)
        if dies is not None and node == dies[0] and until > dies[1]:
            waiting.append(size)  # lost with its node, which takes no more
            continue
        end = max(end, until)
        heapq.heappush(lanes, (until, node, lane))
    return end


def tables(found: dict[str, Any]) -> str:
    """The result in Markdown."""
    m = found["machine"]
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, Linux {m['linux']}, load {found['load']:.1f} before; "
        f"mergekit-lr {found['versions']['mergekit-lr']}, Ray {found['versions']['ray']}; {found['date']}.",
        "",
    ]
    if "speed" in found:
        lines += speed_table(found["speed"])
    if "overhead" in found:
        lines += overhead_table(found["overhead"])
    if "simulation" in found:
        lines += simulation_table(found["simulation"])
    return "\n".join(lines).rstrip() + "\n"


def speed_table(s: dict[str, Any]) -> list[str]:
    lines = [
        f"**One worker and two**, {s['parameters'] / 1e6:.0f} M parameters, TIES of two and linear of two; whole "
        "processes, median of the runs:",
        "",
        "| | TIES, s | of one worker | linear, s | of one worker | linear / floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    mids = {k: {n: median(x["seconds"] for x in runs) for n, runs in s[k].items()} for k in ("compute", "copy")}
    for name in s["compute"]:
        a, b = mids["compute"][name], mids["copy"][name]
        one, other = mids["compute"]["one worker"], mids["copy"]["one worker"]
        ratio = "" if name == "floor" else f"{one / a:.2f}x"
        more = "" if name == "floor" else f"{other / b:.2f}x"
        lines.append(f"| {name} | {a:.1f} | {ratio} | {b:.1f} | {more} | {b / mids['copy']['floor']:.1f} |")
    return [*lines, "", f"Target: two workers ≥ {SPEED_UP}x of one where the merge computes.", ""]


def overhead_table(o: dict[str, Any]) -> list[str]:
    unit = o["unit of 32 MiB"]
    lines = [
        f"**Scheduling**: {UNITS:,} units with nothing to do, two workers, against as many of 32 MiB of a linear merge "
        f"({unit * 1000:.0f} ms each):",
        "",
        "| executor | empty units, s | a unit, µs | of real ones | target |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in ("threads", "processes", "Ray"):
        seconds = o[name]["seconds"]
        share = seconds / (UNITS * unit / 2)
        lines.append(f"| {name} | {seconds:.2f} | {seconds / UNITS * 1e6:.0f} | {share:.1%} | ≤ {OVERHEAD:.0%} |")
    return [*lines, ""]


def simulation_table(s: dict[str, Any]) -> list[str]:
    lines = [
        f"**1T parameters on {NODES} nodes**, task arithmetic of three and their base: {s['bytes'] / 1e12:.1f} TB to "
        f"read and write, {s['units']:,} units in {s['groups']:,} groups, {BANDWIDTH / 1e9:.0f} GB/s and {CPUS} CPUs a "
        "node. Simulated:",
        "",
        "| | minutes | of bytes over bandwidth |",
        "| --- | ---: | ---: |",
    ]
    rows = {"bytes over bandwidth": s["ideal"], f"`--part`, {NODES} parts": s["parts"], "Ray": s["eight nodes"]}
    rows |= {f"Ray, {k}": s[k] for k in ("one of them at half the speed", "one of them dies half-way")}
    return lines + [f"| {name} | {t / 60:.1f} | {t / s['ideal']:.3f} |" for name, t in rows.items()]


def write_page(text: str) -> None:
    path = HERE.parent / "docs" / "scaling.md"
    page = path.read_text()
    begin, end = f"<!-- {MARK}:begin -->\n", f"<!-- {MARK}:end -->"
    head, rest = page.split(begin)
    path.write_text(head + begin + text + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.25, help="of the 641 M parameters of the other benchmarks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("speed", "overhead", "simulation"))
    given = parser.parse_args()
    result = HERE / "results" / "scaling.json"
    found: dict[str, Any] = json.loads(result.read_text()) if given.only and result.exists() else {}
    versions = {name: version(name) for name in ("mergekit-lr", "torch", "ray")}
    found |= {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions}
    found["load"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        jobs: dict[str, Callable[[], Any]] = {
            "speed": lambda: speed(work / "speed", given.size, given.repeats),
            "overhead": lambda: overhead(work / "overhead"),
            "simulation": lambda: simulate(work / "simulation"),
        }
        for name, job in jobs.items():
            if given.only in (None, name):
                (work / name).mkdir()
                found[name] = job()
    result.write_text(json.dumps(found, indent=1) + "\n")
    write_page(tables(found))


if __name__ == "__main__":
    main()
