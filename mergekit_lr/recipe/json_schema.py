"""JSON Schema of a recipe, for editors: completion, descriptions and errors while typing.

Draft-07, which editors' YAML support is built on. The method named by ``merge_method`` decides what its parameters
are. What a schema cannot say (counts of models, filters that match nothing) only `load_recipe` checks.
"""

from __future__ import annotations

from typing import Any

from mergekit_lr.method import Base, Declared, Method, Parameters
from mergekit_lr.recipe.calibration import MAX_LENGTH, MAX_SAMPLES, Calibration
from mergekit_lr.recipe.catalogue import plugins, value_schema
from mergekit_lr.recipe.entries import MAX_SLICES, MODEL_NAME
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.recipe.schema import DTYPES, NONFINITE
from mergekit_lr.recipe.stages import STAGE_NAME
from mergekit_lr.recipe.tokens import MAX_PAD, TEMPLATES
from mergekit_lr.recipe.walk import MAX_SEED
from mergekit_lr.registry import builtin_methods

REFERENCE = "folder, .safetensors file or Hub id, with @REVISION and +ADAPTER where wanted"


def schema() -> dict[str, Any]:
    """The schema with every built-in method; plug-ins are known by name, their parameters are left open."""
    methods = builtin_methods()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "mergekit_lr recipe",
        "type": "object",
        "required": ["merge_method"],
        "oneOf": [{"required": [layout]} for layout in ("models", "slices", "modules")],
        "additionalProperties": False,
        "properties": _root([*methods, *plugins()]),
        "allOf": [_case(method) for method in methods.values()],
    }


def _root(names: list[str]) -> dict[str, Any]:
    reference = _reference()
    parameters = {"type": ["object", "null"]}
    seed = {"type": ["integer", "null"], "minimum": 0, "exclusiveMaximum": MAX_SEED}
    return {
        "merge_method": {"enum": names, "description": "how to merge"},
        **_lists(reference, parameters),
        "modules": {
            "type": "object",
            "minProperties": 1,
            "description": "parts of the model (text_decoder, vision_tower, encoder, ...), each merged in its own way",
            "additionalProperties": {
                "type": "object",
                "oneOf": [{"required": ["models"]}, {"required": ["slices"]}],
                "additionalProperties": False,
                "properties": {
                    **_lists(reference, parameters),
                    "base_model": {"anyOf": [reference, {"type": "null"}], "description": "the base of this part"},
                    "parameters": parameters,
                },
            },
        },
        "base_model": {"anyOf": [reference, {"type": "null"}], "description": f"the base: {REFERENCE}"},
        "parameters": parameters,
        "dtype": {"enum": [*DTYPES, None], "description": "dtype to write, unless out_dtype says otherwise"},
        "out_dtype": {"enum": [*DTYPES, None], "description": "dtype to write"},
        "tokenizer_source": {**_tokenizer_source(), "description": "short for `tokenizer: {source: ...}`"},
        "tokenizer": _tokenizer(),
        "chat_template": {
            "type": ["string", "null"],
            "pattern": rf"^(auto|{'|'.join(TEMPLATES)})$|\{{[{{%]",
            "description": f"`auto` (what most models have), {', '.join(TEMPLATES)}, or a template in Jinja",
        },
        "seed": {**seed, "description": "decides everything random (default 0)"},
        "random_seed": {**seed, "description": "another name of seed"},
        "nonfinite": {"enum": [*NONFINITE, None], "description": "on NaN or infinity in an input (default error)"},
        "calibration": _calibration(),
        "permutations": {
            "type": ["string", "null"],
            "description": "`auto`, the name of a model family, or a file, for methods that align neurons",
        },
        "name": {
            "type": ["string", "null"],
            "pattern": f"^(?:{STAGE_NAME.pattern})$",
            "description": "what other recipes of this file call this one's output",
        },
        "stages": {
            "type": ["object", "null"],
            "additionalProperties": {"$ref": "#"},
            "description": "recipes by name, whose outputs this one uses as models",
        },
    }


def _lists(reference: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """``models`` and ``slices``, of a recipe or of a module."""
    return {
        "models": {
            "type": "array",
            "minItems": 1,
            "description": "the models to merge",
            "items": {
                "type": "object",
                "required": ["model"],
                "additionalProperties": False,
                "properties": {
                    "model": reference,
                    "name": {
                        "type": "string",
                        "pattern": f"^(?:{MODEL_NAME.pattern})$",
                        "description": "what the output calls it, for methods that keep models apart",
                    },
                    "parameters": parameters,
                    "layer_range": {"type": "array", "description": "all layers, or nothing: see slices"},
                },
            },
        },
        "slices": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_SLICES,
            "description": "runs of layers, which become the output's layers in this order",
            "items": _slice(reference, parameters),
        },
    }


def _tokenizer_source() -> dict[str, Any]:
    return {
        "type": ["string", "null"],
        "minLength": 1,
        "description": "`union`, `base`, or the model whose tokens the output knows (default union)",
    }


def _tokenizer() -> dict[str, Any]:
    """The section on the output's tokens."""
    reference = {"type": "string", "minLength": 1, "description": "a model of the recipe"}
    token = {"token": {"type": "string", "minLength": 1}, "token_id": {"type": "integer", "minimum": 0}}
    model_token = {
        "type": "object",
        "required": ["kind", "model"],
        "additionalProperties": False,
        "oneOf": [{"required": ["token"]}, {"required": ["token_id"]}],
        "properties": {"kind": {"const": "model_token"}, "model": reference, **token},
    }
    zero = {
        "type": "object",
        "required": ["kind"],
        "additionalProperties": False,
        "properties": {"kind": {"const": "zero"}},
    }
    rule = {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            "source": {"anyOf": [reference, model_token, zero, {"type": "null"}]},
            "force": {"type": ["boolean", "null"], "description": "also where a model has a row of its own"},
        },
    }
    return {
        "type": ["object", "null"],
        "description": "the tokens that the output knows, and where their embeddings come from",
        "additionalProperties": False,
        "properties": {
            "source": _tokenizer_source(),
            "tokens": {"type": ["object", "null"], "additionalProperties": rule, "description": "single tokens"},
            "pad_to_multiple_of": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_PAD},
        },
    }


def _reference() -> dict[str, Any]:
    """A model as one line of text, or as mergekit's mapping."""
    text = {"type": "string", "minLength": 1, "description": REFERENCE}
    revision = {"type": ["string", "null"], "description": "a branch, a tag or a commit"}
    apart = {
        "type": "object",
        "required": ["path"],
        "additionalProperties": False,
        "properties": {"path": text, "revision": revision},
    }
    either = {"anyOf": [text, apart]}
    whole = {
        "type": "object",
        "required": ["model"],
        "additionalProperties": False,
        "properties": {
            "model": either,
            "lora": {"anyOf": [text, apart, {"type": "null"}]},
            "override_architecture": {"type": ["string", "null"], "description": "has no effect"},
        },
    }
    return {"anyOf": [text, apart, whole]}


def _calibration() -> dict[str, Any]:
    """The text that a method runs a model on."""
    text = {"type": "string", "minLength": 1}
    return {
        "type": ["object", "null"],
        "description": "text that a model is run on, for methods that need it",
        "additionalProperties": False,
        "properties": {
            "text": {"anyOf": [text, {"type": "array", "minItems": 1, "items": text}], "description": "UTF-8 files"},
            "dataset": {**text, "description": "id of a dataset on the Hub"},
            "samples": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_SAMPLES,
                "description": f"windows of text (default {Calibration.samples})",
            },
            "sequence_length": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_LENGTH,
                "description": f"tokens in a window (default {Calibration.sequence_length})",
            },
            "statistics": {**text, "description": "a file that calibrate wrote, instead of running the model"},
        },
    }


def _slice(reference: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """One item of ``slices``."""
    return {
        "type": "object",
        "required": ["sources"],
        "additionalProperties": False,
        "properties": {
            "sources": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["model", "layer_range"],
                    "additionalProperties": False,
                    "properties": {
                        "model": reference,
                        "layer_range": {
                            "type": "array",
                            "minItems": 2,
                            "maxItems": 2,
                            "items": {"type": "integer", "minimum": 0},
                            "description": "the first layer and the one after the last, counted from 0",
                        },
                        "parameters": parameters,
                    },
                },
            },
            "base_model": {"anyOf": [reference, {"type": "null"}], "description": "the base of this slice"},
            "parameters": parameters,
        },
    }


def _case(method: Declared) -> dict[str, Any]:
    """What holds if ``merge_method`` is this method."""
    per_model, own = _parameters(method.PerModel), _parameters(method.Merge)
    if method.followed_by:  # whatever may follow: which one does, and what it takes, only `load_recipe` checks
        others = [m for m in builtin_methods().values() if isinstance(m, Method)]
        per_model = _either([per_model, *(_parameters(m.PerModel) for m in others)])
        own = {**_either([_parameters(m.Merge) for m in others]), **own}
    every = {**per_model, **own}
    sources = {"items": {"properties": {"parameters": _object(per_model)}}}
    lists = {
        "parameters": _object(every),
        "models": sources,
        "slices": {"items": {"properties": {"parameters": _object(every), "sources": sources}}},
    }
    then: dict[str, Any] = {"properties": {**lists, "modules": {"additionalProperties": {"properties": lists}}}}
    whole: dict[str, Any] = {}  # what a recipe for whole models needs; a slice or a module may bring its own
    required = [n for n, f in parameter_fields(method.Merge).items() if f.required]
    if required:
        whole["properties"] = {"parameters": {"type": "object", "required": required}}
        whole["required"] = ["parameters"]
    if method.base in (Base.REQUIRED, Base.OPERAND, Base.FRAME):
        whole.setdefault("properties", {})["base_model"] = {"type": "string"}
        whole["required"] = [*whole.get("required", []), "base_model"]
    if whole:
        then["anyOf"] = [whole, {"required": ["slices"]}, {"required": ["modules"]}]
    return {"if": {"properties": {"merge_method": {"const": method.name}}}, "then": then}


def _either(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters of several methods: one of the schemas that they have for a name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, one in ((n, p) for table in tables for n, p in table.items()):
        known = found.setdefault(name, [])
        if all(one["anyOf"] != k["anyOf"] for k in known):
            known.append(one)
    return {
        n: {"description": many[0]["description"], "anyOf": [a for one in many for a in one["anyOf"]]}
        for n, many in found.items()
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": ["object", "null"], "additionalProperties": False, "properties": properties}


def _parameters(model: type[Parameters]) -> dict[str, Any]:
    """Each parameter as a value, a gradient, or filters."""
    result = {}
    for name, info in parameter_fields(model).items():
        leaf = value_schema(model, name)
        gradient = {"type": "array", "minItems": 1, "items": leaf}
        value = leaf if info.takes_lists else {"anyOf": [leaf, gradient]}
        rule = {
            "type": "object",
            "required": ["value"],
            "additionalProperties": False,
            "properties": {"filter": {"type": ["string", "null"]}, "value": value},
        }
        text = info.info.description or ""
        if not info.required and info.default is not None:
            text += f" (default {info.coerce(info.default)})"
        result[name] = {
            "description": text,
            "anyOf": [value, rule, {"type": "array", "minItems": 1, "items": rule}],
        }
    return result
