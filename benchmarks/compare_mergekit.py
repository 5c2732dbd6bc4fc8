"""Runs every recipe of the compatibility corpus here and in mergekit 0.1.5, and compares the outputs tensor by tensor.

    python benchmarks/compare_mergekit.py            # all; rewrites the result and the table in docs/mergekit.md
    python benchmarks/compare_mergekit.py slerp ties # only recipes whose name contains one of these

Recipes lie under ``tests/compat/recipes``. Each is run twice by both, on tiny random models of the architecture that
its kind is usually seen with. *As written*: on models in bfloat16. *In float32*: with ``dtype: float32`` and the same
output dtype, on the same models before they were rounded, so that both do the same arithmetic and no two magnitudes
are equal. Two values agree if they are at most one step of the output's 16-bit dtype apart, or, where terms cancel and
such a step is finer than fp32 itself, by what `ROUNDINGS` of the largest weight can lose.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tests" / "compat" / "recipes"
RESULT = ROOT / "benchmarks" / "results" / "compare-mergekit.json"
PAGE = ROOT / "docs" / "mergekit.md"
START, END = "<!-- comparison -->", "<!-- end of the comparison -->"
TOKENIZER = ROOT / "examples" / "models" / "base"
LAYERS, HIDDEN, VOCABULARY = 8, 32, 1536
ROUNDINGS = 8 * 2.0**-24
MODELS = ("base", "ft_a", "ft_b", "ft_c", "ft_d")

FAMILIES = {"slerp": "mistral", "ties": "mistral", "dare": "mistral", "bio": "mistral", "gradient": "llama"}
FAMILIES |= {"model_stock": "qwen2", "sce": "qwen2", "karcher": "qwen2", "arcee": "qwen2", "ram": "qwen2"}
FAMILIES |= {"nuslerp": "gemma2", "multislerp": "gemma2", "breadcrumbs": "gemma2"}

REASONS = {
    "random": "random masks: other generators, so other draws",
    "arithmetic": "there in 16-bit arithmetic, here in fp32 and rounded once",
    "selection": "there in 16-bit arithmetic; of equal magnitudes at a threshold any are kept there, the first here",
    "fusion": "entries at the threshold: there divergences in fp32 or less, here in fp64",
    "wider": "entries at the threshold; and there float32 is written whatever `dtype` says",
}

DRIVER = """
import contextlib, io, json, os
from pathlib import Path
import yaml
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import load_config, make_tasks

told = {}
root = Path.cwd()
for home, listed in json.loads(Path("jobs.json").read_text()).items():
    os.chdir(root / home)
    told[home] = {}
    for recipe, out in listed:
        LoaderCache.loaders.clear()
        options = MergeOptions(quiet=True, write_model_card=False, lora_merge_cache=out + "-loras", random_seed=0)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                text = Path(recipe).read_text()
                documents = list(yaml.safe_load_all(text))
                if len(documents) == 1:
                    run_merge(MergeConfiguration.model_validate(documents[0]), out, options)
                else:
                    between = out + "-stages"
                    Path(between).mkdir()
                    configs, uses = load_config(text, between)
                    tasks = make_tasks(configs, uses, options, between, out, False)
                    Executor(tasks, math_device="cpu", storage_device="cpu").execute()
                    if None not in configs:
                        Path(between, documents[-1]["name"]).rename(out)
            told[home][recipe] = "ok"
        except Exception as e:
            told[home][recipe] = f"{type(e).__name__}: {e}"
(root / "told.json").write_text(json.dumps(told))
"""

FORMS = {"as written": torch.bfloat16, "in float32": torch.float32}


def family_of(name: str) -> str:
    """The architecture of the models that a recipe is run on."""
    kind = name.partition("/")[2]
    return next((f for prefix, f in FAMILIES.items() if kind.startswith(prefix)), "llama")


def config_of(family: str) -> Any:
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

    known: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    more: dict[str, Any] = {"head_dim": 8} if family == "gemma2" else {}
    return (known | {"gemma2": Gemma2Config})[family](
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=family in ("qwen2", "gemma2"),
        **more,
    )


def write_models(family: str, root: Path, dtype: torch.dtype) -> None:
    """A base, four fine-tunes and an adapter, with a tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(family)
    root.mkdir()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    for name in MODELS:
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) * (0.0 if name == "base" else 0.004)
            tensor.copy_(base[key] + noise)
        copy = AutoModelForCausalLM.from_config(config, dtype=dtype)
        copy.load_state_dict(model.state_dict())
        copy.save_pretrained(root / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (root / name / file).write_bytes((TOKENIZER / file).read_bytes())
    lora = root / "lora"
    lora.mkdir()
    factors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for module in ("q_proj", "v_proj"):
            shape = base[f"model.layers.{layer}.self_attn.{module}.weight"].shape
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_"
            factors[f"{prefix}A.weight"] = torch.randn((4, shape[1]), generator=generator) * 0.05
            factors[f"{prefix}B.weight"] = torch.randn((shape[0], 4), generator=generator) * 0.05
    save_file(factors, lora / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "./base", "r": 4}
    settings |= {"lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "v_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(settings))


def documents_of(name: str, *, float32: bool) -> list[dict[str, Any]]:
    """A recipe's documents, as written or in float32."""
    found = [d for d in yaml.safe_load_all((RECIPES / f"{name}.yml").read_text()) if d]
    if float32:
        for document in found:
            out = document.get("out_dtype") or document.get("dtype") or "bfloat16"
            document |= {"dtype": "float32", "out_dtype": out}
    return found


def kind_of(name: str) -> str:
    """The line at the top of a recipe."""
    return (RECIPES / f"{name}.yml").read_text().splitlines()[0].removeprefix("# ")


def is_random(documents: list[dict[str, Any]]) -> bool:
    """Whether some mask is drawn: a method that draws, at a density below one."""
    text = json.dumps(documents)
    drawn = any(d["merge_method"].startswith(("dare", "della")) for d in documents)
    return drawn and '"density": 0' in text.replace("0.0", "0")


def read_output(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= load_file(shard)
    return state


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable values lie between the entries of two tensors of one 16-bit dtype."""
    ranks = []
    for x in (a, b):
        bits = x.contiguous().view(torch.int16).to(torch.int32)
        ranks.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ranks[0] - ranks[1]).abs()


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors, entries, entries beyond one step, the largest difference over the largest weight."""
    if set(ours) != set(theirs):
        missing, extra = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
        return {"layout": f"{len(missing)} tensors only there {missing[:2]}, {len(extra)} only here {extra[:2]}"}
    total = beyond = 0
    worst, wider = 0.0, False
    for name, mine in ours.items():
        other = theirs[name]
        if mine.shape != other.shape:
            return {"layout": f"{name}: {tuple(mine.shape)} against {tuple(other.shape)}"}
        if mine.dtype != other.dtype:
            wider, other = True, other.to(mine.dtype)
        if mine.element_size() != 2:
            return {"layout": f"{name} is {mine.dtype}"}
        apart = (mine.double() - other.double()).abs()
        scale = float(other.double().abs().max()) or 1.0
        far = (steps_apart(mine, other) > 1) & (apart > ROUNDINGS * scale)
        total, beyond, worst = total + mine.numel(), beyond + int(far.sum()), max(worst, float(apart.max()) / scale)
    found = {"tensors": len(ours), "entries": total, "beyond": beyond, "worst": worst}
    return found | ({"dtype": str(next(iter(theirs.values())).dtype)} if wider else {})


def run_both(names: list[str], work: Path, peer: Path) -> dict[str, dict[str, Any]]:
    """Every recipe in both forms, here and there; the results by name and form."""
    from mergekit_lr import merge
    from mergekit_lr.errors import MergekitLrError

    jobs: dict[str, list[tuple[str, str]]] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        family = family_of(name)
        for form, dtype in FORMS.items():
            home, stem = work / f"{family} {form}", name.replace("/", "-")
            if not home.exists():
                write_models(family, home, dtype)
            path = home / f"{stem}.yml"
            path.write_text(yaml.safe_dump_all(documents_of(name, float32=form != "as written"), sort_keys=False))
            jobs.setdefault(home.name, []).append((path.name, f"{stem}-there"))
            with contextlib.chdir(home):
                try:
                    merge(path.name, f"{stem}-here", device="cpu")
                except MergekitLrError as e:
                    found[name][form] = {"here": str(e)}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | quiet
    (work / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([str(peer), "-c", DRIVER], cwd=work, env=environment, check=True)
    told = json.loads((work / "told.json").read_text())
    for name in names:
        for form in FORMS:
            home, stem = work / f"{family_of(name)} {form}", name.replace("/", "-")
            answer = told[home.name][f"{stem}.yml"]
            if answer != "ok":
                found[name].setdefault(form, {})["there"] = answer.splitlines()[0][:200]
            elif "here" not in found[name].get(form, {}):
                here, there = read_output(home / f"{stem}-here"), read_output(home / f"{stem}-there")
                found[name][form] = compare(here, there)
    return found


def judge(name: str, result: dict[str, Any]) -> str:
    """Why two outputs differ: a key of `REASONS`, nothing where they do not, or what is to be looked into."""
    written, full = result["as written"], result["in float32"]
    documents = documents_of(name, float32=False)
    for form in (full, written):
        for side in ("here", "there", "layout"):
            if side in form:
                return f"{side}: {form[side]}"
    if is_random(documents):
        return "random"
    methods = {d["merge_method"] for d in documents}
    if "dtype" in written:
        return "wider" if methods == {"arcee_fusion"} else f"unexplained: written as {written['dtype']} there"
    if full["beyond"]:
        if "arcee_fusion" in methods and full["beyond"] / full["entries"] < 0.01:
            return "fusion"
        return f"unexplained: {full['beyond']} of {full['entries']} entries in float32"
    if written["beyond"]:
        return "selection" if methods & {"ties", "breadcrumbs", "breadcrumbs_ties", "sce"} else "arithmetic"
    return ""


def cell(form: dict[str, Any]) -> str:
    if "beyond" not in form:
        return "no"
    return "equal" if not form["beyond"] else f"{form['beyond'] / form['entries']:.2%} beyond"


def table(data: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    rows = ["| recipe | what it is | method | models | in float32 | as written | why not equal |", "|" + "---|" * 7]
    for name, result in data["recipes"].items():
        methods = ", ".join(f"`{d['merge_method']}`" for d in documents_of(name, float32=False))
        why = REASONS.get(result["why"], result["why"])
        both = f"{cell(result['in float32'])} | {cell(result['as written'])}"
        rows.append(f"| `{name}` | {kind_of(name)} | {methods} | {family_of(name)} | {both} | {why} |")
    return "\n".join(rows)


def renewed(page: str, data: dict[str, Any]) -> str:
    """The page with the table between its markers."""
    before, rest = page.split(START)
    return f"{before}{START}\n{table(data)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from tests.peer.environment import ensure

    wanted = sys.argv[1:]
    every = sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.glob("*/*.yml"))
    names = [n for n in every if not wanted or any(w in n for w in wanted)]
    with tempfile.TemporaryDirectory(prefix="compare-") as work:
        found = run_both(names, Path(work), ensure() / "python")
    for name in names:
        found[name]["why"] = judge(name, found[name])
    before = json.loads(RESULT.read_bytes())["recipes"] if wanted and RESULT.exists() else {}
    recipes = {name: (before | found)[name] for name in every if name in before or name in found}
    data = {"mergekit": "0.1.5", "torch": torch.__version__.partition("+")[0], "recipes": recipes}
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(renewed(PAGE.read_text(), data))
    open_questions = [n for n in names if found[n]["why"] and found[n]["why"] not in REASONS]
    print(f"{len(names)} recipes, {len(names) - len(open_questions)} equal or explained", *open_questions, sep="\n  ")
    return len(open_questions)


if __name__ == "__main__":
    sys.exit(main())
