"""Protections against what a file says: rows 1 to 8, 11 and 20 to 25 of SECURITY.md. See `removal`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Removal:
    """In ``file``, ``old`` becomes ``new``: that takes out the ``protection``. ``test`` must then fail."""

    row: int
    protection: str
    file: str
    old: str
    new: str
    test: str


INPUTS = [
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
        7, "a file of a folder has a plain name", "mergekit_lr/checkpoint/small_files.py",
        'if name != Path(name).name or name in ("", ".", ".."):', "if False:",
        "tests/attacks/test_attacks.py -k paths.optimizer_folder",
    ),
    Removal(
        7, "links do not leave the folder", "mergekit_lr/checkpoint/small_files.py",
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
        21, "unknown keys are an error", "mergekit_lr/recipe/walk.py",
        '            self.problems.add(entry.key_mark, key[:60], "unknown key", hint.text)', "            pass",
        "tests/attacks/test_attacks.py -k recipes.misspelt",
    ),
    Removal(
        21, "the nearest key is named", "mergekit_lr/recipe/problems.py",
        '        return f"did you mean {near[0]!r}?"', '        return "remove it"',
        "tests/attacks/test_attacks.py -k recipes.misspelt",
    ),
    Removal(
        22, "auto_map is taken out of every JSON file", "mergekit_lr/checkpoint/foreign_code.py",
        "    return (_cleaned(content, modules) if found else content), found", "    return content, found",
        "tests/attacks/test_attacks.py -k side_files.python_files",
    ),
    Removal(
        22, "kernels of repositories are refused", "mergekit_lr/checkpoint/foreign_code.py",
        "    if named:\n        raise", "    if False:\n        raise",
        "tests/attacks/test_attacks.py -k side_files.kernels",
    ),
    Removal(
        22, "only code that comes along is still named", "mergekit_lr/checkpoint/foreign_code.py",
        "all(len(p) == 2 and p[0] in modules and p[1].isidentifier() for p in parts)", "all(parts)",
        "tests/attacks/test_attacks.py -k side_files.code_that_was_asked_for",
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
]  # fmt: skip
