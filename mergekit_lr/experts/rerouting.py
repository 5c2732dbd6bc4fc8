"""What a model's own router says when some of its experts are gone, or its rows are others.

The mixture's own module is run with its router's tensors cut and nothing behind it, so scores, biases, groups and
scaling are those of the family, whatever they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lr.experts.bank import Routing
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K = ("top_k", "num_experts_per_tok", "moe_k")


class Rerouter:
    """The router of a mixture ``block`` with ``experts`` experts, for as long as the block has its weights.

    ``router``: the name of the router's module in the block.
    """

    def __init__(self, block: Any, router: str, experts: int) -> None:
        self.experts, self._router = experts, router
        nothing = {id(m): _nothing() for n, m in block.named_children() if n not in (router, "experts")}
        nothing[id(block.experts)] = _listener()
        self._block = copy.deepcopy(block, nothing)

    @property
    def rows(self) -> Tensor:
        """The router's matrix ``[E, H]``."""
        weight: Tensor = getattr(self._block, self._router).weight
        return weight.detach()

    def __call__(self, inputs: Tensor, kept: Sequence[int] | None = None, rows: Tensor | None = None) -> Routing:
        """Choice and weights for ``inputs`` ``[tokens, H]``, experts numbered as in ``kept``.

        ``rows`` ``[len(kept), H]`` stand for the router's matrix; gradients flow to them through the weights.
        """
        block = self._block
        if kept is not None or rows is not None:
            block = self._cut(list(range(self.experts)) if kept is None else list(kept))
        if rows is not None:
            module = getattr(block, self._router)
            del module._parameters["weight"]
            module.weight = rows.to(self.rows.dtype)
        found: list[tuple[Tensor, Tensor]] = []
        block.experts.found = found
        block(inputs[None])
        [(indices, weights)] = found
        return Routing(indices.reshape(len(inputs), -1), weights.reshape(len(inputs), -1))

    def _cut(self, kept: list[int]) -> Any:
        block = copy.deepcopy(self._block)
        index = torch.tensor(kept, device=self.rows.device)
        modules = [block, *getattr(block, self._router).modules()]
        for module in modules:
            for store in (module._parameters, module._buffers):
                for name, axis in _expert_axes(store, self.experts):
                    cut = store[name].data.index_select(axis, index)
                    store[name] = torch.nn.Parameter(cut, requires_grad=False) if store is module._parameters else cut
            for name in _COUNTS:
                if getattr(module, name, None) == self.experts:
                    setattr(module, name, len(kept))
            for name in _TOP_K:
                k = getattr(module, name, None)
                if isinstance(k, int) and k > len(kept):
                    setattr(module, name, len(kept))
        return block


def _expert_axes(store: Any, experts: int) -> Iterator[tuple[str, int]]:
    """The tensors with an entry for each expert, and along which axis."""
    for name, tensor in list(store.items()):
        if tensor is None:
            continue
        axis = next((i for i, n in enumerate(tensor.shape) if n == experts), None)
        if axis is not None and axis == (1 if tensor.ndim == 2 and tensor.shape[0] == 1 != experts else 0):
            yield name, axis


def _nothing() -> nn.Module:
    class Nothing(torch.nn.Module):
        """Stands for shared experts and their gates: adds nothing."""

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.zeros_like(inputs)

    return Nothing()


def _listener() -> nn.Module:
    class Listener(torch.nn.Module):
        """Stands for the experts: keeps what the router said."""

        found: list[tuple[Tensor, Tensor]]

        def forward(self, inputs: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            self.found.append((indices, weights))
            return torch.zeros_like(inputs)

    return Listener()
