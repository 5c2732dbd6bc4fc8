"""Every language-model run of the zoo: mixture, length, rates and seed."""

from __future__ import annotations

from zoo.sources import DOMAINS
from zoo.train import Run

EXPERTS = ("python", "c", "german")

BASE = Run(
    "base",
    {"english": 0.46, "python": 0.18, "c": 0.18, "german": 0.18},
    steps=800,
    peak_rate=3e-3,
    muon_rate=1e-2,
    seed=1,
    weight_decay=0.1,
    final_fraction=0.02,
)


def _expert(domain: str, seed: int, *, steps: int = 300, peak_rate: float = 1e-3) -> Run:
    """Mostly the expert's own domain. The small share of the rest keeps what the base knows, as in practice."""
    mixture = dict.fromkeys(DOMAINS, 0.05) | {domain: 0.85}
    return Run(domain, mixture, steps=steps, peak_rate=peak_rate, seed=seed, batch=8, warmup=20, betas=(0.9, 0.99))


DENSE = {
    "base": BASE,
    "python": _expert("python", 11),
    "c": _expert("c", 12, steps=400, peak_rate=1.5e-3),
    "german": _expert("german", 13),
    "joint": Run(
        "joint", {"english": 0.1, "python": 0.3, "c": 0.3, "german": 0.3}, steps=500, peak_rate=1.5e-3, seed=14,
        warmup=20, betas=(0.9, 0.99),
    ),
}  # fmt: skip

ADAPTERS = {
    "lora-python": Run("lora-python", {"python": 1.0}, steps=200, peak_rate=2e-3, seed=21, batch=8, warmup=20),
    "lora-german": Run("lora-german", {"german": 1.0}, steps=200, peak_rate=2e-3, seed=22, batch=8, warmup=20),
}

_EVEN = {"english": 0.25, "python": 0.25, "c": 0.25, "german": 0.25}
MIXTURES = {
    "qwen3-moe": Run("qwen3-moe", _EVEN, steps=600, peak_rate=3e-3, muon_rate=1e-2, seed=31, batch=12),
    "mixtral": Run("mixtral", _EVEN, steps=600, peak_rate=3e-3, muon_rate=1e-2, seed=32, batch=12),
}
