"""Every config in the repository is instantiated, checked, and its training step traced for shapes."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from lrjax import config as config_lib
from lrjax import workdir
from lrjax.checkpoints import families
from lrjax.errors import UserError
from lrjax.evaluation import suite
from lrjax.models.llama import LlamaConfig, abstract_params
from lrjax.training.loop import make_train_step
from lrjax.training.optimizer import make_optimizer

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
VARIANTS = {
    "tiny": ("", "quick"),
    "smollm2_135m": ("", "quick"),
    "llama8b_128k": ("", "baselines", "compare", "single80gb"),
    "mistral7b_128k": ("",),
    "qwen2_7b_128k": ("",),
    "llama31_8b_512k": ("",),
    "llama31_8b_1m": ("",),
}


def get_config(path, variant=""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


CASES = [(path, variant) for path in CONFIGS for variant in VARIANTS[path.stem]]
CASE_IDS = [f"{path.stem}:{variant}" for path, variant in CASES]


@pytest.mark.parametrize(("path", "variant"), CASES, ids=CASE_IDS)
def test_config_is_locked_and_consistent(path, variant):
    config = get_config(path, variant)
    config_lib.check(config)
    assert config.is_locked
    assert config.name == path.stem
    for method in config.methods.values():
        assert set(method) == set(config_lib.method("first", ""))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_unknown_variant_is_refused(path):
    with pytest.raises(UserError, match="variant 'nonsense'; allowed"):
        get_config(path, "nonsense")


def test_llama8b_train_step_shapes():
    """The 8B extension step, traced at its real size without computing anything."""
    config = get_config(pathlib.Path("configs/llama8b_128k.py").absolute())
    assert config.train_length == int(0.3 * config.target_length)
    assert config.extend.steps * config.extend.global_batch_size == 104 * 96
    shape = dict(config.model.shape)
    theta = config_lib.extended_theta(config, shape["rope_theta"], shape["head_dim"])
    assert theta == pytest.approx(131.5e6, rel=1e-3)  # paper, 128k
    model_config = LlamaConfig(**{**shape, "rope_theta": theta}, remat=config.model.remat)
    params = abstract_params(model_config)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 8_030_261_248  # as published
    check_train_step(config, model_config, params)


def check_train_step(config, model_config, params):
    """Traces an extension step at its real size."""
    optimizer = make_optimizer(config.extend)
    state = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
    batch = {
        name: jax.ShapeDtypeStruct((1, config.train_length), dtype)
        for name, dtype in (
            ("tokens", jnp.int32),
            ("positions", jnp.int32),
            ("segment_ids", jnp.int32),
            ("weights", jnp.float32),
        )
    }
    step = make_train_step(model_config, optimizer, micro_batches=1)
    new_state, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("name", "parameters", "theta"),
    [
        ("mistral7b_128k", 7_248_023_552, 13.5e6),
        ("qwen2_7b_128k", 7_615_616_512, 13.5e6),
        ("llama31_8b_512k", 8_030_261_248, 6.77e6),
        ("llama31_8b_1m", 8_030_261_248, 30.4e6),
    ],
)
def test_large_models_have_the_published_size_and_the_papers_theta(name, parameters, theta):
    config = get_config(pathlib.Path(f"configs/{name}.py").absolute())
    assert config.train_length == int(0.3 * config.target_length)
    base = LlamaConfig(**config.model.shape, remat=config.model.remat)
    params = abstract_params(base)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    extended = config_lib.extended_model(config, base)
    check_train_step(config, extended, params)
    assert extended.rope_theta == pytest.approx(theta, rel=0.01)
    assert extended.max_position_embeddings == config.target_length


def test_any_rope_scaling_can_be_the_target():
    config = get_config(pathlib.Path("configs/llama8b_128k.py").absolute())
    base = LlamaConfig(**config.model.shape)
    with config.unlocked():
        config.rope_scaling.rope_type = "yarn"
        extended = config_lib.extended_model(config, base)
        assert (extended.rope_scaling.rope_type, extended.rope_scaling.factor) == ("yarn", 16)
        assert extended.rope_scaling.original_max_position_embeddings == 8192
        assert extended.rope_theta == base.rope_theta
        config.rope_scaling.rope_type = "longrope"
        with pytest.raises(UserError, match="short_factor has 0 numbers; needed: 64"):
            config_lib.extended_model(config, base)
        config.rope_scaling.rope_type = "ntk"
        with pytest.raises(UserError, match=r"rope_scaling\.rope_type 'ntk': allowed: default"):
            config_lib.check(config)


TARGETS = {
    "default": {},
    "linear": {},
    "dynamic": {},
    "yarn": {"mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False, "beta_fast": 16.0},
    "llama3": {"low_freq_factor": 2.0, "high_freq_factor": 8.0},
    "longrope": {"short_factor": (1.0,) * 64, "long_factor": (4.5,) * 64, "attention_factor": 1.2},
}


@pytest.mark.parametrize("rope_type", TARGETS)
def test_every_encoding_is_a_target_that_config_json_keeps(rope_type):
    """Asked for in a config, written out and read back, here and by transformers; the original window is the base's."""
    transformers = pytest.importorskip("transformers")
    config = get_config(pathlib.Path("configs/llama8b_128k.py").absolute())
    with config.unlocked():
        config.rope_scaling.update(rope_type=rope_type, **TARGETS[rope_type])
    config_lib.check(config)
    extended = config_lib.extended_model(config, LlamaConfig(**config.model.shape))
    raw = families.write_config(extended, "bfloat16")
    again = families.read_config(json.loads(json.dumps(raw)))
    assert again.rope_scaling == extended.rope_scaling
    assert (again.rope_theta, again.max_position_embeddings) == (extended.rope_theta, 131072)
    theirs = transformers.LlamaConfig.from_dict(raw).rope_parameters
    assert theirs["rope_type"] == rope_type and theirs["rope_theta"] == extended.rope_theta
    for name, value in TARGETS[rope_type].items():
        assert getattr(extended.rope_scaling, name) == value
        assert theirs[name] == (list(value) if isinstance(value, tuple) else value)
    if rope_type != "default":
        assert theirs["factor"] == 16
    if rope_type in ("yarn", "llama3", "longrope"):
        assert theirs["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train_length", 600, "train_length 600 is over config.target_length 512"),
        ("window", 1024, "window 1024 is over config.target_length 512"),
        ("window", 1, "config.window 1: allowed: 2"),
        ("method", "nonsense", "config.method 'nonsense' is none of"),
    ],
)
def test_impossible_values_are_refused(field, value, message):
    config = get_config(pathlib.Path("configs/tiny.py").absolute(), "quick")
    with config.unlocked():
        config[field] = value
    with pytest.raises(UserError, match=message):
        config_lib.check(config)


def test_a_run_goes_on_though_fields_were_added(tmp_path):
    config = config_lib.default().unlock()
    config.methods = {"longrecipe": config_lib.method("anchor", "longrecipe")}
    config.probe.method = config_lib.method("first", "longrecipe")
    flat = workdir.flatten(config)
    before = config_lib.without_added(flat)
    names = sorted(flat.keys() - before.keys())
    assert names == [
        "evaluate.perplexity.key_evaluator",
        "evaluate.suite.bertscore_layer",
        "evaluate.suite.bertscore_model",
        "evaluate.suite.nltk_data",
        *(f"evaluate.suite.num_{name}" for name in ("keys", "queries", "values")),
        "methods.longrecipe.contiguous_share",
        "probe.method.contiguous_share",
    ]
    workdir.write_json(tmp_path / "config.json", before)
    workdir.claim(tmp_path, config)
    config.methods.longrecipe.contiguous_share = 0.5
    with pytest.raises(UserError, match=r"contiguous_share \('absent' there, 0.5 here\)"):
        workdir.claim(tmp_path, config)


def test_what_a_run_asks_are_options_of_the_suite():
    section = {*config_lib.default().evaluate.suite}
    assert section - {"limit", "chat", "batch_size"} == {
        field.name for field in dataclasses.fields(suite.Options)
    }
