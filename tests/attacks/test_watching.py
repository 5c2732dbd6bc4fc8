"""The watcher of the whole session sees what it must: otherwise its silence would mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

EVIL = {
    "imported": "import sys; sys.path.insert(0, {folder!r}); import evil_code",
    "run": "import runpy; runpy.run_path({folder!r} + '/evil_code.py')",
    "compiled": "compile(open({folder!r} + '/evil_code.py').read(), {folder!r} + '/evil_code.py', 'exec')",
    "in a fork": "import os, runpy\nos.fork() or (runpy.run_path({folder!r} + '/evil_code.py'), os._exit(0))\n"
    "os.wait()",
    "swallowed": "import runpy\ntry: runpy.run_path({folder!r} + '/evil_code.py')\nexcept BaseException: pass",
    "connected": "import socket\ns = socket.socket()\ns.settimeout(0.01)\n"
    "try: s.connect(('192.0.2.1', 9))\nexcept OSError: pass",
}  # fmt: skip


@pytest.mark.parametrize("how", EVIL)
def test_it_sees(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "evil_code.py").write_text("x = 1\n")
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from watching import watch
watch(Path({str(tmp_path / "log")!r}))
{EVIL[how].format(folder=str(folder))}
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    found = (tmp_path / "log").read_text()
    assert ("192.0.2.1" if how == "connected" else "evil_code.py") in found


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_finding_fails_the_session_whichever_process_it_is_in(processes: str, tmp_path: Path) -> None:
    probe = tmp_path / "test_probe.py"
    connect = "with socket.socket() as s, contextlib.suppress(OSError):\n        s.settimeout(0.01)\n"
    probe.write_text(f"import contextlib, socket\ndef test_it():\n    {connect}        s.connect(('192.0.2.1', 9))\n")
    options = ["-q", "-n", processes, "-p", "tests.conftest", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(probe)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert "1 passed" in run.stdout
    assert run.stdout.count("FORBIDDEN: connected to ('192.0.2.1', 9)") == 1


def test_own_code_is_no_finding(watch_log: Path, tmp_path: Path) -> None:
    from ..watching import foreign_address, in_model_folder

    assert not in_model_folder(__file__) and not in_model_folder(str(ROOT / "mergekit_lr" / "errors.py"))
    assert not in_model_folder("<string>") and not in_model_folder(str(ROOT / "examples" / "zoo" / "build.py"))
    assert in_model_folder(str(ROOT / "examples" / "models" / "base" / "modeling.py"))
    assert (
        not foreign_address(("127.0.0.1", 80))
        and not foreign_address("/run/socket")
        and foreign_address(("10.1.1.1", 1))
    )
    assert watch_log.exists()
