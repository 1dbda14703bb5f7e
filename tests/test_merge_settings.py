"""What is to be merged: numbers by layer and by pattern, mistakes in them, and mergekit's YAML."""

import pytest

from lrjax.errors import UserError
from lrjax.longrecipe.merge_settings import MergeRecipe, kind_of, read_mergekit, resolve

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (Q, "attention"),
        ("layers/3/q", "attention"),
        ("layers/3/q_bias", "attention"),
        ("layers/3/attention_norm", "norm"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("layers/0/gate", "mlp"),
        ("model.layers.3.mlp.up_proj.weight", "mlp"),
        ("embedding", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("head", "head"),
        ("lm_head.weight", "head"),
        ("final_norm", "norm"),
    ],
)
def test_kinds_in_both_formats(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("setting", "tensor", "value"),
    [
        (0.3, Q, 0.3),
        ("1e-1", Q, 0.1),  # YAML 1.1 takes 1e-1 for text
        ([0, 1], Q, 0.25),  # layer 1 of 0 to 4
        ([0, 1, 0], "layers/2/up", 1.0),
        ([0.2, 1], "embedding", 0.2),
        ([{"filter": "attention", "value": 0.1}, {"value": 0.9}], "layers/1/o", 0.1),
        ([{"filter": "attention", "value": 0.1}, {"value": 0.9}], "layers/1/up", 0.9),
        ([{"filter": "q_proj", "value": [0, 1]}, {"filter": "*", "value": 9}], Q, 0.25),
        ([{"filter": "*.1.self*", "value": 0.1}, {"value": 0.9}], Q, 0.1),
        ({"value": 0.4}, Q, 0.4),
    ],
)
def test_settings(setting, tensor, value):
    assert resolve(setting, tensor, 5, "weight") == pytest.approx(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ([{"filter": "mlp", "value": 1}], "weight: no filter matches model.layers.1.self_attn"),
        ([{"filtre": "mlp", "value": 1}], "weight: 'filtre' is unknown"),
        ("much", "weight is 'much'; a number"),
        (True, "weight is True; a finite number"),
        (float("nan"), "weight is nan; a finite number"),
        ([], r"weight is \[\]; a number"),
        (None, "weight is None; a number"),
    ],
)
def test_settings_that_are_none(setting, message):
    with pytest.raises(UserError, match=message):
        resolve(setting, Q, 5, "weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("average", {"a": 1}), "method 'average'; allowed: linear, slerp"),
        (("linear", {}), "no sources"),
        (("linear", {"a": 0.5, "./a": 0.5}), "there twice"),
        (("linear", {"a": 0.5, "b": 0.6}), r"\[0.5, 0.6\] sum to 1.1; they must sum to 1"),
        (("linear", {"a": float("nan"), "b": 1}), "weight of a is nan"),
        (("linear", {"a": 1}, "b"), "'linear' has no base"),
        (("ties", {"a": 1}), "'ties' needs base"),
        (("ties", {"a": 1}, "b", {"a": 1.5}), "density of a is 1.5; allowed is 0 to 1"),
        (("slerp", {"a": 0.5, "b": 0.6}), "two numbers that sum to 1"),
        (("slerp", {"a": 1, "b": 1, "c": 1}, "a"), "slerp merges two sources"),
    ],
)
def test_bad_recipes(arguments, message):
    with pytest.raises(UserError, match=message):
        MergeRecipe(*arguments)


def test_sums_by_flag():
    MergeRecipe("linear", {"a": 0.5, "b": 0.6}, strict_sum=False)
    MergeRecipe("linear", {"a": 5, "b": 6}, normalize=True)
    with pytest.raises(UserError, match="sum to 0; they cannot be normalized"):
        MergeRecipe("linear", {"a": 1, "b": -1}, normalize=True)
    by_kind = [{"filter": "mlp", "value": 0.6}, {"value": 0.5}]
    recipe = MergeRecipe("linear", {"a": by_kind, "b": 0.5})
    assert recipe.parameters(Q, 5).weight == (0.5, 0.5)
    with pytest.raises(UserError, match=r"sum to 1\.1"):
        recipe.parameters("layers/0/up", 5)


def test_slerp_by_weights_goes_from_the_first():
    recipe = MergeRecipe("slerp", {"a": 0.25, "b": 0.75})
    assert recipe.sources == ["a", "b"]
    assert recipe.parameters(Q, 5).t == 0.75


def written(tmp_path, text):
    file = tmp_path / "merge.yml"
    file.write_text(text)
    return file


def test_mergekit_slerp_example(tmp_path):
    """The shape of mergekit's own example: slices over all layers, t by filter and by layer."""
    recipe = read_mergekit(
        written(
            tmp_path,
            """
            slices:
              - sources:
                  - {model: a, layer_range: [0, 5]}
                  - {model: b, layer_range: [0, 5]}
            merge_method: slerp
            base_model: a
            parameters:
              t:
                - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
                - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
                - value: 0.5
            dtype: bfloat16
            """,
        )
    )
    assert recipe.sources == ["a", "b"] and recipe.dtype == "bfloat16"
    assert recipe.parameters(Q, 5).t == 0.5
    assert recipe.parameters("model.layers.4.mlp.up_proj.weight", 5).t == 0
    assert recipe.parameters("lm_head.weight", 5).t == 0.5


def test_mergekit_defaults_and_what_goes_before_them(tmp_path):
    recipe = read_mergekit(
        written(
            tmp_path,
            """
            models:
              - model: base
              - model: a
                parameters: {weight: 0.3, density: 0.2}
              - model: {model: {path: b}}
                parameters: {weight: 0.5}
            merge_method: ties
            base_model: base
            parameters: {density: 0.6, lambda: 0.9, int8_mask: true}
            dtype: float32
            out_dtype: bfloat16
            """,
        ),
        rope_from="a",
    )
    parameters = recipe.parameters(Q, 5)
    assert parameters.weight == (0.3, 0.5) and parameters.density == (0.2, 0.6)
    assert parameters.scale == 0.9 and parameters.normalize
    assert recipe.sources == ["base", "a", "b"]
    assert (recipe.dtype, recipe.rope_from) == ("bfloat16", "a")
    linear = "models: [{model: a, parameters: {weight: 2}}, {model: b, parameters: {weight: 1}}]\n"
    recipe = read_mergekit(written(tmp_path, linear + "merge_method: linear"))
    assert recipe.parameters(Q, 5).normalize  # mergekit's default for linear


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: breadcrumbs\nmodels: []", "merge_method is 'breadcrumbs'; allowed: linear"),
        ("merge_method: linear", "one of models and slices"),
        ("merge_method: linear\nmodels: []\nmodules: {}", "'modules' is unknown"),
        ("merge_method: linear\nmodels: [{model: a}]", "a has no weight"),
        ("merge_method: linear\nmodels: [{model: a+lora}]", "no adapters"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, gamma: 1}}]",
            "'gamma' is unknown",
        ),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", "slerp has no t"),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}, {sources: []}]",
            "2 slices",
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [1, 2]}]}]",
            "layer_range",
        ),
        ("merge_method: linear\nmodels: []\ntokenizer_source: union", "'union' makes a new"),
        ("- a", "a YAML mapping is expected"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mergekit_mistakes(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_mergekit(written(tmp_path, text))
