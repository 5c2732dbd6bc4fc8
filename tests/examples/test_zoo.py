"""The committed models are what their table says, and the held-out text is what was recorded."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = EXAMPLES / "models"
HELDOUT = EXAMPLES / "text" / "heldout"
EXPERTS = ("python", "c", "german")
NAMES = ("base", *EXPERTS)


def losses() -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = json.loads((MODELS / "LOSSES.json").read_text())["models"]
    return table


def test_carried_files_stay_within_sixteen_megabytes() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "models", "text"], cwd=EXAMPLES, capture_output=True, check=False
    ).stdout.decode()
    files = [EXAMPLES / name for name in listed.split("\0") if name] or [p for p in MODELS.rglob("*") if p.is_file()]
    sizes = [p.stat().st_size for p in files]
    assert sum(sizes) <= 16_000_000
    assert max(sizes) < 4 * 2**20
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o044 == 0o044 for p in files)


@pytest.mark.parametrize("name", NAMES)
def test_folder_loads_without_a_stray_key(name: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(MODELS / name, output_loading_info=True)
    assert all(not keys for keys in info.values()), info
    assert model.dtype == torch.bfloat16
    window = json.loads((MODELS / "LOSSES.json").read_text())["window"]  # what it was trained and measured with
    assert model.config.max_position_embeddings == window
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    assert tokenizer.model_max_length == window
    assert len(tokenizer) == model.config.vocab_size
    ids = tokenizer("The file", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_base_is_sharded_as_its_index_says() -> None:
    index = json.loads((MODELS / "base" / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for shard in sorted((MODELS / "base").glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= dict.fromkeys(file.keys(), shard.name)
    assert found == index["weight_map"]
    assert len(set(found.values())) == 2


@pytest.mark.parametrize("text", ["plain", "tab\tand  spaces\n", "Größe: 5 µs — „ok“", "\x00\x7f €"])
def test_tokenizer_is_lossless(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < 1536


def test_heldout_text_is_the_recorded_text() -> None:
    manifest = json.loads((HELDOUT / "manifest.json").read_text())
    recorded = json.loads((MODELS / "LOSSES.json").read_text())["text"]
    assert set(manifest) == {"english", "python", "c", "german"}
    for domain, entry in manifest.items():
        raw = (HELDOUT / entry["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"] == recorded[domain]
        assert 64_000 <= len(raw) == entry["bytes"] <= 100_000
        assert all(document["licence"] for document in entry["documents"])


@pytest.mark.parametrize(("name", "domain"), [("base", "english"), ("c", "c"), ("german", "python")])
def test_recorded_loss_is_the_loss_by_plain_definition(name: str, domain: str) -> None:
    """Recompute with log-softmax in float64, one window at a time, on every third window of the slice."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    ids = torch.tensor(tokenizer((HELDOUT / f"{domain}.txt").read_text(encoding="utf-8"), verbose=False).input_ids)
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    each = []
    with torch.inference_mode():
        for window in windows[::3]:
            scores = model(window[None]).logits[0, :-1].double().log_softmax(-1)
            each.append(-scores.gather(1, window[1:, None]).mean().item())
    mean = sum(each) / len(each)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in each) / (len(each) - 1))
    # A third of the windows: three standard errors of such a sample around the mean over all.
    allowed = 3 * deviation / math.sqrt(len(each)) * math.sqrt(2 / 3)
    assert abs(mean - losses()[name][domain]) < allowed
    assert allowed < 0.3


@pytest.mark.parametrize("expert", EXPERTS)
def test_expert_gains_on_its_domain_and_not_elsewhere(expert: str) -> None:
    table = losses()
    for domain in ("english", *EXPERTS):
        gain = table["base"][domain] - table[expert][domain]
        assert gain >= 0.15 if domain == expert else gain <= 0.0


def test_a_plain_sum_of_task_vectors_beats_the_base_on_every_domain() -> None:
    """The point of the example: 0.4 of each task vector improves all three domains at once."""
    from zoo.text import heldout_tokens
    from zoo.train import heldout_loss

    models = {n: AutoModelForCausalLM.from_pretrained(MODELS / n, dtype=torch.float32) for n in NAMES}
    base = {k: v.clone() for k, v in models["base"].state_dict().items()}
    tuned = [models[n].state_dict() for n in EXPERTS]
    before = {d: heldout_loss(models["base"], heldout_tokens(d), 24) for d in EXPERTS}
    models["base"].load_state_dict({k: v + 0.4 * sum(t[k] - v for t in tuned) for k, v in base.items()})
    after = {d: heldout_loss(models["base"], heldout_tokens(d), 24) for d in EXPERTS}
    assert all(after[d] < before[d] - 0.03 for d in EXPERTS), (before, after)


@pytest.mark.parametrize("name", NAMES)
def test_card_states_the_recorded_losses(name: str) -> None:
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    row = next(line for line in card.splitlines() if re.fullmatch(r"\|( \d\.\d{4} \|){4}", line))
    assert [float(cell) for cell in row.strip("|").split("|")] == pytest.approx(list(losses()[name].values()), abs=1e-4)
