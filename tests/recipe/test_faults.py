"""Faulty recipes: every fault is found at its line and column, and with it what to do.

In the texts below ``¦`` stands before the place that the message must name; it is not part of the recipe.
"""

from __future__ import annotations

import pytest

from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe import load_recipe
from mergekit_lr.recipe.calibration import Calibration
from mergekit_lr.recipe.entries import MAX_SLICES, MAX_SOURCES
from mergekit_lr.recipe.load import check

MARKER = "¦"


def split(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without markers, and line and column (from 1) of each marker."""
    places = []
    lines = marked.split("\n")
    for number, line in enumerate(lines, 1):
        for i, _ in enumerate(line.split(MARKER)[:-1]):
            places.append((number, len("".join(line.split(MARKER)[: i + 1])) + 1))
    return marked.replace(MARKER, ""), places


def problems_of(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    return list(caught.value.problems)


def test_the_marker_gives_the_place_that_an_editor_shows() -> None:
    assert split("a: ¦1\n  ¦b: ¦2") == ("a: 1\n  b: 2", [(1, 4), (2, 3), (2, 6)])


def ties(models: str = "", rest: str = "", weight: str = "0.5", density: str = "0.5") -> str:
    return (
        "merge_method: ties\nbase_model: ./base\nmodels:\n"
        f"  - model: ./a\n    parameters: {{weight: {weight}, density: {density}}}\n"
        f"  - model: ./b\n    parameters: {{weight: 0.5}}\n{models}{rest}"
    )


def linear(rest: str = "", entry: str = "{model: ./b, parameters: {weight: 1}}") -> str:
    return f"merge_method: linear\nmodels:\n  - {{model: ./a, parameters: {{weight: 1}}}}\n  - {entry}\n{rest}"


def tokens(source: str) -> str:
    """A recipe that says where the rows of the token ``a`` come from."""
    return linear(f"tokenizer: {{tokens: {{a: {{source: {source}}}}}}}\n")


def pleas(rest: str) -> str:
    """A method that takes ``calibration`` and ``permutations``."""
    return f"merge_method: pleas\nmodels: [{{model: ./a}}, {{model: ./b}}]\n{rest}\n"


def reversible(name: str, rest: str = "{basis: 1}") -> str:
    """A method that takes names of models."""
    models = f"[{{model: ./a, name: {name}}}, {{model: ./b, name: x}}]"
    return f"merge_method: reversible\nbase_model: ./base\nmodels: {models}\nparameters: {rest}\n"


def module(method: str, models: str, rest: str = "") -> str:
    return f"merge_method: {method}\n{rest}modules: {{a: {{models: {models}}}}}\n"


def slerp(parameters: str = "{t: 0.5}") -> str:
    return f"merge_method: slerp\nbase_model: ./a\nmodels:\n  - model: ./a\n  - model: ./b\nparameters: {parameters}\n"


FAULTS = [
    # misspelt and misplaced keys
    (ties(rest="¦dtpye: bfloat16\n"), "dtpye: unknown key; did you mean 'dtype'?"),
    (ties(rest="¦paramters: {lambda: 1}\n"), "did you mean 'parameters'?"),
    (linear("¦base_modl: ./a\n"), "did you mean 'base_model'?"),
    (linear("¦outdtype: float16\n"), "did you mean 'out_dtype'?"),
    (linear("¦tokeniser_source: base\n"), "did you mean 'tokenizer_source'?"),
    (linear("¦non_finite: warn\n"), "did you mean 'nonfinite'?"),
    (linear("¦sead: 3\n"), "did you mean 'seed'?"),
    (linear("¦weights: 3\n"), "unknown key"),
    (linear("¦colour: red\n"), "known here:"),
    (linear("¦normalize: false\n"), "it is a parameter of linear: put it under `parameters`"),
    (linear("¦1: 2\n"), "unknown key"),
    (linear(entry="{¦modle: ./b, parameters: {weight: 1}}"), "models[1].modle: unknown key; did you mean 'model'?"),
    (linear(entry="{model: ./b, ¦parametrs: {weight: 1}}"), "models[1].parametrs: unknown key; did you mean"),
    (linear(entry="{model: ./b, parameters: {weight: 1}, ¦weight: 2}"), "put it under this model's `parameters`"),
    (linear(entry="{model: ./b, parameters: {¦wieght: 1}}"), "models[1].parameters.wieght: unknown parameter; did you"),
    (
        linear(entry="{model: ./b, parameters: {weight: 1, ¦normalize: false}}"),
        "put it under the recipe's `parameters`",
    ),
    (linear("parameters: {¦normalise: true}\n"), "did you mean 'normalize'?"),
    (linear("parameters: {¦random_seed: 3}\n"), "random_seed is a key of the recipe itself"),
    (linear("parameters: {¦dtype: float16}\n"), "dtype is a key of the recipe itself"),
    (linear("parameters: {¦denisty: 0.5}\n"), "parameters.denisty: unknown parameter"),
    (ties("  - {model: ./c, parameters: {weight: 1, ¦densty: 1}}\n"), "models[2].parameters.densty"),
    (linear("seed: 1\n¦random_seed: 2\n"), "says the same as seed"),
    # values of the wrong type
    (ties(weight="¦abc"), "models[0].parameters.weight: 'abc' is not a number; write a number"),
    (ties(weight="¦true"), "true is not a number"),
    (
        ties(weight="¦{a: 1}").replace("{a: 1}", "{value: 1, 2: 3}").replace("¦", "", 1).replace("2:", "¦2:"),
        "unknown key",
    ),
    (ties(weight="¦null"), "has no value; write a number or remove it"),
    (ties(weight="¦[]"), "is an empty list"),
    (ties(weight="[0.1, ¦x]"), "models[0].parameters.weight[1]: 'x' is not a number"),
    (ties(weight="¦[0.1, [0.2]]"), "must be a value, a list of values, or a list of filters"),
    (ties(weight="[{filter: mlp, value: ¦x}, {value: 1}]"), "weight[0].value: 'x' is not a number"),
    (ties(weight="[{filter: ¦3, value: 1}, {value: 1}]"), "weight[0].filter: must be text"),
    (ties(weight="[¦{filter: mlp}, {value: 1}]"), "weight[0]: has no value"),
    (ties(weight="[{¦filtre: mlp, value: 1}, {value: 1}]"), "did you mean 'filter'?"),
    (ties(weight="¦[{filter: mlp, value: 1}, 0.5]"), "must be a value, a list of values, or a list of filters"),
    (ties(rest="parameters: {normalize: ¦maybe}\n"), "'maybe' is not true or false"),
    (ties(rest="parameters: {normalize: ¦2}\n"), "2 is not true or false"),
    (ties(rest="parameters: {threshold_scope: ¦layer}\n"), "'layer' is not one of tensor, model"),
    (ties(rest="parameters: ¦3\n"), "parameters: must be a mapping"),
    (linear("seed: ¦-1\n"), "-1 is not a seed"),
    (linear("seed: ¦1.5\n"), "1.5 is not a seed"),
    (linear("seed: ¦true\n"), "True is not a seed"),
    (linear("dtype: ¦bf16\n"), "unknown value 'bf16'; did you mean 'bfloat16'?"),
    (linear("dtype: ¦[float16]\n"), "dtype: must be a single value"),
    (linear("out_dtype: ¦int8\n"), "out_dtype: unknown value 'int8'"),
    (linear("nonfinite: ¦ignore\n"), "unknown value 'ignore'"),
    (linear(entry="¦./b"), "models[1]: must be a mapping; write `- model: PATH`"),
    (linear(entry="{model: ¦7, parameters: {weight: 1}}"), "models[1].model: must be text"),
    (linear(entry="{model: ¦[a], parameters: {weight: 1}}"), "models[1].model: must be one line of text"),
    (linear(entry="{model: ¦'a+b+c', parameters: {weight: 1}}"), "has more than one adapter"),
    (linear(entry="{model: ¦'org/name@', parameters: {weight: 1}}"), "which is not PATH[@REVISION]"),
    (linear(entry="¦{parameters: {weight: 1}}"), "models[1]: names no model"),
    ("merge_method: linear\nmodels: ¦./a\n", "models: must be a list"),
    ("merge_method: linear\nmodels: ¦[]\n", "models: is empty"),
    ("merge_method: ¦3\nmodels: [{model: ./a}]\n", "must be the name of a method"),
    ("merge_method: ¦teis\nmodels: [{model: ./a}]\n", "there is no method 'teis'; did you mean 'ties'?"),
    ("merge_method: ¦''\nmodels: [{model: ./a}]\n", "must be the name of a method"),
    ("¦- merge_method: linear\n", "a recipe is a mapping"),
    # out of range
    (ties(density="¦1.5"), "density: 1.5 is out of range; it must be at most 1"),
    (ties(density="¦-0.1"), "density: -0.1 is out of range; it must be at least 0"),
    (ties(density="[1, ¦2, 1]"), "density[1]: 2 is out of range"),
    (ties(density="[{filter: mlp, value: [0.5, ¦-1]}, {value: 1}]"), "density[0].value[1]: -1 is out of range"),
    (ties(weight="¦.nan"), "nan is not a finite number"),
    (ties(weight="¦1e999"), "inf is not a finite number"),
    (slerp("{t: ¦.inf}"), "parameters.t: inf is not a finite number"),
    ("merge_method: karcher\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {max_iter: ¦1.5}\n", "a whole number"),
    # what is missing, and counts
    ("¦models: [{model: ./a}]\n", "merge_method: is missing"),
    ("¦merge_method: linear\n", "models: is missing"),
    (
        "merge_method: ¦ties\nmodels: [{model: ./a, parameters: {weight: 1}}]\n",
        "base_model: is missing, and ties needs",
    ),
    ("merge_method: ties\nbase_model: ¦null\nmodels: [{model: ./a, parameters: {weight: 1}}]\n", "is empty, and ties"),
    (linear(entry="¦{model: ./b}"), "models[1]: weight is missing, and linear needs one for each model"),
    (slerp("{}").replace("slerp", "¦slerp"), "parameters: t is missing, and slerp needs it"),
    (
        slerp()
        .replace("  - model: ./b", "  - model: ./b\n  - model: ./c")
        .replace("  - model: ./a", "  ¦- model: ./a"),
        "3",
    ),
    ("merge_method: ties\nbase_model: ./a\nmodels: ¦[{model: ./a}]\n", "at least 1 model beside the base; here are 0"),
    (linear().replace("linear", "¦linear").replace("weight: 1}", "weight: 0}"), "the weights sum to zero"),
    (linear().replace("linear", "¦linear").replace("1}", "[1, -1]}", 1), "the weights sum to zero"),
    # what is not supported
    # tokens
    (linear("chat_template: ¦chatlm\n"), "chat_template: 'chatlm' is no chat template; did you mean 'chatml'?"),
    (linear("tokenizer: ¦union\n"), "tokenizer: must be a mapping; write `tokenizer: {source: union}`"),
    (linear("¦tokenizer_source: base\ntokenizer: {source: union}\n"), "cannot stand beside tokenizer"),
    (linear("tokenizer_source: ¦[a]\n"), "must be `union`, `base` or a model"),
    (linear("tokenizer_source: ¦a+b+c\n"), "has more than one adapter"),
    (linear("tokenizer: {¦sorce: base}\n"), "tokenizer.sorce: unknown key; did you mean 'source'?"),
    (linear("tokenizer: {pad_to_multiple_of: ¦0}\n"), "0 is no count of rows; write a whole number from 1"),
    (linear("tokenizer: {tokens: ¦[a]}\n"), "must map tokens to their sources"),
    (linear("tokenizer: {tokens: {a: ¦./a}}\n"), "tokenizer.tokens.a: must be a mapping"),
    (linear("tokenizer: {tokens: {a: {¦forse: true}}}\n"), "unknown key; did you mean 'force'?"),
    (linear("tokenizer: {tokens: {a: {source: ./a, force: ¦1}}}\n"), "force: must be true or false"),
    (linear("tokenizer: {tokens: {a: ¦{force: true}}}\n"), "force has nothing to force"),
    (linear("tokenizer: {tokens: {a: {source: ¦./c}}}\n"), "'./c' is no model of this recipe"),
    (linear("tokenizer: {tokens: {a: {source: {kind: ¦zeros}}}}\n"), "unknown kind 'zeros'; did you mean 'zero'?"),
    (linear("tokenizer: {tokens: {a: {source: ¦{kind: model_token, model: ./a}}}}\n"), "names no token"),
    (linear("tokenizer: {tokens: {a: {source: {kind: model_token, model: ¦./c, token: b}}}}\n"), "'./c' is no model"),
    (
        linear("tokenizer: {tokens: {a: {source: {kind: model_token, model: ./a, token_id: ¦-1}}}}\n"),
        "-1 is no token_id",
    ),
    (linear("tokenizer: {tokens: {'': ¦{source: ./a}}}\n"), "is no token; name one"),
    (tokens("¦[./a]"), "tokens.a.source: must be a model or a mapping; write `source: MODEL`"),
    (tokens("¦{model: {path: ./c}}"), "tokens.a.source: './c' is no model of this recipe"),
    (tokens("¦{model: ./a}"), "tokens.a.source.kind: kind is missing; known here: model_token, zero"),
    (tokens("{kind: ¦[zero]}"), "unknown kind a list"),
    (tokens("{kind: zero, ¦token: b}"), "tokens.a.source.token: has no meaning for kind zero; remove it"),
    (tokens("{kind: model_token, model: ¦{path: ./c}, token: b}"), "source.model: './c' is no model of this recipe"),
    (tokens("¦{kind: model_token, token: b}"), "tokens.a.source: model is missing; write `source: MODEL`"),
    (tokens("¦{kind: model_token, model: ./a, token: b, token_id: 1}"), "names the token twice; give one of token and"),
    (tokens("{kind: model_token, model: ./a, token: ¦[b]}"), "source.token: a list is no token"),
    (tokens("{kind: model_token, model: ./a, token_id: ¦{b: 1}}"), "source.token_id: a mapping is no token_id"),
    # what a model is run on, and how its neurons move
    (pleas("calibration: ¦[a]"), "calibration: must be a mapping; write `calibration: {text: [FILE]}`"),
    (pleas("calibration: {¦texts: [a]}"), "calibration.texts: unknown key; did you mean 'text'?"),
    (pleas("calibration: ¦{samples: 3}"), "calibration: says nothing to run on; add `text: [FILE]`"),
    (pleas("calibration: ¦{text: []}"), "calibration: says nothing to run on"),
    (pleas("calibration: {text: [a, ¦3]}"), "calibration.text: must be file names; write `text: [a.txt, b.txt]`"),
    (pleas("calibration: {text: ¦''}"), "calibration.text: must be file names"),
    (pleas("calibration: {dataset: ¦[a]}"), "calibration.dataset: must be one line of text; write `dataset: NAME`"),
    (pleas("calibration: {text: a, samples: ¦0}"), "samples: 0 is no count; write a whole number from 1 to 1,000,000"),
    (pleas("calibration: {text: a, sequence_length: ¦[1]}"), "calibration.sequence_length: a list is no count"),
    (pleas("permutations: ¦[a]"), "permutations: must be one line of text; write `auto`, the name of a family, or"),
    (pleas("permutations: ¦''"), "permutations: must be one line of text"),
    (linear("¦permutations: auto\n"), "permutations: is not used by linear; remove it"),
    # names of models
    (linear(entry="{model: ./b, ¦name: b, parameters: {weight: 1}}"), "models[1].name: is not used by this method"),
    (reversible("¦a b"), "models[0].name: must be letters, digits, dots, underscores and hyphens, at most 64"),
    (reversible("¦[a]"), "models[0].name: must be letters, digits"),
    (reversible("x").replace("{model: ./b", "¦{model: ./b"), "models[1].name: 'x' is the name of models[0] too"),
    # a method's own check of one value, and a method that another follows
    (
        "merge_method: weight_matching\nbase_model: ./a\nmodels: [{model: ./b, parameters: {weight: 1}}]\n"
        "parameters: {then: [¦{filter: mlp}, {value: linear}]}\n",
        "parameters.then[0]: has no value",
    ),
    # modules
    (module("slerp", "[{model: ./m}, {model: ./n}]", "base_model: ./m\n").replace("a:", "¦a:"), "a: t is missing, and"),
    (
        module("linear", "[{model: ./m, parameters: {weight: 1}}]", "base_model: ./x\n").replace("a:", "¦a:"),
        "modules.a: the base is merged too: linear takes every model; it has no weight; write `base_model: ~`",
    ),
    (module("karcher", "[{model: ¦3}, {model: ./n}]", "base_model: ./x\n"), "modules.a.models[0].model: must be text"),
    (
        "merge_method: passthrough\nmodules: {a: ¦{models: [{model: ./m}], slices: []}}\n",
        "modules.a: has both models and slices; give it one of the two",
    ),
    ("merge_method: passthrough\nmodules: ¦{}\n", "modules: is empty"),
    ("merge_method: passthrough\nmodules: ¦[]\n", "modules: must be a mapping"),
    ("merge_method: passthrough\nmodules: {a: ¦{}}\n", "modules.a: has neither models nor slices"),
    ("merge_method: passthrough\nmodules: {a: ¦3}\n", "modules.a: must be a mapping"),
    ("merge_method: passthrough\nmodules: {a: {models: [{model: ./m}], ¦slcies: 3}}\n", "modules.a.slcies: unknown"),
    ("merge_method: slerp\nmodules: {¦a: {models: [{model: ./m}, {model: ./n}], parameters: {t: 1}}}\n", "base_model"),
    (
        "merge_method: passthrough\nmodules: {a: {models: ¦[{model: ./m}, {model: ./n}]}}\n",
        "exactly 1 model; here are 2",
    ),
    ("merge_method: linear\nmodules: {a: {models: [¦{model: ./m}]}}\n", "weight is missing"),
    (
        linear("¦modules: {a: {models: [{model: ./m, parameters: {weight: 1}}]}}\n"),
        "modules: cannot stand beside models",
    ),
]


@pytest.mark.parametrize(("marked", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_a_fault_is_named_at_its_place(marked: str, message: str) -> None:
    text, [(line, column)] = split(marked)
    [problem] = problems_of(text)
    assert problem.startswith(f"recipe:{line}:{column}: ")
    assert message in problem
    assert "\n" not in problem


def test_there_are_sixty_faults_and_more() -> None:
    assert len(FAULTS) >= 60
    assert all(marked.count(MARKER) == 1 for marked, _ in FAULTS)


FIVE = """\
# five mistakes
merge_method: ties
base_model: ./base
models:
  - model: ./math
    parameters:
      weight: 0.5
      ¦densty: 0.3
  - model: ./code
    parameters:
      weight: ¦half
      density: [0.2, ¦1.2]
¦dytpe: bfloat16
out_dtype: ¦float17
"""


def test_five_mistakes_are_five_problems_in_the_order_of_the_text() -> None:
    text, places = split(FIVE)
    problems = problems_of(text)
    assert [p.split(": ")[0] for p in problems] == [f"recipe:{line}:{column}" for line, column in places]
    assert places == [(8, 7), (11, 15), (12, 22), (13, 1), (14, 12)]
    keys = ["densty", "weight", "density[1]", "dytpe", "out_dtype"]
    assert all(key in problem for key, problem in zip(keys, problems, strict=True))


def test_the_error_itself_is_one_line_that_counts_the_rest() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(split(FIVE)[0])
    assert str(caught.value) == caught.value.problems[0] + " [and 4 more]"
    assert caught.value.exit_code == 3


def test_a_fault_causes_no_second_problem() -> None:
    """A misspelt required parameter is not reported as missing too, nor a method's parameters as unknown."""
    assert len(problems_of(linear(entry="{model: ./b, parameters: {wight: 1}}"))) == 1
    assert len(problems_of(linear().replace("linear", "lineer"))) == 1
    assert len(problems_of(ties(weight="x", density="y"))) == 2


def test_a_file_is_named_as_it_was_given(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my recipe.yml").write_text(linear("dtype: bf16\n"))
    with pytest.raises(RecipeError) as caught:
        load_recipe("my recipe.yml")
    assert caught.value.problems[0].startswith("my recipe.yml:5:8: dtype: ")


def test_a_hundred_problems_are_enough() -> None:
    text = linear("".join(f"key{i}: 1\n" for i in range(5000)))
    assert len(problems_of(text)) == 100


def test_a_dict_gives_paths_without_lines() -> None:
    source = {
        "merge_method": "ties",
        "base_model": "./base",
        "models": [{"model": "./a", "parameters": {"weight": "x", "densty": 1}}],
        "dtype": "bf16",
        7: 1,
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)  # type: ignore[arg-type]
    assert caught.value.problems == ("recipe: 7: a key must be a string, not int",)
    del source[7]
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert sorted(p.split(": ")[1] for p in caught.value.problems) == [
        "dtype",
        "models[0].parameters.densty",
        "models[0].parameters.weight",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the recipe is empty"),
        ("\n", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("~\n", "the recipe is empty"),
        ("3\n", "a recipe is a mapping"),
        ("no_such_file.yml", "there is no such recipe"),
        ("a\0b", "cannot read the recipe"),
        (".", "cannot read the recipe"),
        (3, "a recipe cannot be made from int"),
        (None, "a recipe cannot be made from NoneType"),
        ({"merge_method": object()}, "merge_method: object has no place in a recipe"),
    ],
)
def test_what_is_no_recipe_at_all(source: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_check_is_load_recipe() -> None:
    with pytest.raises(RecipeError, match="did you mean 'dtype'"):
        check(linear("dtpye: float32\n"))
    assert check(linear()) == load_recipe(linear())


def test_a_dict_that_holds_itself() -> None:
    source: dict[str, object] = {"merge_method": "linear"}
    source["models"] = [source]
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert "nested deeper than 32 levels" in str(caught.value)


def sliced(sources: str, rest: str = "", method: str = "linear\nparameters: {weight: 1}") -> str:
    return f"merge_method: {method}\nslices:\n  - {rest}sources: {sources}\n"


SLICE_FAULTS = [
    (sliced("[¦{model: a}]"), "slices[0].sources[0]: has no layer_range"),
    (sliced("[{model: a, layer_range: ¦[0]}]"), "layer_range: must be two numbers"),
    (sliced("[{model: a, layer_range: [0, ¦1.5]}]"), "layer_range[1]: 1.5 is not a layer"),
    (sliced("[{model: a, layer_range: [¦-1, 2]}]"), "-1 is not a layer"),
    (sliced("[{model: a, layer_range: ¦[2, 2]}]"), "[2, 2] holds no layer"),
    (sliced("[{model: a, ¦layer_rnge: [0, 2]}]"), "did you mean 'layer_range'?"),
    (sliced("[{model: a, layer_range: [0, 2]}, ¦{model: a, layer_range: [2, 4]}]"), "the same model as slices[0]"),
    (sliced("[{model: a, layer_range: [0, 2]}, {model: b, layer_range: ¦[2, 5]}]"), "holds 3 layers where that of"),
    (sliced("¦[]"), "slices[0].sources: is empty"),
    (sliced("[{model: a, layer_range: [0, 2]}]", "¦weight: 1\n    "), "put it under this slice's `parameters`"),
    (sliced("[{model: a, layer_range: [0, 2]}]") + "models: [{model: a}]\n", "cannot stand beside models"),
    (
        sliced("¦[{model: a, layer_range: [0, 2]}]", "base_model: b\n    ", "ties\nparameters: {weight: 1}"),
        "do not list the base 'b'",
    ),
    (sliced("¦[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]", method="passthrough"), "here are 2"),
    (
        sliced("[{model: a, layer_range: [0, 2]}]") + "  - ¦3\n",
        "slices[1]: must be a mapping; write `- sources: [...]`",
    ),
    (
        sliced("[{model: a, layer_range: [0, 2]}]") + "  - ¦{parameters: {weight: 1}}\n",
        "slices[1]: has no sources; add",
    ),
    (
        sliced("[{model: a, layer_range: [0, 2]}]", method="ties\nparameters: {weight: 1}").replace("- s", "- ¦s"),
        "slices[0]: has no base_model, and ties needs it; add `base_model: PATH_OR_HUB_ID` to the slice or to the",
    ),
    (
        sliced(
            "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]", method="slerp\nbase_model: a"
        ).replace("- s", "- ¦s"),
        "slices[0]: t is missing, and slerp needs it; add `parameters: {t: VALUE}` to the slice or to the recipe",
    ),
    ("merge_method: linear\nbase_model: ¦b\nmodels: [{model: a, parameters: {weight: 1}}]\n", "it has no weight"),
]


@pytest.mark.parametrize(("marked", "message"), SLICE_FAULTS)
def test_faults_of_slices(marked: str, message: str) -> None:
    text, places = split(marked)
    problems = problems_of(text)
    assert any(message in p for p in problems), problems
    for line, column in places:
        assert any(p.startswith(f"recipe:{line}:{column}: ") and message in p for p in problems), problems


def test_more_slices_than_any_model_has_layers_are_refused_at_the_first_too_many() -> None:
    one = "  - sources: [{model: a, layer_range: [0, 1]}]\n"
    head = "merge_method: passthrough\nslices:\n"
    [problem] = problems_of(head + one * (MAX_SLICES + 1))
    assert problem == (f"recipe:{MAX_SLICES + 3}:5: slices: are more than {MAX_SLICES:,}; join adjoining ones")


def test_more_sources_than_can_be_meant_are_refused_where_they_become_too_many() -> None:
    """They are counted as they are read, so that a short text of aliases does not become a long list first."""
    source = "{model: a, layer_range: [0, 1]}"
    aliases = ", ".join(["*a"] * (MAX_SOURCES // 2))
    head = "merge_method: passthrough\nslices:\n"
    first = f"  - sources: [&a {source}, {aliases}]\n"
    problems = problems_of(head + first + f"  - sources: [{aliases}]\n" + "  - sources: 3\n")
    assert f"recipe:4:5: slices: have more than {MAX_SOURCES:,} sources; join adjoining ones" in problems
    assert not any("slices[2]" in p for p in problems)  # what comes after it is not looked at


def test_a_module_that_names_a_model_twice_is_warned_about() -> None:
    entry = "{model: ./m, parameters: {weight: 1}}"
    [warning] = load_recipe(module("linear", f"[{entry}, {entry}]")).warnings
    assert "modules.a.models[1]: names the same model as modules.a.models[0]" in warning


def test_a_base_that_a_module_merges_without_listing_it_is_warned_about_and_merged() -> None:
    text = module("karcher", "[{model: ./m}, {model: ./n}]", "base_model: ./x\n")
    recipe = load_recipe(text)
    [warning] = recipe.warnings
    assert "modules.a: the base is merged too: karcher takes every model, as in mergekit" in warning
    assert [str(m.reference) for m in recipe.groups[0].inputs] == ["./m", "./n", "./x"]
    alone = load_recipe(text.replace("a: {", "a: {base_model: ~, "))
    assert alone.warnings == ()
    assert [str(m.reference) for m in alone.groups[0].inputs] == ["./m", "./n"]


@pytest.mark.parametrize(
    "source",
    ["{path: ./a}", "{model: {path: ./a}}", "./a", "{model: {path: ./a}, lora: ~}"],
)
def test_a_model_under_tokens_may_be_written_as_under_models(source: str) -> None:
    section = load_recipe(tokens(source)).tokenizer
    assert section is not None
    [rule] = section.tokens
    assert rule.source is not None and (rule.source.kind, str(rule.source.model)) == ("model", "./a")


def test_a_token_of_a_model_that_is_written_as_a_mapping() -> None:
    same = [load_recipe(tokens(f"{{kind: model_token, model: {m}, token: b}}")) for m in ("./a", "{path: ./a}")]
    assert same[0].digest() == same[1].digest() != load_recipe(tokens("./a")).digest()


def test_nothing_is_said_of_a_calibration_whose_optional_keys_are_null() -> None:
    text = pleas("calibration: {text: ~, dataset: ~, samples: ~, statistics: s.safetensors}")
    found = load_recipe(text).calibration
    assert found == Calibration(statistics="s.safetensors", samples=128, sequence_length=512)
    assert load_recipe(pleas("calibration: {text: one.txt}")).calibration == Calibration(text=("one.txt",))
