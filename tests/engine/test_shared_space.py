"""The workspace of several machines, where they come between one another."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mergekit_lr.checkpoint import fs
from mergekit_lr.engine import shared_space
from mergekit_lr.engine.shared_space import Finished, SharedSpace
from mergekit_lr.errors import ResourceError, UsageError


@pytest.fixture
def hook() -> Iterator[Callable[[Callable[[str, str], None]], None]]:
    yield fs.set_hook
    fs.set_hook(None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_space, "POLL", 0.01)


def space(tmp_path: Path, number: int = 1) -> SharedSpace:
    made = SharedSpace(tmp_path / "out", number=number, count=2)
    made.fingerprint = {"recipe": "r", "parts": 2}
    return made


def joined(tmp_path: Path, number: int = 1) -> SharedSpace:
    made = space(tmp_path, number)
    made.join()
    return made


def output(folder: Path, digest: str) -> None:
    folder.mkdir()
    (folder / "merge_report.json").write_text(json.dumps({"fingerprint": digest}))


def elsewhere(beat: int) -> str:
    return json.dumps({"pid": 1, "host": "elsewhere", "token": "other", "beat": beat})


def never(folder: Path) -> None:
    pytest.fail("made although another is at it")


def test_who_makes_something_shows_that_it_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_space, "BEAT", 0.01)
    a, beats = joined(tmp_path), set()

    def make(folder: Path) -> None:
        until = time.monotonic() + 20
        while len(beats) < 3 and time.monotonic() < until:
            try:
                beats.add(json.loads((a.root / "claim-model").read_bytes())["beat"])
            except ValueError:  # it is being written
                continue
        (folder / "x").write_text("made")

    assert (a.once("model", make) / "x").read_text() == "made"
    assert len(beats) == 3
    claim = (a.root / "claim-model").read_bytes()
    time.sleep(0.05)
    assert (a.root / "claim-model").read_bytes() == claim  # and is silent afterwards


def test_what_another_machine_makes_is_waited_for(tmp_path: Path) -> None:
    b = joined(tmp_path, 2)
    (b.root / "claim-model").write_text(elsewhere(0))

    def arrive() -> None:
        (b.root / "model-other").mkdir()
        (b.root / "model-other" / "x").write_text("theirs")
        (b.root / "model-other").rename(b.root / "model")

    later = threading.Timer(0.05, arrive)
    later.start()
    assert (b.once("model", never) / "x").read_text() == "theirs"
    later.join()


def test_who_waits_ends_when_the_output_is_complete(tmp_path: Path) -> None:
    b = joined(tmp_path, 2)
    (b.root / "claim-model").write_text(elsewhere(0))
    later = threading.Timer(0.05, output, (b.out, b.digest))
    later.start()
    with pytest.raises(Finished):
        b.once("model", never)
    later.join()


def test_an_output_that_is_finished_while_we_join_ends_it(tmp_path: Path, hook) -> None:
    made = space(tmp_path)
    hook(lambda operation, path: None if made.out.exists() else output(made.out, made.digest))
    with pytest.raises(Finished):
        made.join()


def test_a_claim_that_is_never_written_to_its_end_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_space, "PATIENCE", 0.1)
    b = joined(tmp_path, 2)
    (b.root / "claim-model").write_text('{"pid": 1, "ho')
    began = time.monotonic()
    b.once("model", lambda folder: (folder / "x").touch())
    assert time.monotonic() - began >= 0.1
    assert json.loads((b.root / "claim-model").read_bytes())["token"] == b.token


def test_what_a_dead_process_left_goes_to_one_of_those_that_take_it(tmp_path: Path, hook) -> None:
    a, b = joined(tmp_path), joined(tmp_path, 2)
    dead = {**json.loads(a._claim(0)), "began": "1", "token": "dead"}
    (a.root / "claim-model").write_text(json.dumps(dead))
    (a.root / "model-dead").mkdir()
    (a.root / "model-dead" / "half").write_text("half")

    def sooner(operation: str, path: str) -> None:
        if operation == "rename":  # another one has it, and is ready before we look again
            hook(None)
            (a.root / "model-dead").rename(a.root / "model-a")
            (a.root / "model-a").rename(a.root / "model")

    hook(sooner)
    assert (b.once("model", never) / "half").read_text() == "half"


def test_a_part_that_was_done_twice_is_noted_once(tmp_path: Path) -> None:
    first, second = joined(tmp_path), joined(tmp_path)
    first.mark_done([{"unit": "a@0", "chunks": ["1"]}], ["remark"])
    second.mark_done([{"unit": "a@0", "chunks": ["1"]}], ["remark"])
    joined(tmp_path, 2).mark_done([{"unit": "b@0", "chunks": ["2"]}], ["remark"])
    done, warnings = second.records()
    assert {u: r["chunks"] for u, r in done.items()} == {"a@0": ["1"], "b@0": ["2"]} and warnings == ["remark"]
    assert sorted(p.name for p in first.root.glob("done-*")) == ["done-1", "done-2"]
    assert second.missing() == ()


def model(made: SharedSpace) -> None:
    made.model.mkdir()
    (made.model / "model.safetensors").write_text("new")


def test_an_old_output_that_cannot_be_moved_stays(tmp_path: Path, hook) -> None:
    made = joined(tmp_path)
    model(made)
    output(made.out, "an older run's")

    def refuse(operation: str, path: str) -> None:
        if operation == "rename" and "-replaced-" in path:
            raise PermissionError(13, "Permission denied")

    hook(refuse)
    with pytest.raises(ResourceError, match="Permission denied"):
        made.commit_parts({"merge_report.json": b"{}"}, overwrite=True)
    assert json.loads((made.out / "merge_report.json").read_bytes())["fingerprint"] == "an older run's"
    assert (made.model / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("meanwhile", ["moved", "replaced"])
def test_an_old_output_that_another_part_replaces_at_the_same_moment(meanwhile: str, tmp_path: Path, hook) -> None:
    made = joined(tmp_path)
    model(made)
    output(made.out, "an older run's")
    report = json.dumps({"fingerprint": made.digest}).encode()

    def sooner(operation: str, path: str) -> None:
        if operation == "rename" and "-replaced-" in path:
            hook(None)
            shutil.rmtree(made.out)
            if meanwhile == "replaced":
                made.model.rename(made.out)

    hook(sooner)
    made.commit_parts({"merge_report.json": report}, overwrite=True)
    assert (made.out / "merge_report.json").read_bytes() == report
    assert (made.out / "model.safetensors").read_text() == "new"
    made.tidy()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_finished_model_that_is_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_space, "PATIENCE", 0.05)
    made = joined(tmp_path)
    with pytest.raises(ResourceError, match=r"finished model is not where it was.*run all parts again"):
        made.await_output()
    later = threading.Timer(0.02, output, (made.out, made.digest))
    later.start()
    made.await_output()
    later.join()


def test_tidying_bears_others_that_still_write(tmp_path: Path, hook) -> None:
    made, failed = joined(tmp_path), []

    def busy(operation: str, path: str) -> None:
        if operation == "rmdir" and path == str(made.root) and len(failed) < 2:
            failed.append(path)
            raise OSError(39, "Directory not empty")

    hook(busy)
    made.tidy()
    assert len(failed) == 2 and not made.root.exists()


def test_tidying_gives_up_quietly_where_it_cannot(tmp_path: Path, hook) -> None:
    """The output is there already; what is left beside it is no reason to call the run failed."""
    made, failed = joined(tmp_path), []

    def refuse(operation: str, path: str) -> None:
        failed.append(path)
        raise PermissionError(13, "Permission denied")

    hook(refuse)
    made.tidy()
    assert len(failed) == 3 and made.root.exists()


def test_a_run_of_the_whole_merge_keeps_parts_out(tmp_path: Path) -> None:
    made = space(tmp_path)
    made.root.mkdir()
    (made.root / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match=r"not in parts.*finish it without --part"):
        made.join()
