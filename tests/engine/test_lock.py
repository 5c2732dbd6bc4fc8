"""The lock of a folder: whose it is, and what happens to it when others come between."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergekit_lr.checkpoint import fs
from mergekit_lr.engine.lock import FolderLock, began, is_alive, this_process
from mergekit_lr.errors import ResourceError, UsageError


@pytest.fixture
def hooked() -> Iterator[None]:
    yield
    fs.set_hook(None)


def test_a_folder_that_its_last_holder_removes_this_moment_is_made_again(tmp_path: Path, hooked: None) -> None:
    lock, gone = FolderLock(tmp_path / "work" / "lock"), []

    def tidy(operation: str, path: str) -> None:
        if operation == "lock" and len(gone) < 3:
            gone.append(path)
            shutil.rmtree(tmp_path / "work")

    fs.set_hook(tidy)
    lock.take()
    assert len(gone) == 3
    assert json.loads((tmp_path / "work" / "lock").read_bytes()) == this_process()
    lock.release()


def test_a_file_system_that_refuses_is_an_error_at_once(tmp_path: Path, hooked: None) -> None:
    tries = []

    def refuse(operation: str, path: str) -> None:
        if operation == "lock":
            tries.append(path)
            raise PermissionError(13, "Permission denied")

    fs.set_hook(refuse)
    with pytest.raises(ResourceError, match=r"cannot lock.*Permission denied.*choose a place you may write to"):
        FolderLock(tmp_path / "work" / "lock").take()
    assert len(tries) == 1


def test_another_machines_lock_says_what_to_do_if_that_machine_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "work" / "lock"
    path.parent.mkdir()
    path.write_text(json.dumps({**this_process(), "pid": 4711, "host": "elsewhere"}))
    with pytest.raises(UsageError, match="process 4711 on elsewhere") as e:
        FolderLock(path).take()
    assert e.value.fix.endswith(f"if that machine is gone remove {path}")
    assert json.loads(path.read_bytes())["host"] == "elsewhere"


def test_a_lock_that_is_not_held_removes_nothing(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "lock"), FolderLock(tmp_path / "lock")
    first.take()
    second.release()
    assert first.held and (tmp_path / "lock").exists()
    first.release()
    assert not first.held and not (tmp_path / "lock").exists()
    (tmp_path / "lock").write_text("of the next one")
    first.release()
    assert (tmp_path / "lock").read_text() == "of the next one"


def test_a_file_that_replaced_ours_is_left_to_its_owner(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "lock")
    lock.take()
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").write_text("another's")
    lock.release()
    assert (tmp_path / "lock").read_text() == "another's"


def test_another_users_process_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so by refusing the signal; whose it is, and so when it began, is not asked."""

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    assert is_alive({**this_process(), "began": "another time"})


def test_a_pid_that_was_given_anew_is_not_its_former_owner() -> None:
    assert is_alive(this_process())
    assert not is_alive({**this_process(), "began": "1"})
    assert not is_alive({**this_process(), "boot": "an earlier one"})


def test_a_process_that_is_gone_has_no_beginning() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert began(child) == "" != began(os.getpid())
    assert not is_alive({**this_process(), "pid": child, "host": socket.gethostname()})
