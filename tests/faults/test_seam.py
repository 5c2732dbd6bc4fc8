"""Everything that changes a file goes through `mergekit_lr.checkpoint.fs`, and what that does when calls fall short.

Temporary folders (`tempfile.TemporaryDirectory`) are nobody's output: they may be made and removed anywhere.
"""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

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
