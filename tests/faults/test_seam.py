"""Everything that changes a file goes through `mergekit_lr.checkpoint.fs`, and what that does when calls fall short.

Temporary folders (`tempfile.TemporaryDirectory`) are nobody's output: they may be made and removed anywhere.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mergekit_lr
from mergekit_lr.checkpoint import fs
from mergekit_lr.engine.journal import Journal
from mergekit_lr.errors import ResourceError

PACKAGE = Path(mergekit_lr.__file__).parent
CHANGING = {
    # os and pathlib
    *("renames", "unlink", "rmdir", "removedirs", "mkdir", "makedirs", "symlink", "symlink_to", "hardlink_to", "touch"),
    *(
        "chmod",
        "truncate",
        "ftruncate",
        "pwrite",
        "pwritev",
        "writev",
        "write_text",
        "write_bytes",
        "fsync",
        "sendfile",
    ),
    "posix_fallocate",
    # shutil and tempfile
    *("rmtree", "copy2", "copyfile", "copytree", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"),
    # libraries that write files themselves
    *("save_file", "save_pretrained", "savez", "tofile", "to_csv", "to_parquet", "imsave", "memmap"),
}
ALLOWED = {
    "checkpoint/fs.py": "the seam itself",
    "checkpoint/pickle.py": "a child process, fenced in, writes a private copy of its input",
    "curvatures/distributed.py": "the same for training checkpoints",
    "engine/stages.py": "the small files of a stage that is computed on the way, in a temporary folder",
    "curvatures/state.py": "makes and removes the folder of such a copy",
}


def changes(source: str) -> list[str]:
    """Calls that may create, change, rename or remove a file, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if name.startswith("fs.") or "os.devnull" in ast.unparse(node):
            continue
        if last in ("open", "fdopen"):
            changing = _opens_for_writing(node, name)
        elif last in ("copy", "copy_", "replace", "move", "write", "link", "remove", "rename"):
            changing = _on_a_file(node, name, last)
        elif last == "save":
            changing = name.split(".")[0] in ("torch", "np", "numpy")
        elif last == "savefig":
            changing = (
                f"{ast.unparse(node.args[0])} = io.BytesIO()" not in source
            )  # drawn in memory, written by the seam
        else:
            changing = last in CHANGING
        if changing:
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def _opens_for_writing(node: ast.Call, name: str) -> bool:
    given = [*node.args, *(k.value for k in node.keywords)]
    if name == "os.open":
        return any(flag in ast.unparse(node) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC"))
    texts = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return any(set(t) <= set("rwxabt+") and set(t) & set("wxa+") for t in texts)


def _on_a_file(node: ast.Call, name: str, last: str) -> bool:
    """These are also methods of other things: strings replace, tensors copy, lists remove."""
    first = name.split(".")[0]
    if first in ("os", "shutil"):
        return not (last == "write" and isinstance(node.args[0], ast.Constant) and node.args[0].value == 2)
    if last in ("replace", "rename") and len(node.args) == 1 and not node.keywords:  # a path's; a string's takes two
        return first not in ("dataclasses",) and not name.startswith("replace")
    return False


def sources() -> list[Path]:
    return sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "methods").rglob("*.py")})  # rglob does not follow the link


def test_files_are_changed_in_one_place() -> None:
    found = {p.relative_to(PACKAGE).as_posix(): changes(p.read_text()) for p in sources()}
    assert {name: calls for name, calls in found.items() if calls and name not in ALLOWED} == {}
    assert sorted(n for n in ALLOWED if not found[n]) == [], "an exception that is no longer needed"
    assert any(n.startswith("methods/") for n in found)


@pytest.mark.parametrize(
    "line",
    [
        *("open(p, 'w')", "p.open(mode='ab')", "Path(p).write_text('x')", "os.replace(a, b)", "a.rename(b)"),
        *("shutil.move(a, b)", "torch.save(x, p)", "save_file(t, p)", "figure.savefig(path)", "os.open(p, os.O_RDWR)"),
        *("os.unlink(p)", "p.unlink()", "tempfile.mkdtemp()", "model.save_pretrained(p)", "p.mkdir()", "p.replace(q)"),
    ],
)
def test_the_scan_sees_what_it_should(line: str) -> None:
    assert changes(line)


@pytest.mark.parametrize(
    "line", ["open(p, 'rb')", "t.copy_(u)", "'a'.replace('b', 'c')", "replace(x, a=1)", "p.open('rb')"]
)
def test_the_scan_lets_other_things_be(line: str) -> None:
    assert not changes(line)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every write takes three bytes at most, as a signal or a full disk may have it."""
    sizes: list[int] = []
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(n := write(fd, data[:3])) or n)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: sizes.append(n := pwrite(fd, data[:3], at)) or n)
    return sizes


def test_short_writes_are_gone_on_with(short: list[int], tmp_path: Path) -> None:
    fs.write_file(tmp_path / "a", b"0123456789")
    assert fs.create_whole(tmp_path / "b", b"0123456789")
    assert not fs.create_whole(tmp_path / "b", b"other")
    fs.preallocate(tmp_path / "c", 12)
    fd = fs.open_for_writing(tmp_path / "c")
    fs.pwrite(fd, memoryview(b"0123456789"), 1, tmp_path / "c")
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"0123456789"
    assert (tmp_path / "c").read_bytes() == b"\x000123456789\x00"
    assert max(short) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_journal_line_that_was_torn_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, not its rest: another process may have appended in between."""
    path, write, calls = tmp_path / "journal", os.write, []

    def torn(fd: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            n = write(fd, data[:7])
            Journal.record(other, {"unit": "theirs"})
            return n
        return write(fd, data)

    other, journal = Journal(path), Journal(path)
    monkeypatch.setattr(os, "write", torn)
    journal.record({"unit": "ours"})
    assert set(Journal(path).done) == {"ours", "theirs"}


def test_a_disk_that_never_takes_a_whole_line_is_an_error(short: list[int], tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot append \(only a part of it is written each time\)"):
        fs.append(tmp_path / "journal", b"0123456789")
    assert len(short) == 5


OPERATIONS = {
    "make_folder": lambda p: fs.make_folder(p / "new"),
    "create_whole": lambda p: fs.create_whole(p / "new", b"x"),
    "preallocate": lambda p: fs.preallocate(p / "new", 5),
    "open_for_writing": lambda p: os.close(fs.open_for_writing(p / "old")),
    "append": lambda p: fs.append(p / "new", b"x"),
    "write_file": lambda p: fs.write_file(p / "new", b"x"),
    "fsync": lambda p: fs.fsync(p / "old"),
    "rename": lambda p: fs.rename(p / "old", p / "new"),
    "remove_file": lambda p: fs.remove_file(p / "old"),
    "remove_tree": lambda p: fs.remove_tree(p / "folder"),
    "remove_if_empty": lambda p: fs.remove_if_empty(p / "folder"),
    "try_lock": lambda p: os.close(fs.try_lock(p / "new")),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_can_be_failed_and_says_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    seen = []

    def count(operation: str, path: str) -> None:
        seen.append(operation)

    fs.set_hook(count)
    try:
        OPERATIONS[name](tmp_path)
        for k in range(1, len(seen) + 1):
            for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS):
                work = tmp_path / f"{k}-{code}"
                (work / "folder" / "deep").mkdir(parents=True)
                (work / "old").write_bytes(b"old")
                left = [k]

                def fail(operation: str, path: str, left: list[int] = left, code: int = code) -> None:
                    left[0] -= 1
                    if left[0] == 0:
                        raise OSError(code, os.strerror(code))

                fs.set_hook(fail)
                if seen[k - 1] == "unlink" and name == "create_whole":
                    continue  # its draft goes with its folder
                with pytest.raises(ResourceError) as caught:
                    OPERATIONS[name](work)
                e = caught.value
                assert e.exit_code == 5 and e.what and str(work) in e.where and e.why == os.strerror(code) and e.fix
    finally:
        fs.set_hook(None)


def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_bytes(b"x")
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "deep" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    fs.remove_tree(tmp_path / "work")
    fs.remove_tree(tmp_path / "link")
    fs.remove_tree(tmp_path / "nothing")
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious" / "x").read_bytes() == b"x"


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from mergekit_lr.checkpoint import fs
print(fs.try_lock(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() != b"None"
    assert fs.try_lock(path) is None
    holder.kill()
    holder.communicate()
    fd = fs.try_lock(path)
    assert fd is not None
    path.unlink()
    again = fs.try_lock(path)  # another file: the first lock is of one that is gone
    assert again is not None and fs.is_at(again, path) and not fs.is_at(fd, path)
    os.close(fd)
    os.close(again)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_where_there_are_no_hard_links_a_whole_file_is_renamed_to_its_place(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(code))
    assert fs.create_whole(tmp_path / "a", b"0123456789")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"0123456789"


def test_another_failure_to_link_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EIO))
    with pytest.raises(ResourceError, match="cannot create the file"):
        fs.create_whole(tmp_path / "a", b"0123456789")
    assert list(tmp_path.iterdir()) == []


def failing(code: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_where_blocks_cannot_be_reserved_a_file_still_has_its_size(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(code))
    fs.preallocate(tmp_path / "a", 12)
    assert (tmp_path / "a").read_bytes() == bytes(12)


def test_a_disk_without_the_blocks_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(ResourceError, match=r"cannot reserve 12 bytes \(No space left on device\)"):
        fs.preallocate(tmp_path / "a", 12)


def test_a_file_of_no_bytes_can_be_preallocated_and_an_old_one_is_cut(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"0123456789")
    for name in ("old", "new"):
        fs.preallocate(tmp_path / name, 0)  # the system call itself refuses to reserve nothing
        assert (tmp_path / name).read_bytes() == b""


def test_only_a_place_that_is_taken_makes_moving_a_matter_of_chance(tmp_path: Path) -> None:
    """A folder cannot go into itself: that is no race that somebody won."""
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "theirs" / "deep").mkdir(parents=True)
    assert not fs.move(tmp_path / "mine", tmp_path / "theirs")
    assert not fs.move(tmp_path / "none", tmp_path / "new")
    with pytest.raises(ResourceError, match="cannot rename mine"):
        fs.move(tmp_path / "mine", tmp_path / "mine" / "deep" / "new")
    assert fs.move(tmp_path / "mine", tmp_path / "new") and (tmp_path / "new" / "deep").is_dir()


def test_what_is_gone_with_its_parent_need_not_be_removed(tmp_path: Path) -> None:
    fs.remove_tree(tmp_path / "none" / "deep")
    fs.remove_if_empty(tmp_path / "none" / "deep")
    (tmp_path / "full" / "x").mkdir(parents=True)
    fs.remove_if_empty(tmp_path / "full")
    assert (tmp_path / "full" / "x").is_dir()


def test_only_folders_are_removed_where_they_are_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot remove"):
        fs.remove_if_empty(tmp_path / "file")
    assert (tmp_path / "file").exists()


def descriptors() -> set[str]:
    return {p.name for p in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_where_there_are_no_locks_the_descriptor_comes_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", failing(code))
    fd = fs.try_lock(tmp_path / "lock")
    assert fd is not None and fs.is_at(fd, tmp_path / "lock")
    os.close(fd)


def test_a_lock_that_cannot_be_asked_for_is_an_error_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    before = descriptors()
    with pytest.raises(ResourceError, match="cannot lock"):
        fs.try_lock(tmp_path / "lock")
    assert descriptors() == before


def test_a_lock_of_a_file_that_its_last_holder_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening the file and our locking it the holder may finish, and take the file with it."""
    path, flock, taken = tmp_path / "lock", fcntl.flock, []

    def late(fd: int, how: int) -> None:
        taken.append(fd)
        if len(taken) == 1:
            path.unlink()  # gone
        if len(taken) == 2:
            path.rename(tmp_path / "moved")  # and another one made in its place
            path.touch()
        flock(fd, how)

    monkeypatch.setattr("fcntl.flock", late)
    before = descriptors()
    fd = fs.try_lock(path)
    assert fd is not None and len(taken) == 3 and fs.is_at(fd, path)
    assert len(descriptors() - before) == 1
    monkeypatch.undo()
    assert fs.try_lock(path) is None
    os.close(fd)
