"""Runs a decoder over token windows with one layer in memory at a time.

Layer by layer: read its weights, run every batch of windows through it, keep the hidden states that leave it, drop
it. The peak is one layer, the batches in work, and the hidden states if they are kept in memory. Batches run side by
side in threads, each torch operation on one thread, and are folded in order: neither results nor statistics depend
on the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from mergekit_lr.calibration.cost import batch_bytes
from mergekit_lr.calibration.network import Network
from mergekit_lr.calibration.probe import Replacement, Watcher, install, watching
from mergekit_lr.calibration.states import States, states_bytes
from mergekit_lr.calibration.text import Batch, Windows
from mergekit_lr.engine.memory import available_cpus
from mergekit_lr.errors import NonFiniteError, ResourceError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W", bound=Watcher)


class Stream:
    """A network, the windows that run through it, and the threads that run them.

    ``reserved``: bytes that the caller holds beside (statistics, hidden states in memory).

    Raises:
        ResourceError: one layer and one batch do not fit ``limit`` bytes; the message says what would.
    """

    def __init__(
        self, network: Network, windows: Windows, *, limit: int, reserved: int = 0, per_batch: int = 0
    ) -> None:
        self.network, self.windows, self.batches = network, windows, windows.batches()
        install(network.model, network.family, [m for i in network.mixtures if (m := self._mixture(i)) is not None])
        self.threads = self._threads(limit, reserved, per_batch)

    def _mixture(self, index: int) -> nn.Module | None:
        return self.network.mixture(self.network.layers[index])

    def _threads(self, limit: int, reserved: int, per_batch: int) -> int:
        layer = max(self.network.layer_bytes(i) for i in range(len(self.network.layers)))
        batch = per_batch + max(batch_bytes(self.network, b) for b in self.batches)
        needed = layer + reserved + batch
        if needed > limit:
            mib = -(-needed // 2**20)
            raise ResourceError(
                "one layer and one batch do not fit the memory budget",
                where=self.network.checkpoint.reference,
                why=f"the layer is {layer / 2**20:.0f} MiB, a batch {batch / 2**20:.0f} MiB, statistics and states "
                f"{reserved / 2**20:.0f} MiB, and {limit / 2**20:.0f} MiB are allowed",
                fix=f"allow at least --max-memory {mib}MiB",
            )
        if self.network.device.type != "cpu":
            return 1
        return max(1, min(available_cpus(), len(self.batches), 1 + (limit - needed) // batch))

    @property
    def state_bytes(self) -> int:
        """Bytes of the hidden states between two layers."""
        return states_bytes(self.batches, self.network.config.hidden_size, self.network.dtype)

    def embed(self, states: States) -> None:
        """Write the hidden states that enter layer 0."""
        with torch.no_grad(), one_thread():
            for batch in self.batches:
                states.write(batch.number, self.network.first(self.network.embed(batch.ids), batch.lengths))
            states.finish()
            states.advance()

    def run(
        self,
        index: int,
        layer: nn.Module,
        states: States,
        watch: Callable[[Batch], W],
        replacement: Replacement | None = None,
    ) -> Iterator[W]:
        """Run every batch through a filled layer, writing what leaves it; the watcher of each batch, in order.

        The caller must exhaust the iterator, then `States.finish` and `States.advance`.

        Raises:
            NonFiniteError: a token's hidden state is NaN or infinite; the message names the layer.
        """
        arguments = [self.network.arguments(b.lengths, b.ids.shape[1])[index] for b in self.batches]
        device = self.network.device

        def work(batch: Batch) -> tuple[Tensor, W]:
            watcher = watch(batch)
            with torch.no_grad(), watching(watcher, replacement):
                hidden = states.read(batch.number).to(device)
                out = layer(hidden, **arguments[batch.number])
                out = out[0] if isinstance(out, tuple) else out
                if not bool(torch.isfinite(out).flatten(0, 1)[batch.valid.to(device)].all()):
                    raise NonFiniteError(
                        "the hidden states are not finite",
                        where=f"{self.network.checkpoint.reference}, {self.network.layer_name(index)}",
                        why=f"computed in {str(self.network.dtype).removeprefix('torch.')}",
                        fix="check the model, or calibrate with --dtype float32",
                    )
            return out, watcher

        with one_thread():
            for batch, (out, watcher) in zip(self.batches, in_order(self.batches, work, self.threads), strict=True):
                states.write(batch.number, out)
                yield watcher


@contextmanager
def one_thread() -> Iterator[None]:
    """Each torch operation on one thread, so that its sums do not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(items: Sequence[T], work: Callable[[T], R], threads: int) -> Iterator[R]:
    """Results of ``work`` in the order of ``items``, computed by up to ``threads`` threads at once."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def exhaust(iterator: Iterable[Any]) -> None:
    """Run an iterator for what it does."""
    deque(iterator, maxlen=0)
