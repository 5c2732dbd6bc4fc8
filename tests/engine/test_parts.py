"""``--part I/N``: whatever the order, the interleaving and the deaths, the bytes of a run in one piece."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lr import merge
from mergekit_lr.engine import identity, shared_space
from mergekit_lr.engine import parts as parts_module
from mergekit_lr.engine.parts import parse_part
from mergekit_lr.engine.plan import planned
from mergekit_lr.engine.portion import byte_range
from mergekit_lr.engine.shares import BLOCK, cut, loads_of, touching
from mergekit_lr.errors import CheckpointError, UsageError

from ..interleaving import Interleaver, Schedule
from .conftest import draw

SHAPES = {"a.weight": (40, 30), "b.weight": (200, 64), "c.weight": (300,), "d.weight": (64, 64), "e.weight": (7,)}

ACTION = """
import mergekit_lr.engine.run as run
{more}
def whole(out):
    run.merge({recipe!r}, out, device="cpu", threads=1, shard_size=25_000)
def act(out, part):
    run.merge({recipe!r}, out, device="cpu", threads=1, shard_size=25_000, part=part, overwrite={overwrite})
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from safetensors.torch import save_file

    found = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("models") / f"m{seed}"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
        save_file(draw(seed, shapes=SHAPES), folder / "model.safetensors", {"format": "pt"})
        found.append(str(folder))
    return found


def ties(models: list[str], scope: str = "model") -> dict[str, Any]:
    entries = [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in models[1:]]
    return {
        "merge_method": "ties",
        "base_model": models[0],
        "models": entries,
        "parameters": {"threshold_scope": scope},
    }


def files(folder: Path) -> dict[str, Any]:
    """Every file's bytes; of the report what does not depend on how the run went."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    report = json.loads(found["merge_report.json"])
    found["merge_report.json"] = {k: v for k, v in report.items() if k not in ("run", "fingerprint")}
    return found


def in_parts(recipe: dict[str, Any], out: Path, order: list[int], count: int, **options: Any) -> list[Any]:
    return [merge(recipe, out, device="cpu", threads=1, part=f"{i}/{count}", **options) for i in order]


@pytest.mark.parametrize("order", [[1], [2, 1], [3, 1, 2], [5, 4, 3, 2, 1]])
def test_parts_in_any_order_give_the_files_of_one_run(models, tmp_path, order):
    recipe = ties(models)
    merge(recipe, tmp_path / "whole", device="cpu", shard_size=25_000)
    results = in_parts(recipe, tmp_path / "out", order, len(order), shard_size=25_000)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for done, result in enumerate(results[:-1], 1):
        assert result.waiting_for == tuple(sorted(order[done:]))
    assert results[-1].waiting_for == () and results[-1].report["run"]["parts"] == len(order)
    again = in_parts(recipe, tmp_path / "out", [1], len(order), shard_size=25_000)
    assert again[0].report == results[-1].report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_a_bundle_in_parts(models, tmp_path):
    entries = [{"model": m, "name": f"t{i}"} for i, m in enumerate(models[1:])]
    recipe = {"merge_method": "tall_masks", "base_model": models[0], "models": entries}
    merge(recipe, tmp_path / "whole", device="cpu", shard_size=25_000)
    in_parts(recipe, tmp_path / "out", [3, 1, 2], 3, shard_size=25_000)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.fixture
def sliced(models, monkeypatch):
    """Units of at most 8 KB, so that one tensor is in several parts."""
    from mergekit_lr.engine import digest, portion, units

    for module in (digest, portion, units):
        monkeypatch.setattr(module, "CHUNK", 8 << 10)
    entries = [{"model": m, "parameters": {"weight": 0.5}} for m in models]
    return {"merge_method": "linear", "models": entries}


def test_shares_are_even_whole_and_the_same_everywhere(sliced):
    with planned(sliced, device="cpu") as plan:
        costs = {u: load.cost for load in loads_of(plan) for u in load.units}
        most = max(costs.values())
        for count in (1, 2, 3, 7, 50):
            shares = cut(plan, count)
            assert shares == cut(plan, count)
            assert sorted(u.key(plan.graph) for share in shares for u in share) == sorted(
                u.key(plan.graph) for u in plan.units
            )
            even = sum(costs.values()) / count
            assert all(abs(sum(costs[u] for u in share) - even) <= most for share in shares)
            ends = [byte_range(plan, u)[0] for share in shares for u in share]
            assert ends == sorted(ends)  # a share is a run of bytes
        assert sum(costs.values()) == plan.bytes_in + plan.layout.total_bytes


def test_units_that_share_a_page_with_another_part_are_named(sliced):
    with planned(sliced, device="cpu") as plan:
        shares = cut(plan, 3)
        found = touching(plan, shares)
        owners = {u: i for i, share in enumerate(shares) for u in share}
        blocks: dict[tuple[int, int], set[int]] = {}
        for unit, owner in owners.items():
            (shard, offset), nbytes = byte_range(plan, unit)
            for block in range(offset // BLOCK, (offset + nbytes - 1) // BLOCK + 1):
                blocks.setdefault((shard, block), set()).add(owner)
        for unit in owners:
            (shard, offset), nbytes = byte_range(plan, unit)
            inside = range(offset // BLOCK, (offset + nbytes - 1) // BLOCK + 1)
            assert (unit in found) == any(len(blocks[shard, b]) > 1 for b in inside)
        assert touching(plan, [plan.units]) == []


def test_bytes_that_another_machine_wrote_over_are_done_again(sliced, tmp_path, monkeypatch):
    merge(sliced, tmp_path / "whole", device="cpu")
    out = tmp_path / "out"
    in_parts(sliced, out, [1, 3], 3)
    commit = parts_module._commit

    def damaged(plan, space, shares, *rest):
        for unit in touching(plan, shares):
            path = space.model / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[byte_range(plan, unit)[0][1]] ^= 255
            path.write_bytes(data)
        commit(plan, space, shares, *rest)

    monkeypatch.setattr(parts_module, "_commit", damaged)
    in_parts(sliced, out, [2], 3)
    assert files(out) == files(tmp_path / "whole")


def test_statistics_of_the_model_are_gathered_once(models, tmp_path, monkeypatch):
    ran = []
    compute = parts_module.compute_artifacts
    monkeypatch.setattr(parts_module, "compute_artifacts", lambda *a: (ran.append(1), compute(*a)))
    in_parts(ties(models), tmp_path / "out", [2, 1, 3], 3, shard_size=25_000)
    assert len(ran) == 1


def test_one_that_died_elsewhere_is_waited_for_and_then_replaced(models, tmp_path, monkeypatch):
    """A claim of another machine cannot be asked about: its beat is watched."""
    recipe, out = ties(models), tmp_path / "out"
    merge(recipe, tmp_path / "whole", device="cpu")
    in_parts(recipe, out, [1], 2)
    space = tmp_path / "out.partial"
    (space / "statistics").rename(space / "statistics-elsewhere")
    claim = space / "claim-statistics"
    beats = []

    def pause() -> None:
        beats.append(1)
        if len(beats) < 5:  # alive at first
            claim.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "elsewhere", "beat": len(beats)}))

    claim.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "elsewhere", "beat": 0}))
    monkeypatch.setattr(shared_space, "pause", pause)
    monkeypatch.setattr(shared_space, "PATIENCE", 0.05)
    in_parts(recipe, out, [2], 2)
    assert len(beats) > 5
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("count", "parts was 3 and is 2"),
        ("version", "mergekit_lr was 0.1.0 and is 9.9"),
        ("torch", "torch was .* and is 9.9"),
        ("recipe", "changed since: recipe"),
        ("shards", "shard_size was 5000000000 and is 25000"),
        ("input", "changed since: inputs"),
    ],
)
def test_parts_must_agree(models, tmp_path, monkeypatch, change, message):
    import shutil

    import mergekit_lr

    copies = [str(shutil.copytree(m, tmp_path / Path(m).name)) for m in models]
    recipe, out, options, count = ties(copies), tmp_path / "out", {}, 3
    in_parts(recipe, out, [1], 3)
    if change == "count":
        count = 2
    elif change == "version":
        monkeypatch.setattr(mergekit_lr, "__version__", "9.9")
    elif change == "torch":
        monkeypatch.setattr(identity, "version", lambda name: "9.9")
    elif change == "recipe":
        recipe["models"][0]["parameters"]["weight"] = 0.6
    elif change == "shards":
        options["shard_size"] = 25_000
    else:  # another model of the same shapes, names, size and times
        path = Path(copies[1]) / "model.safetensors"
        stat = path.stat()
        data = bytearray(path.read_bytes())
        data[-8] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UsageError, match=rf"unfinished parts.*{message}.*remove that folder"):
        in_parts(recipe, out, [2], count, **options)


def test_copies_of_the_inputs_on_each_machine_are_the_same_inputs(models, tmp_path):
    import shutil

    recipe = ties(models)
    in_parts(recipe, tmp_path / "out", [1], 2)
    for m in models:  # as a second machine has them: other times, other inodes
        shutil.copytree(m, tmp_path / "copy")
        shutil.rmtree(m)
        (tmp_path / "copy").rename(m)
        os.utime(Path(m) / "model.safetensors", ns=(5, 5))
    in_parts(recipe, tmp_path / "out", [2], 2)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_parts_and_whole_runs_keep_out_of_each_others_way(models, tmp_path, monkeypatch):
    recipe, out = ties(models), tmp_path / "out"
    in_parts(recipe, out, [1], 2)
    with pytest.raises(UsageError, match=r"done in parts; run the parts that are missing"):
        merge(recipe, out, device="cpu")
    assert not (tmp_path / "out.partial" / "lock").exists()
    merge(recipe, out, device="cpu", resume=False)
    with pytest.raises(UsageError, match="output exists already"):
        in_parts(recipe, out, [1], 2)
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match=r"not in parts.*finish it without --part"):
        in_parts(recipe, tmp_path / "other", [1], 2)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "-1/4", "1/4/2", "01/4", "a/b", "1/1000000", ""])
def test_what_is_no_part(text):
    with pytest.raises(UsageError, match=r"is not one.*1/4 for the first of four"):
        parse_part(text)


def test_no_part_discards_the_work_of_others(models, tmp_path):
    with pytest.raises(UsageError, match=r"cannot discard.*remove .*out\.partial"):
        in_parts(ties(models), tmp_path / "out", [1], 2, resume=False)


def test_a_part_whose_input_is_bad_leaves_the_others_alone(models, tmp_path):
    with pytest.raises(CheckpointError, match="no-such-model"):
        in_parts(ties([*models[:2], str(tmp_path / "no-such-model")]), tmp_path / "out", [1], 2)
    assert not (tmp_path / "out.partial").exists()


def test_stopped_parts_go_on_where_they_were(models, tmp_path, monkeypatch):
    from mergekit_lr.engine.execute import Worker

    recipe, out = ties(models, "tensor"), tmp_path / "out"
    merge(recipe, tmp_path / "whole", device="cpu")
    original, ran = Worker.run, []

    def failing(self, unit):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(unit)
        original(self, unit)

    monkeypatch.setattr(Worker, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        in_parts(recipe, out, [1], 1)
    monkeypatch.setattr(Worker, "run", lambda self, unit: (ran.append(unit), original(self, unit)))
    in_parts(recipe, out, [1], 1)
    assert len(ran) == len(SHAPES)
    assert files(out) == files(tmp_path / "whole")


Turns = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 1, 2, 3, 5, 8, 13])), max_size=60)


@pytest.fixture(scope="module")
def play(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interleaver]:
    action = ACTION.format(recipe=ties(models), more="", overwrite=True)
    interleaver = Interleaver(action, tmp_path_factory.mktemp("parts") / "work")
    yield interleaver
    interleaver.close()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(Turns, st.booleans())
def test_any_interleaving_of_four_parts_with_kills(play: Interleaver, schedule: Schedule, old: bool) -> None:
    play.play(schedule, old=old)


@pytest.mark.slow
def test_five_hundred_interleavings(play: Interleaver) -> None:
    import random

    rng, seen = random.Random(0), {"kills": 0, "steps": 0}
    for _ in range(500):
        turns = [(rng.randint(1, 4), rng.choice([0, 0, 1, 1, 2, 3, 5, 8, 13])) for _ in range(rng.randint(0, 120))]
        facts = play.play(turns, old=rng.random() < 0.5)
        seen = {k: seen[k] + facts[k] for k in seen}
    assert seen["kills"] > 1000
    print(seen)


@pytest.mark.slow
def test_interleaved_parts_of_a_method_that_prepares(tmp_path: Path) -> None:
    """Who prepares is killed in the middle of it, and the others wait or take over."""
    import random

    from safetensors.torch import save_file

    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    shapes = {"a.weight": (6, 8), "b.weight": (4, 16), "norm.weight": (8,)}
    save_file(draw(3, shapes=shapes), model / "model.safetensors", {"format": "pt"})
    more = "from tests.engine.toy_rewrite import registered\nregistered(setattr)"
    recipe = {"merge_method": "halves", "models": [{"model": str(model)}]}
    interleaver = Interleaver(ACTION.format(recipe=recipe, more=more, overwrite=True), tmp_path / "work")
    rng = random.Random(1)
    for _ in range(100):
        turns = [(rng.randint(1, 4), rng.choice([0, 1, 1, 2, 3, 5])) for _ in range(rng.randint(0, 80))]
        interleaver.play(turns, old=rng.random() < 0.5)
    interleaver.close()
