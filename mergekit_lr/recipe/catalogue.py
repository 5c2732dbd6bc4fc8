"""What methods there are and what they take, as plain data: for ``methods``, the schema and the docs."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from mergekit_lr.method import Base, Declared, Parameters
from mergekit_lr.recipe.fields import parameter_fields
from mergekit_lr.registry import GROUP, builtin_methods, get_method

BASE_IN_WORDS = {
    Base.REQUIRED: "base_model is required: deltas are taken from it",
    Base.OPTIONAL: "base_model is optional: with it, the method works on deltas",
    Base.OPERAND: "base_model is required: it is the first of the inputs",
    Base.FRAME: "base_model is required: it gives everything that the models do not",
    Base.UNUSED: "base_model is optional: it gives config and tokenizer, and is merged like the other models",
}
_RANGE = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
}


def value_schema(model: type[Parameters], name: str) -> dict[str, Any]:
    """JSON Schema of one value of a parameter: type and range, without title, default and description."""
    schema = model.model_json_schema(by_alias=True)
    found = dict(schema["properties"][name])
    if "$defs" in schema:
        found = _inlined(found, schema["$defs"])
    return {k: v for k, v in found.items() if k not in ("title", "default", "description")}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        target = definitions[schema["$ref"].rpartition("/")[2]]
        rest = {k: v for k, v in schema.items() if k != "$ref"}
        return _inlined({**target, **rest}, definitions)
    return {k: _inlined(v, definitions) for k, v in schema.items()}


def describe_parameters(model: type[Parameters]) -> list[dict[str, Any]]:
    """Name, type, range, default and meaning of each parameter, in the order of the class."""
    return [
        {
            "name": name,
            "type": info.kind(),
            "range": _range(value_schema(model, name)),
            "required": info.required,
            "default": info.coerce(info.default) if not info.required else None,
            "description": info.info.description or "",
        }
        for name, info in parameter_fields(model).items()
    ]


def _range(schema: dict[str, Any]) -> str:
    options = [schema, *schema.get("anyOf", [])]
    parts = [text.format(o[key]) for o in options for key, text in _RANGE.items() if key in o]
    return ", ".join(parts)


def describe(method: Declared, origin: str = "built-in") -> dict[str, Any]:
    """A method as plain data, as ``methods NAME --json`` prints it."""
    return {
        "name": method.name,
        "summary": method.summary,
        "origin": origin,
        "source": {"title": method.source.title, "link": method.source.link},
        "base": str(method.base),
        "base_model": BASE_IN_WORDS[method.base],
        "min_models": method.min_models,
        "max_models": method.max_models,
        "commutes": method.commutes,
        "stochastic": method.stochastic,
        "parameters": describe_parameters(method.Merge),
        "model_parameters": describe_parameters(method.PerModel),
    }


def plugins() -> dict[str, str]:
    """Distribution and version by name of every plug-in method. None of them is imported."""
    builtin = builtin_methods()
    return {
        p.name: f"{p.dist.name} {p.dist.version}" if p.dist else "unknown distribution"
        for p in sorted(entry_points(group=GROUP), key=lambda p: p.name)
        if p.name != "builtin" and p.name not in builtin
    }


def methods(name: str | None = None) -> dict[str, Any] | list[dict[str, Any]]:
    """One method in full, or all of them: built-in ones in full, plug-ins by name and distribution only.

    Raises:
        RecipeError: there is no method of that name.
    """
    if name is not None:
        return describe(get_method(name), plugins().get(name, "built-in"))
    listed = [describe(m) for m in builtin_methods().values()]
    return listed + [{"name": n, "summary": "plug-in, loaded when named", "origin": d} for n, d in plugins().items()]
