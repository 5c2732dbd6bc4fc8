"""Protections of a run and its output: the other rows of SECURITY.md. See `removal`."""

from __future__ import annotations

from removals_of_inputs import Removal

RUNS = [
    Removal(
        9, "inputs are looked at again before the commit", "mergekit_lr/engine/portion.py",
        "    changed = [p for m in plan.graph.files for p in plan.inputs[m].changed()]", "    changed: list[str] = []",
        "tests/engine/test_merge.py -k inputs_that_change_during_the_run",
    ),
    Removal(
        9, "a read that ends early is an error", "mergekit_lr/checkpoint/model.py",
        "            if got == 0:\n", "            if got == 0:\n                return\n            if False:\n",
        "tests/checkpoint/test_model.py -k truncation_during_a_run",
    ),
    Removal(
        9, "files are read, not mapped", "mergekit_lr/checkpoint/model.py",
        "                got = os.preadv(fd, [view[done:]], offset + done)\n",
        "                got = len(view) - done\n"
        "                kept = self.__dict__.setdefault(('mapped', fd), __import__('mmap').mmap(fd, 0, prot=1))\n"
        "                view[done:] = kept[offset + done : offset + len(view)]\n",
        "tests/checkpoint/test_model.py -k truncation_during_a_run",
    ),
    Removal(
        10, "a header fits its file", "mergekit_lr/checkpoint/header.py",
        "    if end != file_size:", "    if False:",
        "tests/checkpoint/test_model.py -k truncation_before_a_run",
    ),
    Removal(
        10, "digests are compared", "mergekit_lr/report/verify.py",
        "            if digests[name] != digest:", "            if False:",
        "tests/report/test_verify.py -k test_digests",
    ),
    Removal(
        12, "what becomes infinite in the cast is an error", "mergekit_lr/engine/evaluate.py",
        "        if largest < OVERFLOWS_AT[sink.dtype]:", "        if True:",
        "tests/attacks/test_attacks.py -k values.overflow",
    ),
    Removal(
        12, "inputs are widened to fp32", "mergekit_lr/engine/evaluate.py",
        "            room = self._wide = torch.empty(shape, dtype=torch.float32)",
        "            room = self._wide = torch.empty(shape, dtype=values[0].dtype)",
        "tests/attacks/test_attacks.py -k values.half_sums",
    ),
    Removal(
        13, "free space is looked at before anything is reserved", "mergekit_lr/engine/workspace.py",
        "        if needed > free:", "        if False:",
        "tests/faults/test_places.py -k a_disk_that_is_too_small",
    ),
    Removal(
        13, "what a disk refuses is exit code 5", "mergekit_lr/checkpoint/fs.py",
        "        fix = _FIXES.get(e.errno or 0,", "        raise\n        fix = _FIXES.get(e.errno or 0,",
        "tests/faults/test_crash.py -k some_operations_fail",
    ),
    Removal(
        14, "the output appears by one rename", "mergekit_lr/engine/workspace.py",
        "            fs.rename(self.model, self.out)\n",
        "            fs.make_folder(self.out)\n"
        "            for path in sorted(self.model.iterdir()):\n"
        "                fs.rename(path, self.out / path.name)\n"
        "            fs.remove_if_empty(self.model)\n",
        "tests/engine/test_resume.py -k killed_at_every_operation_and_resumed",
    ),
    Removal(
        14, "shards are durable before the rename", "mergekit_lr/engine/workspace.py",
        "            fs.fsync(shard)\n", "            pass\n",
        "tests/faults/test_crash.py -k the_power_fails_at_some_operations",
    ),
    Removal(
        15, "work of another run is refused", "mergekit_lr/engine/workspace.py",
        "        if before != after:", "        if False:",
        "tests/engine/test_resume.py -k a_changed_run_is_not_resumed",
    ),
    Removal(
        15, "the inputs are part of what is compared", "mergekit_lr/engine/plan.py",
        '            "inputs": {m: self._identity(self.inputs[m]) for m in self.graph.files},\n', "",
        "tests/faults/test_inputs.py -k a_run_is_not_gone_on_with_after_a_change",
    ),
    Removal(
        16, "a parent that is missing is refused", "mergekit_lr/engine/target.py",
        "    if not there:", "    if False:",
        "tests/engine/test_resume.py -k no_parent_and_no_permission",
    ),
    Removal(
        16, "the output's place is looked at before the inputs are", "mergekit_lr/engine/run.py",
        "    check_place(Path(out))\n", "",
        "tests/faults/test_places.py -k nothing_is_read_for_an_output",
    ),
    Removal(
        17, "who holds the folder is believed", "mergekit_lr/engine/lock.py",
        '            if holder is not None and holder.get("pid") != os.getpid() and is_alive(holder):',
        "            if False:",
        "tests/engine/test_resume.py -k a_live_run_keeps_others_out",
    ),
    Removal(
        17, "the kernel's lock is exclusive", "mergekit_lr/checkpoint/fs.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/faults/test_races.py -k a_lock_without_a_word_is_waited_for",
    ),
    Removal(
        18, "an output that exists is replaced only if asked", "mergekit_lr/engine/run.py",
        "    overwrite: bool = False,\n    allow_pickle", "    overwrite: bool = True,\n    allow_pickle",
        "tests/engine/test_merge.py -k output_is_refused_where_it_would_hurt",
    ),
    Removal(
        18, "an output that appears meanwhile is not replaced", "mergekit_lr/engine/workspace.py",
        "            if not overwrite:\n                raise self._exists()\n"
        "            fs.remove_tree(self.replaced)",
        "            fs.remove_tree(self.replaced)",
        "tests/faults/test_races.py -k an_output_that_appears_meanwhile",
    ),
    Removal(
        18, "an output is none of the inputs", "mergekit_lr/engine/target.py",
        "        if same or (target is not None and target in _above(used)):", "        if False:",
        "tests/faults/test_places.py -k an_output_keeps_away_from_its_inputs",
    ),
    Removal(
        19, "files have the umask's mode", "mergekit_lr/checkpoint/fs.py",
        "fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)", "fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)",
        "tests/engine/test_merge.py -k file_modes_follow_the_umask",
    ),
    Removal(
        19, "folders have the umask's mode", "mergekit_lr/checkpoint/fs.py",
        "path.mkdir(parents=parents, exist_ok=True)", "path.mkdir(0o700, parents=parents, exist_ok=True)",
        "tests/faults/test_places.py -k modes_are_those_that_the_user_asks_for",
    ),
    Removal(
        26, "experts stored in one tensor stay in one", "mergekit_lr/arch/moe.py",
        "            if s.slot.fused:\n                yield", "            if False:\n                yield",
        "tests/experts/test_families.py -k outputs_of_an_unchanged_layer",
    ),
    Removal(
        26, "kept experts are numbered anew", "mergekit_lr/experts/layout.py",
        "self._copy(s.names[e], s.names[j], ALONE)", "self._copy(s.names[e], s.names[e], ALONE)",
        "tests/experts/test_outputs.py -k every_family_is_pruned_and_merged",
    ),
    Removal(
        26, "shapes that differ are an error", "mergekit_lr/graph/build.py",
        "        if found.shape != info.shape:", "        if False:",
        "tests/engine/test_merge.py -k missing_tensors",
    ),
    Removal(
        27, "a head that would be lost is an error", "mergekit_lr/engine/tied_heads.py",
        "    if problems:\n", "    if False:\n",
        "tests/engine/test_merge.py -k a_head_of_its_own_is_refused",
    ),
    Removal(
        27, "the head of a tied model is its embeddings", "mergekit_lr/graph/build.py",
        "        stand_in = tied_source(name, checkpoint.tensors) if config_ties(checkpoint.config) else None\n",
        "        stand_in = None\n",
        "tests/engine/test_merge.py -k tied_head_is_written_as_the_base_has_it",
    ),
    Removal(
        28, "tokens have the same ids, or it is an error", "mergekit_lr/tokenizer/compare.py",
        "    if problems:\n", "    if False:\n",
        "tests/tokenizer/test_rules.py -k same_ids_other_order",
    ),
    Removal(
        28, "rows follow the token's text", "mergekit_lr/tokenizer/rows.py",
        "    found = np.fromiter((theirs.get(t, NONE) for t in tokens), np.int64, len(tokens))\n",
        "    found = np.array([i if t in theirs else NONE for t, i in tokens.items()])\n",
        "tests/tokenizer/test_rows.py -k test_union",
    ),
    Removal(
        29, "tensors that a model lacks are an error", "mergekit_lr/graph/build.py",
        "        self.parts = self.parts or Parts(self.inputs[self.reference])\n", "        return\n",
        "tests/engine/test_merge.py -k missing_tensors",
    ),
    Removal(
        30, "what does not fit is refused", "mergekit_lr/engine/memory.py",
        "    if peak() > limit:\n", "    if False:\n",
        "tests/engine/test_layout.py -k budget_is_kept_or_refused",
    ),
    Removal(
        30, "pieces and workers are cut to the budget", "mergekit_lr/engine/memory.py",
        "    while peak() > limit and workers > 1:\n", "    while False:\n",
        "tests/engine/test_layout.py -k budget_is_kept_or_refused",
    ),
    Removal(
        31, "a draw depends on its place, not on the slice", "mergekit_lr/philox.py",
        "_generator(key, first).random_raw(", "_generator(key, 0).random_raw(",
        "tests/engine/test_merge.py -k bytes_depend_on_nothing",
    ),
    Removal(
        32, "a local path is never looked for on the Hub", "mergekit_lr/checkpoint/open.py",
        "    return named and not exists(local(place))", "    return named",
        "tests/attacks/test_attacks.py -k network.sockets",
    ),
    Removal(
        32, "tracebacks show no values", "mergekit_lr/cli/app.py",
        "                print_exception(e)\n",
        '                __import__("traceback").TracebackException.from_exception(e, capture_locals=True).print()\n',
        "tests/attacks/test_attacks.py -k network.unreachable",
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
    Removal(
        35, "parts must agree on what they make", "mergekit_lr/engine/shared_space.py",
        "        if before == self.fingerprint:\n", "        if True:\n",
        "tests/engine/test_parts.py -k parts_must_agree",
    ),
    Removal(
        35, "nodes must have the same versions", "mergekit_lr/cluster/worker.py",
        "        if here[name] != wanted:", "        if False:",
        "tests/cluster/test_ray.py -k what_keeps_a_node_out",
    ),
    Removal(
        35, "Ray's own workers listen on the loopback", "mergekit_lr/cluster/crew.py",
        '        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"\n', "        pass\n",
        "tests/cluster/test_ray.py -m slow -k loopback_only",
    ),
]  # fmt: skip
