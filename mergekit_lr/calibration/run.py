"""One run of `calibrate`: what is left to do is done, then the file gets its name with one rename.

Work is kept in ``OUT.partial/``: the hidden states that enter the layer in work, and a file of statistics for each
layer that is done. A run that is killed goes on at the layer it was in and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.experts import experts_prefix, in_memory
from mergekit_lr.calibration.accumulate import (
    LayerWatcher,
    LinearSums,
    MixtureSums,
    Sums,
    Wanted,
    as_stored,
    fold,
    linear_modules,
)
from mergekit_lr.calibration.cost import statistics_bytes
from mergekit_lr.calibration.network import HEAD, Network
from mergekit_lr.calibration.probe import current_watcher
from mergekit_lr.calibration.states import DiskStates, states_path
from mergekit_lr.calibration.statistics import FORMAT, VERSION, model_digest
from mergekit_lr.calibration.stream import Stream, in_order, one_thread
from mergekit_lr.calibration.text import Batch, Windows, sample_rows
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import open_file
from mergekit_lr.checkpoint.writer import FileWriter, write_safetensors
from mergekit_lr.engine.progress import Progress, ProgressEvent
from mergekit_lr.engine.target import places_of
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import nn

GRAMS = ("linear", "input", "hidden")
RESULT = "statistics.safetensors"
_IRRELEVANT = ("_name_or_path", "architectures", "transformers_version")


@dataclass
class Calibration:
    """One run of `calibrate`, its inputs checked."""

    network: Network
    windows: Windows
    wanted: Wanted
    similarity_tokens: int
    limit: int
    out: Path

    def __post_init__(self) -> None:
        accumulators = max(statistics_bytes(self.network, i, self.wanted) for i in range(len(self.network.layers)))
        self.stream = Stream(
            self.network, self.windows, limit=self.limit, reserved=2 * accumulators, per_batch=accumulators
        )
        self.samples = sample_rows(self.windows, self.stream.batches, self.similarity_tokens, self.windows.seed)

    def fingerprint(self) -> dict[str, Any]:
        """Work is gone on with only under the same."""
        return {"run": self.run_digest, "inputs": self.network.checkpoint.identity(), "metadata": self.metadata()}

    @cached_property
    def run_digest(self) -> str:
        """sha256 of what decides the output's bytes; the file carries it."""
        from mergekit_lr import __version__

        config = {k: v for k, v in (self.network.checkpoint.config or {}).items() if k not in _IRRELEVANT}
        text = json.dumps([__version__, config, self.metadata()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def metadata(self) -> dict[str, str]:
        """The header's metadata, without times or places."""
        return {
            "kind": FORMAT,
            "format_version": VERSION,
            "model_digest": self.model_digest,
            "model_type": str(self.network.config.model_type),
            "text_digest": self.windows.digest,
            "samples": str(len(self.windows.ids)),
            "sequence_length": str(self.windows.sequence_length),
            "tokens": str(self.windows.tokens),
            "seed": str(self.windows.seed),
            "similarity_tokens": str(self.similarity_tokens),
            "grams": ",".join(g for g in GRAMS if getattr(self.wanted, g)),
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "device": self.network.device.type,
        }

    @cached_property
    def model_digest(self) -> str:
        """Digest of the model, see `mergekit_lr.calibration.statistics.model_digest`."""
        return model_digest(self.network.checkpoint)

    def run(self, *, resume: bool, overwrite: bool, progress: Progress | None) -> dict[str, Any]:
        """Do what is left to do, then put the file in place with one rename."""
        workspace = Workspace(self.out, self.fingerprint())
        if self._committed(workspace):
            return self._summary()
        if self.out.is_dir():
            raise UsageError("the output is a folder", where=str(self.out), fix="name a file")
        workspace.check_target(overwrite=overwrite, inputs=places_of([self.network.checkpoint]), into=True)
        workspace.claim(resume=resume, overwrite=overwrite)
        try:
            folder = workspace.model
            self._layers(folder, progress)
            self._assemble(folder)
            fs.rename(folder / RESULT, self.out)
            workspace.discard()
        finally:
            workspace.release()
        return self._summary()

    def _committed(self, workspace: Workspace) -> bool:
        """Whether this very run put its file in place before and was killed before it tidied up."""
        if not workspace.root.exists() or not self.out.is_file():
            return False
        try:
            same = read_header(self.out).metadata.get("run_digest") == self.run_digest
        except CheckpointError:
            return False
        if same:
            workspace.take()
            fs.fsync(self.out.parent)
            workspace.discard()
        return same

    def _layers(self, folder: Path, progress: Progress | None) -> None:
        count = len(self.network.layers)
        done = next((i for i in range(count) if not layer_path(folder, i).exists()), count)
        first = done if done or states_path(folder, 0).exists() else -1
        hidden = self.network.config.hidden_size
        states = DiskStates(folder, self.stream.batches, hidden, self.network.dtype, first)
        report = self._reporter(progress, count, done)
        try:
            if first < 0:
                self.stream.embed(states)
            for index in range(done, count):
                total = self._layer(index, states, lambda i=index: report(i))  # type: ignore[misc]
                states.finish()
                write_safetensors(layer_path(folder, index), as_stored(total))
                states.advance()
            if self._head_wanted() and not head_path(folder).exists():
                write_safetensors(head_path(folder), as_stored(self._head(states)))
        finally:
            states.close()

    def _reporter(self, progress: Progress | None, count: int, done: int) -> Callable[[int], None]:
        unit = self.stream.state_bytes // len(self.stream.batches)
        total = unit * len(self.stream.batches) * count
        at = unit * len(self.stream.batches) * done

        def report(index: int) -> None:
            nonlocal at
            at += unit
            if progress is not None:
                progress(ProgressEvent(min(at, total), total, f"layer {index + 1} of {count}"))

        return report

    def _layer(self, index: int, states: DiskStates, report: Callable[[], None]) -> Sums:
        """Sums of one layer over all batches, by the names of the file."""
        total: Sums = {}
        with self.network.filled(index) as layer:
            block = self.network.mixture(layer)
            hooks = self._listen(index, layer)
            try:
                for watcher in self.stream.run(index, layer, states, lambda b: self._watcher(block, b)):
                    fold(total, self._named(index, watcher))
                    report()
            finally:
                for hook in hooks:
                    hook.remove()
        return total

    def _watcher(self, block: nn.Module | None, batch: Batch) -> LayerWatcher:
        device = self.network.device
        mixture = None
        if block is not None:
            mixture = MixtureSums(block.experts, batch, self.samples[batch.number], self.wanted, device)
        return LayerWatcher(mixture, LinearSums(batch, device) if self.wanted.linear else None)

    def _listen(self, index: int, layer: nn.Module) -> list[Any]:
        """Hooks that tell the watcher in charge of every Linear's input, under the tensor's name on disk."""
        if not self.wanted.linear:
            return []
        prefix = self.network.layer_name(index)
        on_disk = {
            memory: disk
            for memory, disk in in_memory(self.network.family, self.network.names(index)).items()
            if isinstance(disk, str)
        }

        def listener(name: str) -> Callable[[Any, Any], None]:
            def hook(module: Any, args: Any) -> None:
                watcher = current_watcher()
                if isinstance(watcher, LayerWatcher):
                    watcher.called(name, args[0])

            return hook

        return [
            module.register_forward_pre_hook(listener(f"{prefix}.{on_disk[f'{name}.weight']}"))
            for name, module in linear_modules(layer).items()
        ]

    def _named(self, index: int, watcher: LayerWatcher) -> Sums:
        named: Sums = {}
        if watcher.mixture is not None and self.network.family is not None:
            prefix = experts_prefix(self.network.family, self.network.layer_name(index))
            named |= {f"{prefix}.{entry}": value for entry, value in watcher.mixture.sums.items()}
        if watcher.linear is not None:
            named |= watcher.linear.sums
        return named

    def _head_wanted(self) -> bool:
        return self.wanted.linear and f"{HEAD}.weight" in self.network.checkpoint.tensors

    def _head(self, states: DiskStates) -> Sums:
        """The input Gram of the head: what the final norm gives."""
        total: Sums = {}
        device = self.network.device

        def work(batch: Batch) -> Sums:
            sums = LinearSums(batch, device)
            with torch.no_grad():
                sums.called(f"{HEAD}.weight", norm(states.read(batch.number).to(device)))
            return sums.sums

        with self.network.filled_norm() as norm, one_thread():
            for part in in_order(self.stream.batches, work, self.stream.threads):
                fold(total, part)
        return total

    def _assemble(self, folder: Path) -> None:
        """All layers' statistics in one file, tensor by tensor."""
        paths = [layer_path(folder, i) for i in range(len(self.network.layers))]
        if self._head_wanted():
            paths.append(head_path(folder))
        parts = [open_file(p, str(p)) for p in paths]
        try:
            entries = [t for part in parts for t in part.tensors.values()]
            ordered = sorted(entries, key=lambda t: t.name)
            with FileWriter(folder / RESULT, ordered, self.metadata() | {"run_digest": self.run_digest}) as writer:
                for part in parts:
                    for name, info in part.tensors.items():
                        writer.write(name, part.read(name, 0, info.numel).view(info.shape))
        finally:
            for part in parts:
                part.close()

    def _summary(self) -> dict[str, Any]:
        with open_file(self.out, str(self.out)) as written:
            entries = len(written.tensors)
        return {
            "out": str(self.out),
            "model": self.network.checkpoint.reference,
            "tokens": self.windows.tokens,
            "samples": len(self.windows.ids),
            "sequence_length": self.windows.sequence_length,
            "mixtures": len(self.network.mixtures),
            "entries": entries,
            "metadata": self.metadata(),
        }


def layer_path(folder: Path, index: int) -> Path:
    """Statistics of one layer; it exists exactly if the layer is done."""
    return folder / f"layer-{index:05d}.safetensors"


def head_path(folder: Path) -> Path:
    """Statistics of the head."""
    return folder / "head.safetensors"
