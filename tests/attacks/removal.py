"""Takes protections out, one at a time, and runs the tests that guard them: each must then fail.

``python tests/attacks/removal.py [ROW...]`` copies the package, changes one place of the copy, runs that row's tests
against it and prints a table. A row whose tests still pass is a row that nothing guards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Removal:
    """In ``file``, ``old`` becomes ``new``: that takes out the ``protection``. ``test`` must then fail."""

    row: int
    protection: str
    file: str
    old: str
    new: str
    test: str


REMOVALS = [
    Removal(
        1, "pickles only where they are asked for", "mergekit_lr/checkpoint/open.py",
        "    if not allow_pickle:\n", "    if False:\n",
        "tests/checkpoint/test_pickle.py -k only_if_asked",
    ),
    Removal(
        1, "torch's weights_only loader", "mergekit_lr/checkpoint/pickle.py",
        "weights_only=True, mmap=True", "weights_only=False, mmap=True",
        "tests/attacks/test_attacks.py -k pickles.calls",
    ),
    Removal(
        2, "members of an archive fit into it", "mergekit_lr/checkpoint/pickle.py",
        "    if any(m.file_size != m.compress_size for m in members) or sum(m.file_size for m in members) > size:",
        "    if False:",
        "tests/attacks/test_attacks.py -k pickles.zip_bombs",
    ),
    Removal(
        3, "tensors tile the file", "mergekit_lr/checkpoint/header.py",
        "        if t.offset != end:", "        if False:",
        "tests/attacks/test_attacks.py -k headers.overlap",
    ),
    Removal(
        4, "large headers are parsed entry by entry", "mergekit_lr/checkpoint/header.py",
        "AT_ONCE = 1 << 20", "AT_ONCE = 1 << 40",
        "tests/attacks/test_attacks.py -k headers.memory",
    ),
    Removal(
        5, "names hold no control characters", "mergekit_lr/checkpoint/header.py",
        "or not name.isprintable():", "or False:",
        "tests/attacks/test_attacks.py -k headers.terminal_codes",
    ),
    Removal(
        6, "only floating point is averaged", "mergekit_lr/checkpoint/dtypes.py",
        'AVERAGED = frozenset({"F16", "BF16", "F32", "F64"})', "AVERAGED = frozenset(ITEM_BYTES)",
        "tests/attacks/test_attacks.py -k values.packed",
    ),
    Removal(
        7, "a file of a folder has a plain name", "mergekit_lr/checkpoint/model.py",
        'if name != Path(name).name or name in ("", ".", ".."):', "if False:",
        "tests/attacks/test_attacks.py -k paths.optimizer_folder",
    ),
    Removal(
        7, "links do not leave the folder", "mergekit_lr/checkpoint/model.py",
        "        if not cached and root not in target.parents:", "        if False:",
        "tests/attacks/test_attacks.py -k paths.links",
    ),
    Removal(
        8, "a tensor is in the shard that the index names", "mergekit_lr/checkpoint/model.py",
        "absent = sorted((wanted or set()) - set(header.tensors))", "absent: list[str] = []",
        "tests/attacks/test_attacks.py -k configs.index_of_ghosts",
    ),
    Removal(
        11, "values that are not finite are an error", "mergekit_lr/engine/finite.py",
        '    if job.nonfinite == "allow":', "    if True:",
        "tests/attacks/test_attacks.py -k values.poisoned",
    ),
    Removal(
        20, "values are counted with aliases expanded", "mergekit_lr/recipe/yaml.py",
        "        if self.nodes > MAX_NODES or size > MAX_NODES:", "        if False:",
        "tests/attacks/test_attacks.py -k recipes.alias_bomb",
    ),
    Removal(
        20, "tags are refused", "mergekit_lr/recipe/yaml.py",
        "        if tag is not None:", "        if False:",
        "tests/attacks/test_attacks.py -k recipes.python_object",
    ),
    Removal(
        22, "auto_map is taken out of every JSON file", "mergekit_lr/checkpoint/foreign_code.py",
        "    return (_cleaned(content) if found else content), found", "    return content, found",
        "tests/attacks/test_attacks.py -k side_files.python_files",
    ),
    Removal(
        22, "kernels of repositories are refused", "mergekit_lr/checkpoint/foreign_code.py",
        "    if named:\n        raise", "    if False:\n        raise",
        "tests/attacks/test_attacks.py -k side_files.kernels",
    ),
    Removal(
        23, "only files of a list are carried over", "mergekit_lr/engine/side_files.py",
        "for name in names if folder is not None else ():", "for name in sorted(p.name for p in folder.iterdir()):",
        "tests/attacks/test_attacks.py -k side_files.uninvited_files",
    ),
    Removal(
        24, "sizes in the config are compared with shapes", "mergekit_lr/report/consistency.py",
        "        *_vocabulary(text, tensors),\n", "",
        "tests/attacks/test_attacks.py -k configs.nested",
    ),
    Removal(
        25, "experts and router rows are counted", "mergekit_lr/report/consistency.py",
        "        *_experts(config, tensors),\n        *_attention", "        *_attention",
        "tests/attacks/test_attacks.py -k configs.experts",
    ),
    Removal(
        29, "tensors that a model lacks are an error", "mergekit_lr/graph/build.py",
        "        self.parts = self.parts or Parts(self.inputs[self.reference])\n", "        return\n",
        "tests/engine/test_merge.py -k missing_tensors",
    ),
    Removal(
        33, "names in the card are escaped", "mergekit_lr/report/card.py",
        '    marked = _MARKUP.sub(r"\\\\\\1", html.escape(printable, quote=False))', "    marked = printable",
        "tests/attacks/test_attacks.py -k names.cards",
    ),
    Removal(
        33, "fences are longer than what they hold", "mergekit_lr/report/card.py",
        'fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))', 'fence = "```"',
        "tests/attacks/test_attacks.py -k names.cards",
    ),
    Removal(
        33, "messages are printable", "mergekit_lr/errors.py",
        "    return text if text.isprintable() else", "    return text if True else",
        "tests/attacks/test_attacks.py -k names.terminal",
    ),
    Removal(
        34, "methods of ours come first", "mergekit_lr/registry.py",
        "_by_file_name(name) or builtin_methods().get(name) or plugin_method(name)",
        "plugin_method(name) or _by_file_name(name) or builtin_methods().get(name)",
        "tests/attacks/test_attacks.py -k network.plugins",
    ),
]  # fmt: skip


def copy_without(removal: Removal | None, target: Path) -> None:
    """A copy of the package at ``target`` in which one protection is missing, or none."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mergekit_lr", target / "mergekit_lr", ignore=ignored)
    if removal is None:
        return
    path = target / removal.file
    text = path.read_text(encoding="utf-8")
    assert text.count(removal.old) == 1, (
        f"row {removal.row}: {removal.file} has {text.count(removal.old)} of {removal.old!r}"
    )
    path.write_text(text.replace(removal.old, removal.new), encoding="utf-8")


def fails_without(removal: Removal | None, test: str = "") -> bool:
    """Whether the row's tests fail once its protection is gone; without a removal, whether ``test`` fails anyway."""
    with tempfile.TemporaryDirectory(prefix="without-") as room:
        copy_without(removal, Path(room))
        environment = {
            **os.environ,
            "PYTHONPATH": room,
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        program = (
            "import mergekit_lr, pathlib, sys, pytest, resource;"
            f"assert pathlib.Path(mergekit_lr.__file__).is_relative_to({room!r}), mergekit_lr.__file__;"
            "resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2);"
            "sys.exit(pytest.main(sys.argv[1:]))"
        )
        command = [
            sys.executable,
            "-c",
            program,
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(removal.test if removal else test).split(),
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        assert (done.returncode, " failed" in done.stdout) in ((0, False), (1, True)), said
        return done.returncode == 1


def main(rows: list[int]) -> int:
    unguarded = 0
    chosen = [r for r in REMOVALS if not rows or r.row in rows]
    for test in dict.fromkeys(r.test for r in chosen):
        assert not fails_without(None, test), f"{test} fails in a whole copy too"
    print(f"{'row':<4} {'protection taken out':<50} {'its test':<48} outcome")
    for removal in chosen:
        failed = fails_without(removal)
        unguarded += not failed
        outcome = "fails" if failed else "STILL PASSES"
        print(f"{removal.row:<4} {removal.protection:<50} {removal.test.partition('-k ')[2]:<48} {outcome}", flush=True)
    return unguarded > 0


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]]))
