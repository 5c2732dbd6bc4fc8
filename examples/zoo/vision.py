"""Small classifiers of handwritten digits from different seeds: the test bed of weight matching.

Plain state dicts, no configuration: three multilayer perceptrons and two vision transformers, trained on the
1,797 images of 8 x 8 that scikit-learn carries (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from zoo import WORK, card
from zoo.train import THREADS

MLP_SEEDS = (0, 1, 2)
VIT_SEEDS = (0, 1)
_TEST_IMAGES = 360
_SPLIT_SEED = 0


class Perceptron(nn.Module):
    """64 - 128 - 128 - 10 with ReLU. Hidden units of each layer may be permuted."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, 10)`` of images ``(n, 64)``."""
        hidden = self.fc2(self.fc1(images).relu()).relu()
        logits: Tensor = self.fc3(hidden)
        return logits


class Block(nn.Module):
    """Pre-norm attention and MLP. Heads, the MLP's units, and dimensions within a head may be permuted."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, tokens, width)`` to the same shape."""
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        y = self.norm1(x)
        q, k, v = (layer(y).view(split).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.o(mixed)
        out: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """Sixteen patches of 2 x 2 and a class token, two blocks of width 48 with four heads."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, 10)`` of images ``(n, 64)``."""
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = torch.cat([self.class_token.expand(len(images), -1, -1), self.patch(patches)], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``(1437, 64)`` in [0, 1] and labels, then 360 test images and labels; a fixed split."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    images = torch.tensor(bunch.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)[order]
    return images[_TEST_IMAGES:], labels[_TEST_IMAGES:], images[:_TEST_IMAGES], labels[:_TEST_IMAGES]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified right."""
    return float((model(images).argmax(dim=1) == labels).double().mean())


def train(model: nn.Module, seed: int, epochs: int, weight_decay: float = 0.01) -> None:
    """AdamW with a linear decay, batches of 64 in an order drawn from ``seed``."""
    images, labels, _, _ = digits()
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=weight_decay)
    steps = epochs * (len(images) // 64)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(images), (64,), generator=random)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def build() -> None:
    """Train the five classifiers and write ``.safetensors``, a JSON with accuracies beside each, and a card."""
    torch.set_num_threads(THREADS)
    folder = WORK / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_build_one(folder, "mlp", seed) for seed in MLP_SEEDS]
    rows += [_build_one(folder, "vit", seed) for seed in VIT_SEEDS]
    text = f"""# Digit classifiers

{__doc__.split(chr(10), 2)[2].strip()}

Batches of 64, AdamW, the split and the batch order seeded; float32.

{card.table(("file", "parameters", "training accuracy", "test accuracy"), rows)}
Licence: Apache-2.0.
"""
    card.write(folder, card.header(["vision", "example"], "pytorch") + text)


def _build_one(folder: Path, kind: str, seed: int) -> list[str]:
    torch.manual_seed(seed)
    model = Perceptron() if kind == "mlp" else VisionTransformer()
    epochs = 40 if kind == "mlp" else 60
    train(model, seed, epochs)
    train_images, train_labels, test_images, test_labels = digits()
    facts = {
        "architecture": type(model).__name__,
        "seed": seed,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_accuracy": round(accuracy(model, train_images, train_labels), 4),
        "test_accuracy": round(accuracy(model, test_images, test_labels), 4),
    }
    path = folder / f"{kind}-{seed}.safetensors"
    save_file(model.state_dict(), path, metadata={"format": "pt"})
    path.chmod(0o644)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return [path.name, f"{facts['parameters']:,}", f"{facts['train_accuracy']:.3f}", f"{facts['test_accuracy']:.3f}"]
