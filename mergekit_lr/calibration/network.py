"""A decoder of which only the part in use has weights: built on meta from its config, filled from our own reader.

No remote code, no ``from_pretrained``. Weights are cast to the compute dtype as they are read, tensor by tensor;
what transformers itself keeps in fp32 (some routers) stays in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.experts import Blocks, in_memory
from mergekit_lr.arch.moe_families import FAMILIES, Family, find_family
from mergekit_lr.arch.stack import claimed_layers
from mergekit_lr.checkpoint.foreign_code import refuse_kernels
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

EMBEDDING = "model.embed_tokens"
STACK = "model.layers"
NORM = "model.norm"
HEAD = "lm_head"


class Network:
    """The meta model of a checkpoint, and the means to fill and empty its parts.

    Raises:
        CheckpointError: there is no config, transformers does not know it, the weights are quantised, or the model
            is no decoder with a stack ``model.layers``.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.model = _skeleton(checkpoint, dtype)
        body = getattr(self.model, "model", None)
        missing = [n for n in ("layers", "norm", "rotary_emb", "embed_tokens") if not hasattr(body, n)]
        if body is None or missing:
            raise CheckpointError(
                "the model cannot be run layer by layer",
                where=checkpoint.reference,
                why=f"it has no model.{missing[0] if missing else 'layers'}",
                fix="calibrate a text decoder with a stack model.layers",
            )
        self.body: Any = body
        self.config: Any = body.config
        self.layers: list[nn.Module] = list(body.layers)
        model_type = str(self.config.model_type)
        family = find_family(model_type)
        self.family: Family | None = family if family is not None and family.memory is not None else None
        self._names = _by_layer(checkpoint)
        absent = [i for i in range(len(self.layers)) if i not in self._names]
        if absent:
            raise CheckpointError(
                f"the config has {len(self.layers)} layers and the weights no layer {absent[0]}",
                where=checkpoint.reference,
            )
        if self.family is None and any(".experts." in n for n in checkpoint.tensors):
            runnable = sorted(t for f in FAMILIES if f.memory is not None for t in f.model_types)
            raise CheckpointError(
                f"layers with the mixture of experts {model_type!r} cannot be run",
                where=checkpoint.reference,
                why=f"those of {', '.join(runnable)} can",
                fix="add a Family with its Memory to mergekit_lr/arch/moe_families.py",
            )
        self.check()
        body.rotary_emb = type(body.rotary_emb)(config=self.config).to(self.device)
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    @property
    def mixtures(self) -> list[int]:
        """Layers that hold a mixture of experts."""
        return [i for i, layer in enumerate(self.layers) if self.mixture(layer) is not None]

    def mixture(self, layer: nn.Module) -> nn.Module | None:
        """The mixture of a layer, None in a dense one."""
        memory = self.family.memory if self.family else None
        block = getattr(layer, memory.block, None) if memory else None
        return block if block is not None and hasattr(block, "experts") else None

    def names(self, index: int) -> list[str]:
        """Names on disk of a layer's tensors, relative to the layer."""
        return self._names[index]

    def layer_name(self, index: int) -> str:
        """``model.layers.3``."""
        return f"{STACK}.{index}"

    def layer_bytes(self, index: int) -> int:
        """Bytes of a layer in the compute dtype."""
        return sum(p.numel() * p.element_size() for p in self.layers[index].parameters())

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """A layer with its weights, for as long as the context lasts."""
        layer = self.layers[index]
        prefix = self.layer_name(index)
        parts = in_memory(self.family, self._names[index])
        with self._filled(layer, prefix, parts):
            yield layer

    @contextmanager
    def filled_norm(self) -> Iterator[nn.Module]:
        """The final norm with its weights."""
        norm: nn.Module = self.body.norm
        names = [n for n in self.checkpoint.tensors if n.startswith(NORM + ".")]
        with self._filled(norm, NORM, {n.removeprefix(NORM + "."): n.removeprefix(NORM + ".") for n in names}):
            yield norm

    @contextmanager
    def _filled(self, module: nn.Module, prefix: str, parts: dict[str, str | Blocks]) -> Iterator[None]:
        self._check(module, prefix, parts)
        state = {name: self._read(prefix, parts[name], empty) for name, empty in module.state_dict().items()}
        module.load_state_dict(state, assign=True, strict=True)
        del state
        try:
            hollow = next((n for n, t in _tensors(module) if t.is_meta), None)
            if hollow is not None:
                raise CheckpointError(
                    f"{prefix}.{hollow} is not in the checkpoint and cannot be made",
                    where=self.checkpoint.reference,
                    why=f"the model type is {self.config.model_type!r}",
                )
            yield
        finally:
            module.to("meta")

    def check(self) -> None:
        """Compare every layer with the headers.

        Raises:
            CheckpointError: config and weights disagree.
        """
        for index, layer in enumerate(self.layers):
            self._check(layer, self.layer_name(index), in_memory(self.family, self._names[index]))

    def _check(self, module: nn.Module, prefix: str, parts: dict[str, str | Blocks]) -> None:
        where, why = self.checkpoint.reference, "so config and weights disagree"
        wanted = module.state_dict()
        absent = sorted(set(wanted) - set(parts))
        if absent:
            raise CheckpointError(f"the model needs {prefix}.{absent[0]}", where=where, why=f"no tensor is that, {why}")
        extra = sorted(n for n in set(parts) - set(wanted) if not n.endswith("rotary_emb.inv_freq"))
        if extra:
            more = f"{len(extra)} such tensors, {why}"
            raise CheckpointError(f"the model has no place for {prefix}.{extra[0]}", where=where, why=more)
        for name, empty in wanted.items():
            part, shape = parts[name], tuple(empty.shape)
            if isinstance(part, str):
                pieces = [(part, shape)]
            elif len(part) != shape[0]:
                raise CheckpointError(f"{prefix} has {len(part)} experts and the config {shape[0]}", where=where)
            else:
                pieces = [(n, (shape[1] // len(names), *shape[2:])) for names in part for n in names]
            for piece, expected in pieces:
                found = self.checkpoint.tensors[f"{prefix}.{piece}"].shape
                if found != expected:
                    what = f"{prefix}.{piece} has shape {found} and the model {expected}"
                    raise CheckpointError(what, where=where, why="config and weights disagree")

    def _read(self, prefix: str, part: str | Blocks, empty: Tensor) -> Tensor:
        """One tensor in memory, cast as it is read."""
        out = torch.empty(empty.shape, dtype=empty.dtype)
        if isinstance(part, str):
            self._copy(f"{prefix}.{part}", out)
            return out.to(self.device)
        for expert, names in zip(out, part, strict=True):
            for name, rows in zip(names, expert.chunk(len(names)), strict=True):
                self._copy(f"{prefix}.{name}", rows)
        return out.to(self.device)

    def _copy(self, name: str, out: Tensor) -> None:
        info = self.checkpoint.tensors[name]
        out.copy_(self.checkpoint.read(name, 0, info.numel).view(info.shape))

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding for tokens ``[B, L]``, read one by one: ``[B, L, H]`` in the compute dtype."""
        name = f"{EMBEDDING}.weight"
        if type(self.body.embed_tokens) is not torch.nn.Embedding or name not in self.checkpoint.tensors:
            raise CheckpointError(
                "the embedding is not a plain table",
                where=self.checkpoint.reference,
                why=f"it is {type(self.body.embed_tokens).__name__} of model type {self.config.model_type!r}",
            )
        rows, hidden = self.checkpoint.tensors[name].shape
        if int(ids.max()) >= rows:
            raise CheckpointError(
                "the tokenizer has tokens that the model has no row for", where=self.checkpoint.reference
            )
        unique, place = torch.unique(ids, return_inverse=True)
        table = torch.empty(len(unique), hidden, dtype=self.dtype)
        for row, token in zip(table, unique.tolist(), strict=True):
            row.copy_(self.checkpoint.read(name, token * hidden, (token + 1) * hidden))
        return torch.nn.functional.embedding(place, table).to(self.device)

    def arguments(self, lengths: tuple[int, ...], width: int) -> list[dict[str, Any]]:
        """What the model passes to each layer beside the hidden states, for windows padded on the right to ``width``.

        Masks and positions depend on lengths alone, so they are asked of the model once for each pattern.
        """
        key = (width, *lengths)
        if key not in self._arguments:
            hidden = torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device)
            empty = hidden.expand(len(lengths), width, self.config.hidden_size)
            self._arguments[key] = [kwargs for _, kwargs in self._traced(empty, lengths)]
        return self._arguments[key]

    def first(self, embedded: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Hidden states that enter layer 0: the embeddings, and what the model does to them first."""
        return self._traced(embedded, lengths)[0][0]

    def _traced(self, embedded: Tensor, lengths: tuple[int, ...]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Run the model's own forward with layers that only note what they are called with."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        kept, norm = self.body.layers, self.body.norm
        self.body.layers = torch.nn.ModuleList([_listener(layer, seen) for layer in self.layers])
        self.body.norm = torch.nn.Identity()
        try:
            self.body(
                inputs_embeds=embedded, attention_mask=mask_of(lengths, embedded.shape[1], self.device), use_cache=False
            )
        finally:
            self.body.layers, self.body.norm = kept, norm
        return seen


def mask_of(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor | None:
    """int64 ``[B, width]``: 1 for tokens, 0 for padding on the right; None where nothing is padded."""
    if all(n == width for n in lengths):
        return None
    return (torch.arange(width, device=device)[None] < torch.tensor(lengths, device=device)[:, None]).long()


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    where = checkpoint.reference
    content = checkpoint.config
    if content is None:
        raise CheckpointError("no model that can be run", where=where, why="there is no config.json")
    if "quantization_config" in content:
        raise CheckpointError("the weights are quantised", where=where, fix="calibrate the model they were made from")
    refuse_kernels(content, where)
    depth, stored = claimed_layers(content), len(_by_layer(checkpoint))
    if depth is not None and depth > 2 * stored + 8:
        raise CheckpointError(f"the config has {depth} layers and the weights {stored}", where=where)
    model_type = content.get("model_type")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(content))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(
            f"transformers cannot build a decoder of model type {model_type!r}", where=where, why=why
        ) from e
    return model.eval()


def _by_layer(checkpoint: Checkpoint) -> dict[int, list[str]]:
    """Names of each layer's tensors, relative to the layer."""
    found: dict[int, list[str]] = {}
    for name in checkpoint.tensors:
        if name.startswith(STACK + "."):
            number, _, rest = name.removeprefix(STACK + ".").partition(".")
            if number.isdigit() and rest:
                found.setdefault(int(number), []).append(rest)
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _listener(layer: nn.Module, seen: list[tuple[Tensor, dict[str, Any]]]) -> nn.Module:
    """Stands in for a layer: looks like it to the model, notes its arguments, passes the hidden states on."""

    class Listener(torch.nn.Module):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(layer, name)

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                kwargs = {"attention_mask": args[0], **kwargs}
            seen.append((hidden_states, kwargs))
            return hidden_states

    return Listener()
