"""Does a model folder hold what it claims? For any folder, and by digest for those that this package wrote.

Every check reports on its own; none stops the others. Weights are streamed once, with pread, for values that are
not finite and for digests; everything else is headers and JSON.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mergekit_lr.arch.tied import EMBEDDINGS, HEADS
from mergekit_lr.checkpoint.header import Header, TensorInfo, read_header
from mergekit_lr.checkpoint.model import read_weight_map
from mergekit_lr.checkpoint.small_files import inside, read_config, read_json
from mergekit_lr.engine.digest import ALGORITHM
from mergekit_lr.errors import CheckpointError, VerificationError
from mergekit_lr.report.adapters import check_adapter, is_adapter
from mergekit_lr.report.bundles import check_bundle, is_bundle
from mergekit_lr.report.code import code_problems
from mergekit_lr.report.consistency import (
    PLAIN_FAMILIES,
    config_problems,
    expert_count,
    experts_by_layer,
    layer_outliers,
    layers_by_stack,
    more,
    text_config,
)
from mergekit_lr.report.scan import scan
from mergekit_lr.report.verification import Verification

INDEX = "model.safetensors.index.json"
REPORT = "merge_report.json"
MAX_REPORT = 1 << 30
MAX_LINES = 3


def verify(path: str | Path, *, weights: bool = True) -> Verification:
    """Check a model folder, a PEFT adapter, a bundle, or one safetensors file; ours or not.

    ``weights=False`` leaves the weights unread: names, shapes, config and index only, as before a commit.

    Raises:
        CheckpointError: there is nothing at ``path`` to verify.
    """
    folder = Path(path)
    result = Verification(str(path))
    if is_bundle(folder):
        return _verify_bundle(result, folder, weights)
    if is_adapter(folder):
        return _verify_adapter(result, folder, weights)
    if folder.is_file():
        result.kind = "file"
        headers = _read_headers(result, folder.parent, [folder.name])
        mapped, report = None, None
    elif folder.is_dir():
        mapped = _weight_map(result, folder)
        headers = _read_headers(result, folder, _counting(result, folder, mapped))
        report = _json(result, folder, REPORT, MAX_REPORT)
    else:
        raise CheckpointError("no such model", where=str(path), fix="give a folder or a .safetensors file")
    tensors = _placement(result, headers, mapped)
    result.files, result.tensors = len(headers), len(tensors)
    result.bytes = sum(info.nbytes for info, _ in tensors.values())
    infos = {name: info for name, (info, _) in tensors.items()}
    result.warnings += layer_outliers(infos)
    result.looked("headers")
    result.looked("index against files", "" if mapped is not None else "there is no index")
    result.looked("layers against each other", "" if layers_by_stack(infos) else "no name has a layer in it")
    config = None
    if folder.is_dir():
        _check_folder(result, folder, headers)
        config = _config(result, folder)
        if config is not None:
            result.problems += config_problems(config, infos)
            _check_tokenizer(result, folder, config, infos)
            _check_token_ids(result, folder, config)
        _tell_of_config(result, folder, config, infos)
    claimed = _check_report(result, report, infos)
    result.problems += code_problems(folder, report)
    result.looked("digests", "" if claimed else f"there is no {REPORT} with any")
    result.looked("values that are not finite", "" if weights else "weights were not read")
    if weights:
        root = folder if folder.is_dir() else folder.parent
        _check_weights(result, root, tensors, claimed, config)
    return result


def _verify_bundle(result: Verification, folder: Path, weights: bool) -> Verification:
    found = check_bundle(folder, weights=weights)
    result.kind = "bundle"
    result.problems += found.problems
    result.files, result.tensors, result.bytes = found.files, found.tensors, found.bytes
    result.scanned, result.digests_checked = weights, found.digests_checked
    result.checked += ["bundle.json", "headers against their digests", "parts and codes of every task"]
    result.looked("values that are not finite", "" if weights else "weights were not read")
    result.looked("digests", "" if found.digests_checked else "weights were not read, or there are none of this kind")
    result.looked("the base model", "" if found.holds_base else "the bundle does not hold it")
    return result


def _verify_adapter(result: Verification, folder: Path, weights: bool) -> Verification:
    result.kind = "adapter"
    found = check_adapter(folder)
    result.problems += found.problems
    result.files, result.tensors = 1, len(found.tensors)
    result.bytes = sum(info.nbytes for info, _ in found.tensors.values())
    _check_folder(result, folder, {file for _, file in found.tensors.values()})
    result.checked += ["adapter_config.json", "header", "pairs of A and B, their ranks and magnitudes"]
    result.looked("places and shapes in the base model", "it is not known here: merge BASE+ADAPTER to find out")
    claimed = _check_report(
        result, _json(result, folder, REPORT, MAX_REPORT), {n: i for n, (i, _) in found.tensors.items()}
    )
    result.looked("digests", "" if claimed else f"there is no {REPORT} with any")
    result.looked("values that are not finite", "" if weights else "weights were not read")
    if weights and found.tensors:
        _check_weights(result, folder, found.tensors, claimed, None)
    return result


def _tell_of_config(
    result: Verification, folder: Path, config: dict[str, Any] | None, infos: dict[str, TensorInfo]
) -> None:
    """What of the comparisons with config.json and the tokenizer could be made."""
    no_config = "" if config is not None else "there is no config.json"
    text = text_config(config or {})
    result.looked("sizes, layers and the head against config.json", no_config)
    family = text.get("model_type")
    plain = no_config or ("" if family in PLAIN_FAMILIES else f"the layout of {str(family)[:40]!r} is not known")
    result.looked("attention and MLP against config.json", plain)
    if experts_by_layer(infos) or expert_count(config or {}) is not None:
        uncounted = no_config or ("" if expert_count(config or {}) is not None else "config.json counts none")
        result.looked("experts, routers and shared experts against config.json", uncounted)
    has_tokenizer = (folder / "tokenizer.json").exists()
    result.looked("tokens against embeddings", no_config or ("" if has_tokenizer else "there is no tokenizer.json"))


def check_output(folder: Path) -> None:
    """What a finished folder must hold before anyone may load it, without reading weights again.

    Raises:
        VerificationError: config, index and shards do not fit each other; every problem is in the message.
    """
    found = verify(folder, weights=False).problems
    if found:
        raise VerificationError("the output does not hold together", where=str(folder), why="; ".join(found))


def _counting(result: Verification, folder: Path, mapped: dict[str, set[str]] | None) -> list[str]:
    """Files that hold the model: the index's, or ``model.safetensors``, or all; any other safetensors is stray."""
    present = {p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_")}
    if mapped is not None:
        counting = set(mapped)
    elif "model.safetensors" in present and not (folder / INDEX).exists():
        counting = {"model.safetensors"}
    else:
        counting = present
    result.problems += [
        f"{name} is no part of the model, but loaders that take every safetensors file would read it"
        for name in sorted(present - counting)
    ]
    return sorted(counting)


def _weight_map(result: Verification, folder: Path) -> dict[str, set[str]] | None:
    if not (folder / INDEX).exists():
        return None
    try:
        return read_weight_map(inside(folder, INDEX))
    except CheckpointError as e:
        result.problems.append(str(e))
        return None


def _read_headers(result: Verification, folder: Path, names: list[str]) -> dict[str, Header]:
    headers: dict[str, Header] = {}
    for name in names:
        try:
            headers[name] = read_header(inside(folder, name))
        except CheckpointError as e:
            result.problems.append(str(e))
    if not names:
        result.problems.append(f"{folder}: holds no safetensors")
    return headers


def _placement(
    result: Verification, headers: dict[str, Header], mapped: dict[str, set[str]] | None
) -> dict[str, tuple[TensorInfo, str]]:
    """Each tensor with the file that counts for it; every disagreement of index and files is a problem."""
    tensors: dict[str, tuple[TensorInfo, str]] = {}
    owner = {name: file for file, names in (mapped or {}).items() for name in names}
    for file, header in headers.items():
        listed = set(header.tensors) if mapped is None else mapped[file]
        unlisted = sorted(set(header.tensors) - listed)
        for name in unlisted[:MAX_LINES]:
            elsewhere = f" (it places that tensor in {owner[name]})" if name in owner else ""
            result.problems.append(f"{file} holds {name!r}, which the index does not list there{elsewhere}")
        if len(unlisted) > MAX_LINES:
            result.problems.append(f"{file} holds {len(unlisted)} tensors that the index does not list there")
        twice = sorted(set(header.tensors) & listed & set(tensors))
        if twice:
            where = f"both {tensors[twice[0]][1]} and {file}"
            result.problems.append(f"tensor {twice[0]!r} is in {where}{more(twice)}")
        tensors |= {n: (header.tensors[n], file) for n in header.tensors if n in listed and n not in tensors}
    for file, names in (mapped or {}).items():
        absent = sorted(names - set(headers[file].tensors)) if file in headers else []
        if absent:
            result.problems.append(f"the index places {absent[0]!r} in {file}, which does not hold it{more(absent)}")
    return tensors


def _check_folder(result: Verification, folder: Path, headers: Collection[str]) -> None:
    index = _json(Verification(""), folder, INDEX)
    total = (index or {}).get("metadata", {})
    total = total.get("total_size") if isinstance(total, dict) else None
    if isinstance(total, int | float) and int(total) != result.bytes:
        result.warnings.append(f"the index says total_size {int(total)}, but the tensors take {result.bytes} bytes")
    for path in sorted(folder.iterdir()):
        name = path.name
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt") and path.is_file():
            result.warnings.append(f"{name} may be a pickle; it is not checked, and loading it could run code")
        elif path.suffix == ".py":
            result.warnings.append(f"{name} is code; it runs only where a loader is told to trust it")
        elif name.startswith(".tmp") or name.endswith((".partial", ".incomplete")):
            result.warnings.append(f"{name} looks like a leftover of an interrupted write")
        mode = path.stat().st_mode if path.exists() else 0
        if name in headers or name.endswith(".json"):
            if not os.access(path, os.R_OK):
                result.problems.append(f"{name} cannot be read by this user")
            elif not mode & 0o044:
                result.warnings.append(
                    f"{name} is readable by its owner only (mode {mode & 0o777:04o}); chmod a+r lets others load it"
                )


def _check_tokenizer(result: Verification, folder: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
    tokenizer = _json(result, folder, "tokenizer.json")
    if tokenizer is None:
        return
    rows = [infos[n].shape[0] for n in EMBEDDINGS if n in infos and infos[n].shape]
    size = rows[0] if rows else text_config(config).get("vocab_size")
    highest = _highest_token(tokenizer)
    if isinstance(size, int) and highest is not None and highest >= size:
        result.problems.append(f"tokenizer.json has the id {highest}, but the embeddings have {size} rows")


def _highest_token(tokenizer: dict[str, Any]) -> int | None:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: list[int] = []
    if isinstance(vocab, dict):
        ids += [i for i in vocab.values() if type(i) is int]
    elif isinstance(vocab, list) and vocab:
        ids.append(len(vocab) - 1)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and type(token.get("id")) is int:
            ids.append(token["id"])
    return max(ids, default=None)


def _check_token_ids(result: Verification, folder: Path, config: dict[str, Any]) -> None:
    size = text_config(config).get("vocab_size")
    if type(size) is not int:
        return
    for file, content in (("config.json", config), ("generation_config.json", None)):
        content = content if content is not None else _json(result, folder, file)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = (content or {}).get(key)
            for token in value if isinstance(value, list) else [value]:
                if type(token) is int and token >= size:
                    result.problems.append(f"{file} has {key} {token}, but vocab_size is {size}")


def _check_report(result: Verification, report: Any, infos: dict[str, TensorInfo]) -> dict[str, str]:
    """Digests that our own report claims; names, dtypes and shapes are compared here."""
    entries = report.get("tensors") if isinstance(report, dict) else None
    if report is None:
        return {}
    if not isinstance(entries, list):
        result.problems.append(f"{REPORT} lists no tensors")
        return {}
    claimed: dict[str, str] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            result.problems.append(f"{REPORT} has an entry without a name")
            continue
        info = infos.get(name)
        if info is None:
            result.problems.append(f"{REPORT} lists {name!r}, which is not there")
        elif (entry.get("dtype"), entry.get("shape")) != (info.dtype, list(info.shape)):
            result.problems.append(
                f"{name!r} is {info.dtype} {list(info.shape)}, not {entry.get('dtype')} {entry.get('shape')} as written"
            )
        elif isinstance(entry.get("digest"), str):
            claimed[name] = entry["digest"]
    known = {e.get("name") for e in entries if isinstance(e, dict)}
    result.problems += [f"{name!r} is not in {REPORT}" for name in sorted(set(infos) - known)]
    if claimed and report.get("digest_algorithm") != ALGORITHM:
        result.warnings.append(f"{REPORT} has digests of another kind ({str(report.get('digest_algorithm'))[:60]})")
        return {}
    return claimed


def _check_weights(
    result: Verification,
    folder: Path,
    tensors: dict[str, tuple[TensorInfo, str]],
    claimed: dict[str, str],
    config: dict[str, Any] | None,
) -> None:
    """Values that are not finite, digests that differ, and a stored head that differs from what it is tied to."""
    digests, problems = scan(folder, tensors)
    result.problems += problems
    result.scanned = True
    for name, digest in claimed.items():
        if name in digests:
            result.digests_checked += 1
            if digests[name] != digest:
                result.problems.append(
                    f"{name!r} is not as it was written: its digest is {digests[name]}, not {digest}; "
                    "write or copy it again"
                )
    # A head beside embeddings that the config ties it to: some loaders read it, others drop it.
    if config is not None and text_config(config).get("tie_word_embeddings") is True:
        head = next((n for n in HEADS if n in digests), None)
        embedding = next((n for n in EMBEDDINGS if n in digests), None)
        if head and embedding and digests[head] != digests[embedding]:
            result.problems.append(f"config.json ties {head!r} to {embedding!r}, but the two differ")


def _config(result: Verification, folder: Path) -> dict[str, Any] | None:
    try:
        path = inside(folder, "config.json")
        return read_config(path) if path.exists() else None
    except CheckpointError as e:
        result.problems.append(str(e))
        return None


def _json(result: Verification, folder: Path, name: str, most: int | None = None) -> dict[str, Any] | None:
    """A JSON object of the folder; None where there is none, and a problem where it is not one."""
    try:
        path = inside(folder, name)
        if not path.exists():
            return None
        content = read_json(path) if most is None else read_json(path, most=most)
    except CheckpointError as e:
        result.problems.append(str(e))
        return None
    if not isinstance(content, dict):
        result.problems.append(f"{name} does not hold an object")
        return None
    return content
