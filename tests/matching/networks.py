"""One small random model of each family, in float64, with what it computes from a state dict."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from mergekit_lr.arch.symmetry import SymmetrySpec

Tensors = dict[str, Tensor]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}


@dataclass
class Example:
    """A model: its tensors as on disk, and its outputs as a function of such tensors.

    ``loaded``: what transformers gives for a folder with such tensors, in a dtype of choice.
    """

    name: str
    tensors: Tensors
    outputs: Callable[[Tensors], Tensor]
    config: dict[str, Any] | None = None
    permutations: str = "auto"
    loaded: Callable[[Tensors, torch.dtype], Tensor] | None = None

    def sample_groups(self, spec: SymmetrySpec) -> list[str]:
        """One group of each kind: numbers in names left out of account; only those with something to move."""
        kinds: dict[str, str] = {}
        for name, group in spec.groups.items():
            if group.size > 1:
                kinds.setdefault("".join(c for c in name if not c.isdigit()), name)
        return list(kinds.values())


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters and buffers of floating dtype drawn anew, so that nothing is zero or one by habit."""
    g = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and "inv_freq" not in name and "rotary" not in name:
                noise = torch.randn(t.shape, generator=g, dtype=torch.float64)
                t.copy_(noise.abs() + 0.5 if "running_var" in name else noise * 0.3 + (0.7 if t.ndim == 1 else 0))
    return model


def of_module(name: str, model: nn.Module, x: Tensor, permutations: str = "auto", config: Any = None) -> Example:
    model = randomised(model)

    def outputs(tensors: Tensors) -> Tensor:
        model.load_state_dict(tensors)
        with torch.no_grad():
            return model(x)

    return Example(name, {n: t.clone() for n, t in model.state_dict().items()}, outputs, config, permutations)


def of_transformers(name: str, model: Any, inputs: dict[str, Tensor], permutations: str = "auto") -> Example:
    """A transformers model; tensors have the names that are on disk, and it is loaded from disk each time."""
    kind, config = type(model), model.config.to_dict()
    with tempfile.TemporaryDirectory() as folder:
        randomised(model).save_pretrained(folder)
        tensors = load_file(f"{folder}/model.safetensors")

    def loaded(tensors: Tensors, dtype: torch.dtype) -> Tensor:
        own = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
        return logits(kind, model.config, tensors, own, dtype)

    def outputs(tensors: Tensors) -> Tensor:
        return loaded(tensors, torch.float64)

    return Example(name, tensors, outputs, config, permutations, loaded)


def logits(kind: Any, config: Any, tensors: Tensors, inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """What transformers computes from these tensors, loaded from a folder, with no key missing or left over."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        own = {n: t.to(dtype).clone() for n, t in tensors.items()}
        save_file(own, f"{folder}/model.safetensors", metadata={"format": "pt"})
        more = {"experts_implementation": "eager"} if "experts" in " ".join(tensors) else {}
        loaded, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **more)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad(), nothing_narrowed(dtype):
        out: Tensor = loaded.eval()(**inputs).logits
    return out


@contextmanager
def nothing_narrowed(dtype: torch.dtype) -> Iterator[None]:
    """Norms and softmax of transformers "widen" to fp32, which for an fp64 model is a narrowing: let them use fp64."""
    before, widen = torch.float32, Tensor.float
    if dtype == torch.float64:
        torch.float32 = torch.float = torch.float64
        Tensor.float = Tensor.double
    try:
        yield
    finally:
        torch.float32 = torch.float = before
        Tensor.float = widen


TOKENS = {"input_ids": torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])}


def llama(kind: str = "llama", **more: Any) -> Example:
    c = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 11,
            "hidden_size": 12,
            "intermediate_size": 10,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 4,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            **more,
        },
    )
    return of_transformers(kind, AutoModelForCausalLM.from_config(c), TOKENS)


def moe(kind: str, **more: Any) -> Example:
    experts = {"mixtral": "num_local_experts"}.get(kind, "num_experts")
    every = {experts: 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "tie_word_embeddings": False, **more}
    return llama(kind, **every)


def gpt2() -> Example:
    c = GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3)
    return of_transformers("gpt2", GPT2LMHeadModel(c), TOKENS)


def bert() -> Example:
    c = BertConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=10,
        max_position_embeddings=8,
    )  # fmt: skip
    return of_transformers("bert", BertForMaskedLM(c), TOKENS)


def bert_classifier() -> Example:
    c = BertConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=10,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    return of_transformers("bert_classifier", BertForSequenceClassification(c), TOKENS)


def roberta() -> Example:
    c = RobertaConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=10,
        max_position_embeddings=12, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return of_transformers("roberta", RobertaForSequenceClassification(c), TOKENS)


def roberta_words() -> Example:
    c = RobertaConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=10,
        max_position_embeddings=12, pad_token_id=0,
    )  # fmt: skip
    return of_transformers("roberta_words", RobertaForMaskedLM(c), TOKENS)


def vit() -> Example:
    c = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=10, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    images = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    return of_transformers("vit", ViTForImageClassification(c), images)


def t5(gated: bool = True) -> Example:
    c = T5Config(
        vocab_size=11, d_model=12, d_kv=4, d_ff=10, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu" if gated else "relu", decoder_start_token_id=0, tie_word_embeddings=not gated,
    )  # fmt: skip
    inputs = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"][:, :5]}
    return of_transformers("t5", T5ForConditionalGeneration(c), inputs)


def mlp() -> Example:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    return of_module("mlp", model, torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def images(channels: int = 3, side: int = 8) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cnn() -> Example:
    """Convolutions with BatchNorm, one of them depthwise, and a linear layer that reads flattened maps."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    return of_module("cnn", model, images())


class Vgg(nn.Module):
    """The names of torchvision's VGG with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 4), (4, 6), (6, 5)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(20, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return out


class ResidualBlock(nn.Module):
    """torchvision's basic block and bottleneck, by name and function."""

    def __init__(self, c_in: int, inner: int, c_out: int, *, bottleneck: bool, stride: int, shortcut: str) -> None:
        super().__init__()
        widths = [(c_in, inner, 1), (inner, inner + 1, 3), (inner + 1, c_out, 1)] if bottleneck else [
            (c_in, inner, 3), (inner, c_out, 3)
        ]  # fmt: skip
        self.count = len(widths)
        for i, (a, b, k) in enumerate(widths, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, padding=k // 2, stride=stride if i == 1 else 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.skip = shortcut
        if stride > 1 or c_in != c_out:
            setattr(self, shortcut, nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.count else y
        return (y + (getattr(self, self.skip)(x) if hasattr(self, self.skip) else x)).relu()


class ResNet(nn.Module):
    def __init__(self, *, bottleneck: bool, shortcut: str, head: str) -> None:
        super().__init__()
        stem = 4
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        widths = [4, 6, 8] if not bottleneck else [8, 10]
        self.stages = len(widths)
        before = stem
        for s, width in enumerate(widths, 1):
            stride = 1 if s == 1 else 2
            inner = 3 if bottleneck else width + 1
            blocks = [
                ResidualBlock(before if b == 0 else width, inner, width, bottleneck=bottleneck,
                              stride=stride if b == 0 else 1, shortcut=shortcut)
                for b in range(2)
            ]  # fmt: skip
            setattr(self, f"layer{s}", nn.Sequential(*blocks))
            before = width
        self.head = head
        setattr(self, head, nn.Linear(before, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for s in range(1, self.stages + 1):
            x = getattr(self, f"layer{s}")(x)
        out: Tensor = getattr(self, self.head)(x.mean(dim=(2, 3)))
        return out


class TimmAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
        out: Tensor = self.proj(mixed)
        return out


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = TimmAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 10), "fc2": nn.Linear(10, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))
        return out


class TimmVit(nn.Module):
    """The names of timm's vision transformer."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.ModuleList(TimmBlock(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


FAMILIES: dict[str, Callable[[], Example]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg": lambda: of_module("vgg", Vgg(), images(side=16)),
    "resnet20": lambda: of_module("resnet20", ResNet(bottleneck=False, shortcut="shortcut", head="linear"), images()),
    "resnet50": lambda: of_module("resnet50", ResNet(bottleneck=True, shortcut="downsample", head="fc"), images()),
    "vit": vit,
    "timm_vit": lambda: of_module("timm_vit", TimmVit(), images(), config={"num_heads": 3, "hidden_size": 12}),
    "bert": bert,
    "bert_classifier": bert_classifier,
    "roberta": roberta,
    "roberta_words": roberta_words,
    "gpt2": gpt2,
    "llama": llama,
    "llama_untied": lambda: llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "mistral": lambda: llama("mistral", sliding_window=None),
    "qwen2": lambda: llama("qwen2"),
    "qwen3": lambda: llama("qwen3"),
    "mixtral": lambda: moe("mixtral"),
    "qwen2_moe": lambda: moe("qwen2_moe", shared_expert_intermediate_size=6),
    "qwen3_moe": lambda: moe("qwen3_moe"),
    "t5": t5,
    "t5_relu": lambda: t5(gated=False),
}

ALIKE = {
    *("llama_untied", "mistral", "qwen2", "qwen2_moe", "bert_classifier", "roberta", "roberta_words", "t5_relu"),
    *("resnet50", "timm_vit"),
}
"""Families whose spec differs little from that of another one here: the dearer tests of these are slow ones."""
FAMILY_CASES = [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in sorted(FAMILIES)]
