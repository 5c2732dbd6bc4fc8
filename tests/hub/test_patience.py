"""What is asked of the Hub again and what is not, how long it is waited for, and what a refusal says."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from mergekit_lr.checkpoint import retry
from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.checkpoint.retry import ATTEMPTS, LONGEST_PAUSE, MOST_PATIENCE, Interrupted, offline, patiently
from mergekit_lr.errors import CheckpointError, ResourceError

from ..hub_server import Fault, Hub, Runner
from .test_models import PROGRAM, ask, sharded

PLACE = Place("org/name")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses, which take no time here."""
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    return pauses


def failing(*errors: Exception) -> Callable[[], int]:
    """A request that fails in these ways, one after the other, and then says how often it was made."""
    left = list(errors)

    def call() -> int:
        if left:
            raise left.pop(0)
        return len(errors) + 1

    return call


def test_what_the_hub_client_finds_wrong_with_a_file_passes(slept: list[float]) -> None:
    """Its own checks raise an OSError without a number: a file that came short, an answer that makes no sense."""
    assert patiently(PLACE, failing(OSError("Consistency check failed"), Interrupted("cut"))) == 3
    assert slept == [1.0, 2.0]


def test_pauses_double_up_to_the_longest_and_the_last_reason_is_told(slept: list[float]) -> None:
    with pytest.raises(ResourceError) as caught:
        patiently(PLACE, failing(*(Interrupted(f"only {i} bytes came") for i in range(ATTEMPTS))), doing="get a file")
    assert slept == [min(2.0**i, LONGEST_PAUSE) for i in range(ATTEMPTS - 1)]
    e = caught.value
    assert (e.what, e.where, e.why) == ("cannot get a file", "org/name", f"only {ATTEMPTS - 1} bytes came; 6 attempts")
    assert "run the same command again" in str(e.fix)


def test_an_error_of_ours_is_the_answer(slept: list[float]) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        patiently(PLACE, failing(CheckpointError("damaged")))
    assert slept == []


def test_a_mistake_in_a_program_is_not_called_a_refusal(slept: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        patiently(PLACE, lambda: 1 // 0)
    assert slept == []


def test_a_full_disk_is_not_waited_for(slept: list[float]) -> None:
    with pytest.raises(ResourceError) as caught:
        patiently(PLACE, failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert slept == [] and caught.value.why == "its files could not be stored (No space left on device)"
    assert caught.value.fix == "check the cache's disk"


def test_a_cache_that_cannot_be_written_is_told_apart_from_a_hub_that_refuses(
    hub: Hub, runner: Runner, tmp_path: Path
) -> None:
    hub.add("org/name", sharded())
    (tmp_path / "hub").write_bytes(b"a file where the cache should be")
    (answer,) = ask(runner, tmp_path, "org/name")
    assert answer["code"] == 5 and "its files could not be stored" in answer["error"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, 4, "the Hub refused (403)"),
        (400, 4, "the Hub answered 400"),
        (451, 4, "the Hub answered 451"),
    ],
)
def test_a_refusal_names_its_status_and_what_to_check(
    hub: Hub, runner: Runner, tmp_path: Path, status: int, code: int, message: str
) -> None:
    hub.add("org/name", sharded())
    hub.faults.append(Fault("api/models", times=100, status=status))
    (answer,) = ask(runner, tmp_path, ("org/name", {"headers_only": True}))
    assert answer["code"] == code and message in answer["error"]
    assert ("HF_TOKEN" in answer["error"]) == (status == 403)
    assert hub.count("GET /api/models") == 1


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("7", 7, 7),
        ("1.5", 1.5, 1.5),
        ("100000", MOST_PATIENCE, MOST_PATIENCE),
        ("soon", 0, 1),  # no time at all: the usual pause
        (timedelta(seconds=100), 40, 100),
        (timedelta(days=-1), 0, 1),
    ],
    ids=["seconds", "a fraction", "too long", "nonsense", "a date", "a date that has passed"],
)
def test_how_long_a_server_is_waited_for(
    hub: Hub, runner: Runner, tmp_path: Path, asked: str | timedelta, least: float, most: float
) -> None:
    hub.add("org/name", sharded())
    if isinstance(asked, timedelta):
        asked = format_datetime(datetime.now(UTC) + asked, usegmt=True)
    hub.faults.append(Fault("api/models", times=1, status=429, headers={"Retry-After": asked}))
    program = PROGRAM.replace("import json, sys", "import json, sys, time\nslept = []\ntime.sleep = slept.append")
    done = runner.run(
        tmp_path, program + "print(json.dumps(slept))", json.dumps([("org/name", {"headers_only": True})])
    )
    assert done.returncode == 0, done.stderr
    [pause] = json.loads(done.stdout.splitlines()[-1])
    assert least <= pause <= most
    assert "error" not in json.loads(done.stdout.splitlines()[0])[0]


OFFLINE = """
import os, sys
from mergekit_lr.checkpoint.retry import is_offline, offline
early, wanted = sys.argv[1:]
if early == "early":
    import huggingface_hub.constants
with offline(wanted == "offline"):
    inside = is_offline(), os.environ.get("HF_HUB_OFFLINE")
print(*inside, is_offline(), os.environ.get("HF_HUB_OFFLINE"))
"""


@pytest.mark.parametrize("early", ["early", "late"], ids=["imported before", "imported within"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "False None"), ("1", "True 1"), ("0", "False 0"), ("", "False "), ("yes", "True yes"), ("no", "False no")],
    ids=["unset", "1", "0", "empty", "yes", "no"],
)
def test_offline_lasts_as_long_as_it_should_and_leaves_the_setting_as_it_was(
    early: str, before: str | None, after: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {} if before is None else {"HF_HUB_OFFLINE": before}
    command = [sys.executable, "-c", OFFLINE, early, "offline"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.rstrip("\n") == f"True 1 {after}"


def test_offline_where_nobody_asks_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with offline(True):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert not any(n.partition(".")[0] == "huggingface_hub" for n in sys.modules)  # a merge of local models needs none
