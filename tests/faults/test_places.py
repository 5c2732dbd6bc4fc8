"""Where an output may go: not into its inputs, not over what is there, not where it does not fit."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergekit_lr
from mergekit_lr import merge, verify
from mergekit_lr.checkpoint import fs
from mergekit_lr.errors import ResourceError, UsageError

from .jobs import ties

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Three inputs in ``inputs/``: m0, m1, m2."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    return ties(folder)


def state(folder: Path) -> dict[str, Any]:
    """Everything in a folder: names, content, times."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else None, p.lstat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
    }


def link(to: str, at: str) -> Callable[[Path], Path]:
    def make(t: Path) -> Path:
        (t / at).symlink_to(t / to)
        return t / at

    return make


def under_link(to: str, at: str, rest: str) -> Callable[[Path], Path]:
    return lambda t: link(to, at)(t) / rest


def work_folder_is_input(t: Path) -> Path:
    (t / "inputs" / "m1").rename(t / "inputs" / "x.partial")
    (t / "inputs" / "m1").symlink_to(t / "inputs" / "x.partial")
    return t / "inputs" / "x"


SPELLINGS: dict[str, Callable[[Path], Path]] = {
    "equal": lambda t: t / "inputs" / "m1",
    "equal, by dots": lambda t: t / "inputs" / "m2" / ".." / "m1",
    "equal, by a dot": lambda t: Path(f"{t}/inputs/./m1"),
    "equal, by slashes": lambda t: Path(f"{t}//inputs//m1/"),
    "equal, relative": lambda t: Path(os.path.relpath(t / "inputs" / "m1")),
    "equal, by a link": link("inputs/m1", "link"),
    "equal, by a link to a link": lambda t: (link("inputs/m1", "one")(t), link("one", "two")(t))[1],
    "equal, under a link": under_link("inputs", "all", "m1"),
    "inside": lambda t: t / "inputs" / "m1" / "out",
    "inside, by dots": lambda t: t / "inputs" / "m2" / ".." / "m1" / "out",
    "inside, under a link": under_link("inputs/m1", "link", "out"),
    "inside the base": lambda t: t / "inputs" / "m0" / "out",
    "around": lambda t: t / "inputs",
    "around, by dots": lambda t: t / "inputs" / "m1" / "..",
    "around, by a link": link("inputs", "link"),
    "its work folder is an input": work_folder_is_input,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_keeps_away_from_its_inputs(
    spelling: str, overwrite: bool, recipe: dict[str, Any], tmp_path: Path
) -> None:
    out = SPELLINGS[spelling](tmp_path)
    before = state(tmp_path)
    with pytest.raises(UsageError, match=r"(one of|holds one of|inside one of) the inputs|has no name"):
        merge(recipe, out, device="cpu", overwrite=overwrite)
    assert state(tmp_path) == before


def test_hard_links_to_an_input_are_that_input(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A single file as an input; the output's name is another name of it."""
    single = tmp_path / "single.safetensors"
    shutil.copy(tmp_path / "inputs" / "m1" / "model.safetensors", single)
    (tmp_path / "other").hardlink_to(single)
    one = {"merge_method": "linear", "models": [{"model": str(single), "parameters": {"weight": 1.0}}]}
    with pytest.raises(UsageError, match="one of the inputs"):
        merge(one, tmp_path / "other", device="cpu", overwrite=True)
    merge(one, tmp_path / "beside", device="cpu")  # the folder of a single file is not an input


def test_a_bind_mount_of_an_input_is_that_input(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    code = """
import sys, json
from mergekit_lr import merge
from mergekit_lr.errors import UsageError
for out in sys.argv[2:]:
    try:
        merge(json.loads(sys.argv[1]), out, device="cpu", overwrite=True)
    except UsageError as e:
        print(e.what)
"""
    said = mounted(f"mount --bind {tmp_path}/inputs/m1 {tmp_path}/mounted", code, json.dumps(recipe),
                   f"{tmp_path}/mounted", f"{tmp_path}/mounted/out")  # fmt: skip
    assert said == ["the output is one of the inputs", "the output would be inside one of the inputs"]


def mounted(mounting: str, code: str, *arguments: str) -> list[str]:
    """Lines that a program prints where something is mounted that nobody else sees."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    allowed = ["unshare", "--mount", "--propagation", "private"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    if subprocess.run([*allowed, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    command = [*allowed, "sh", "-c", f'{mounting} && exec "$0" "$@"', sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["..", ".", "/"])
def test_an_output_must_have_a_name(name: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        merge(recipe, name, device="cpu", overwrite=True)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_modes_are_those_that_the_user_asks_for(mask: int, recipe: dict[str, Any], tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        merge(recipe, tmp_path / "out", device="cpu", shard_size=25_000)
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path


def test_the_parent_must_be_there_and_a_folder(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "no" / "out", tmp_path / "file" / "out"):
        with pytest.raises(ResourceError, match="parent folder does not exist"):
            merge(recipe, out, device="cpu")


@pytest.mark.parametrize("how", ["whole", "part", "extract", "calibrate"])
def test_nothing_is_read_for_an_output_that_cannot_be_written(how: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Not a header: for a model of the Hub that would be a download."""
    m0, m1 = (str(tmp_path / "inputs" / f"m{i}") for i in range(2))
    out = tmp_path / "no" / "out"
    seen: list[str] = []
    fs.set_read_hook(lambda operation, path: seen.append(path))
    try:
        with pytest.raises(ResourceError, match="parent folder does not exist") as caught:
            if how == "extract":
                mergekit_lr.extract_lora(m1, m0, out, rank=2)
            elif how == "calibrate":
                mergekit_lr.calibrate(m1, f"{out}.safetensors", text=[tmp_path / "text.txt"])
            else:
                merge(recipe, out, device="cpu", part="1/2" if how == "part" else None)
    finally:
        fs.set_read_hook(None)
    assert caught.value.exit_code == 5
    assert seen == []


@pytest.mark.parametrize("length", [248, 256, 5000])
def test_a_name_that_is_too_long_is_an_error_with_a_way_out(
    length: int, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """248: the name itself would fit, that of the work folder does not."""
    with pytest.raises(ResourceError, match=r"File name too long.*choose a shorter name"):
        merge(recipe, tmp_path / ("x" * length), device="cpu")
    if length > 255:
        with pytest.raises(ResourceError, match=r"File name too long.*choose a shorter name"):
            merge(recipe, tmp_path / ("x" * length) / "out", device="cpu")


def test_a_folder_that_is_no_runs_is_let_be(recipe: dict[str, Any], tmp_path: Path) -> None:
    """It has the name of the work folder by chance: nothing is written there, and nothing removed."""
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for options in ({}, {"resume": False}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"holds 'thesis.txt' and is no run's.*choose another output"):
            merge(recipe, tmp_path / "out", device="cpu", **options)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    shutil.rmtree(other)
    other.write_bytes(b"a file")
    with pytest.raises(UsageError, match="something else is there"):
        merge(recipe, tmp_path / "out", device="cpu")
    other.unlink()
    other.symlink_to(tmp_path / "inputs")
    with pytest.raises(UsageError, match="something else is there"):
        merge(recipe, tmp_path / "out", device="cpu", resume=False)
    assert (tmp_path / "inputs" / "m0").is_dir()


def test_what_was_moved_aside_comes_back(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Killed between the two renames of --overwrite, and then started afresh: the old model is not thrown away."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"old")

    def stop(operation: str, path: str) -> None:
        if operation == "rename" and path == str(out):
            raise KeyboardInterrupt

    fs.set_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, out, device="cpu", overwrite=True)
    finally:
        fs.set_hook(None)
    assert not out.exists() and (tmp_path / "out.partial" / "replaced" / "old").exists()
    other = {**recipe, "seed": 5}
    with pytest.raises(UsageError, match="pass --restart"):
        merge(other, out, device="cpu", overwrite=True)

    def broken(operation: str, path: str) -> None:
        if operation == "append":
            raise OSError(5, "Input/output error")

    fs.set_hook(broken)
    try:
        with pytest.raises(ResourceError):
            merge(other, out, device="cpu", overwrite=True, resume=False)
    finally:
        fs.set_hook(None)
    assert (out / "old").read_bytes() == b"old"
    merge(other, out, device="cpu", overwrite=True)
    assert not verify(out).problems and not (tmp_path / "out.partial").exists()


READ_ONLY = """
import json, sys
from mergekit_lr import merge
from mergekit_lr.errors import ResourceError
try:
    merge(json.loads(sys.argv[1]), sys.argv[2], device="cpu")
except ResourceError as e:
    print(e.exit_code)
    print(e)
"""


def test_a_parent_that_is_mounted_read_only(recipe: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    code, said = mounted(f"mount -t tmpfs -o ro,size=1m none {place}", READ_ONLY, json.dumps(recipe), f"{place}/out")
    assert code == "5"
    assert "Read-only file system" in said and "choose a place that is not mounted read-only" in said


def test_a_parent_that_is_not_the_users() -> None:
    """As a user without rights; root would be let in."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        place, inputs = Path(folder) / "place", Path(folder) / "inputs"
        place.mkdir(mode=0o755)
        inputs.mkdir(mode=0o755)
        recipe = ties(inputs)
        for path in inputs.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        merge(recipe, Path(folder) / "once", device="cpu")  # imports what it needs
        pid = os.fork()
        if pid == 0:
            code = 0
            try:
                os.setgid(65534)
                os.setuid(65534)
                merge(recipe, place / "out", device="cpu", threads=1)
            except ResourceError as e:
                code = 7 if "Permission denied" in str(e) and "change its permissions" in str(e) else 8
            except BaseException:
                code = 9
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert list(place.iterdir()) == []


SMALL_DISKS = """
import json, os, pathlib, subprocess, sys
from mergekit_lr import merge, verify
from mergekit_lr.errors import ResourceError
recipe, place, need, sizes = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
wanted = pathlib.Path(sys.argv[5], "model.safetensors").read_bytes()
for percent in sizes:
    size = max(1, need * percent // 100 // 4096) * 4096  # no size is no limit
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    out = pathlib.Path(place, "out")
    said = ""
    try:
        merge(recipe, out, device="cpu", threads=1)
    except ResourceError as e:
        said = str(e)
        assert e.exit_code == 5 and e.fix and not out.exists(), said
        subprocess.run(["mount", "-o", f"remount,size={4 * need}", place], check=True)
        merge(recipe, out, device="cpu", threads=1)
    assert (out / "model.safetensors").read_bytes() == wanted and not verify(out).problems
    assert [p.name for p in pathlib.Path(place).iterdir()] == ["out"]
    print(json.dumps([percent, said]))
    subprocess.run(["umount", place], check=True)
"""


def small_disks(recipe: dict[str, Any], tmp_path: Path, sizes: list[int]) -> list[tuple[int, str]]:
    merge(recipe, tmp_path / "whole", device="cpu", threads=1)
    files = [p.stat().st_size for p in (tmp_path / "whole").rglob("*")]
    need = sum(-(-n // 4096) * 4096 for n in files) + 4 * 4096  # the files, plan.json, journal, lock
    (tmp_path / "place").mkdir()
    lines = mounted("true", SMALL_DISKS, json.dumps(recipe), str(tmp_path / "place"), str(need), json.dumps(sizes),
                    str(tmp_path / "whole"))  # fmt: skip
    found = [(percent, said) for percent, said in map(json.loads, lines)]
    assert [p for p, _ in found] == sizes
    print({"sizes": len(found), "refused at first": sum(bool(said) for _, said in found)})
    return found


def test_a_disk_that_is_too_small(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = dict(small_disks(recipe, tmp_path, [40, 85, 120]))
    assert "bytes more" in found[40] and "are free" in found[40] and "free some space" in found[40]
    assert found[85]
    assert not found[120]


@pytest.mark.slow
def test_disks_of_25_sizes(recipe: dict[str, Any], tmp_path: Path) -> None:
    sizes = [round(5 + i * 115 / 24) for i in range(25)]
    found = small_disks(recipe, tmp_path, sizes)
    assert len(found) == 25 and found[0][1] and not found[-1][1]


def test_the_free_space_is_looked_at_before_anything_is_written(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(recipe, tmp_path / "whole", device="cpu")
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    real = os.statvfs(tmp_path)

    def full(free: int) -> Callable[[Any], Any]:
        values = list(real)
        values[1], values[4] = 1, free  # f_frsize, f_bavail
        return lambda path: os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full(size))  # enough for the file, but not for two hundredths more
    with pytest.raises(ResourceError) as caught:
        merge(recipe, tmp_path / "out", device="cpu")
    assert f"{size + size // 50} bytes more" in str(caught.value) and f"{size} bytes" in caught.value.why
    assert not list((tmp_path / "out.partial" / "model").iterdir())
    monkeypatch.setattr(os, "statvfs", full(size + size // 50))
    merge(recipe, tmp_path / "out", device="cpu")
