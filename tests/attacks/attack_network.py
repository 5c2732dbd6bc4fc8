"""Inputs that make a program reach out, or say more than it should (rows 32, 34)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from staging import CONFIG, attack, main, model

TOKEN = "hf_" + "CANARY" * 6

COMMANDS = """
import json, sys
reached = []
def hook(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        reached.append((event, str(arguments[-1:])))
sys.addaudithook(hook)
from mergekit_lr.checkpoint import retry
from mergekit_lr.cli import main
retry.FIRST_PAUSE = 0.01
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as e:
        print("LEFT", e.code, flush=True)
print("REACHED", reached)
"""


def run(room: Path, *commands: list[str], **environment: str) -> tuple[list[int], str]:
    """Commands, with a token in the environment; their exit codes, and everything that was said."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True, text=True, check=False, cwd=room, timeout=300,
        env={**kept, "HF_TOKEN": TOKEN, "HF_HOME": str(room / "hub"), "MERGEKIT_LR_DEBUG": "1", **environment},
    )  # fmt: skip
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("LEFT ")]
    return codes, done.stdout + done.stderr


@attack(32)
def sockets(room: Path) -> str:
    """local models whose paths read like Hub ids, and a token in the environment: nothing is reached or told"""
    hostile = {**CONFIG, "_name_or_path": "evil/model", "auto_map": {"AutoConfig": "evil/model--m.C"}}
    for name in "ab":
        folder = model(room / "org" / name, config=hostile)
        (folder / "README.md").write_text(
            "---\nlicense: mit\nbase_model: evil/model\n---\n![x](https://evil.example)\n"
        )
    (room / "r.yml").write_text(
        "merge_method: linear\ndtype: float32\nmodels:\n"
        + "".join(f"  - {{model: org/{n}, parameters: {{weight: 1}}}}\n" for n in "ab")
    )
    commands = [["check", "r.yml"], ["plan", "r.yml", "--json"], ["merge", "r.yml", "out"], ["verify", "out"]]
    codes, said = run(room, *commands)
    assert codes == [0, 0, 0, 0] and "REACHED []" in said, said
    written = b"".join(p.read_bytes() for p in sorted(room.rglob("*")) if p.is_file())
    assert TOKEN not in said and TOKEN.encode() not in written
    return "4 commands: 0 socket events; the token is in no output, report, card or message"


@attack(32)
def offline(room: Path) -> str:
    """a recipe names a model of the Hub while HF_HUB_OFFLINE is set"""
    (room / "r.yml").write_text("merge_method: linear\nmodels: [{model: evil/model, parameters: {weight: 1}}]\n")
    codes, text = run(room, ["plan", "r.yml"], ["inspect", "evil/model"], HF_HUB_OFFLINE="1")
    assert codes == [4, 4] and "socket.connect" not in text and "socket.getaddrinfo" not in text, text
    assert TOKEN not in text
    return next(line for line in text.splitlines() if line.startswith("error:"))


@attack(32)
def unreachable(room: Path) -> str:
    """the Hub cannot be reached: the error and the traceback do not show the token"""
    codes, text = run(room, ["inspect", "evil/model"], HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert codes == [5] and TOKEN not in text, text
    return next(line for line in text.splitlines() if line.startswith("error:"))


@attack(32)
def bundle_that_names_a_model(room: Path) -> str:
    """a bundle names a model of the Hub as its base: looking at the bundle fetches nothing"""
    import mergekit_lr

    packing = {
        "merge_method": "tall_masks", "base_model": str(model(room / "base")), "parameters": {"lambda": 0.4},
        "models": [{"model": str(model(room / n)), "name": n} for n in ("one", "two")],
    }  # fmt: skip
    mergekit_lr.merge(packing, room / "bundle", device="cpu", threads=1)
    path = room / "bundle" / "bundle.json"
    content = json.loads(path.read_text())
    content["base"]["model"] = "evil/model"
    path.write_text(json.dumps(content))
    codes, text = run(room, ["verify", "bundle"], ["inspect", "bundle"])
    assert codes == [0, 0] and "REACHED []" in text, text
    return "verify and inspect read the bundle's own files only"


@attack(34)
def plugins(room: Path) -> str:
    """a distribution that replaces a method of ours, and one whose import leaves a mark or fails"""
    canary = room / "canary"
    info = room / "evil_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mergekit_lr.methods]\nlinear = evil_module:Evil\nmarks = evil_module:Evil\nbroken = no_such_module:X\n"
    )
    (room / "evil_module.py").write_text(f"open({str(canary)!r}, 'w').close()\nEvil = 1\n")
    (room / "r.yml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    (room / "broken.yml").write_text("merge_method: broken\nmodels: [{model: a}]\n")
    path = os.pathsep.join(p for p in (str(room), os.environ.get("PYTHONPATH", "")) if p)
    codes, text = run(
        room, ["methods"], ["check", "r.yml"], ["methods", "linear"], ["check", "broken.yml"], PYTHONPATH=path
    )
    assert codes == [0, 0, 0, 3] and not canary.exists(), text
    assert "evil-plugin 1.0" in text and "REACHED []" in text
    return next(line for line in text.splitlines() if line.startswith("error:"))


main(__name__)
