"""Merging: a linear average to the bit, models that do not fit refused by name, and the command."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.checkpoints import orbax
from lrjax.errors import UserError
from lrjax.longrecipe import merging
from lrjax.models.llama import LlamaConfig, init_params

CONFIG = LlamaConfig(
    vocab_size=13, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
    rope_theta=1e5, max_position_embeddings=64,
)  # fmt: skip
EXTENDED = dataclasses.replace(CONFIG, rope_theta=5e5, max_position_embeddings=512, dtype="float32")


@pytest.fixture(scope="module")
def params():
    init = jax.jit(init_params, static_argnums=0)
    return [init(CONFIG, jax.random.key(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def models(params, tmp_path_factory):
    """Directories of the base and of the extended model, which brings a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    orbax.save_model(folder / "base", CONFIG, params[0])
    orbax.save_model(folder / "extended", EXTENDED, params[1])
    (folder / "extended" / "tokenizer").mkdir()
    (folder / "extended" / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder / "base", folder / "extended"


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def test_linear_in_every_leaf(params):
    weights = (0.5, 0.2, 0.3)
    merged = merging.merge_trees(list(zip(weights, params, strict=True)))
    expected = jax.tree.map(
        lambda *leaves: sum(
            w * np.asarray(leaf, np.float64) for w, leaf in zip(weights, leaves, strict=True)
        ),
        *params,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), merged, expected
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weight_1_gives_the_source_bit_for_bit(params, dtype):
    source, other = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in params[:2])
    source["final_norm"] = source["final_norm"].at[0].set(-0.0)
    for weighted in ([(1.0, source)], [(1.0, source), (0.0, other)], [(0.0, other), (1, source)]):
        merged = merging.merge_trees(weighted)
        equal(merged, source)
        assert np.signbit(merged["final_norm"][0])


def test_low_precision_is_averaged_in_float32():
    """1 + 3 small steps: bfloat16 sums would lose them."""
    values = [1.0, 1.0078125, 1.0078125, 1.0078125]
    merged = merging.merge_trees([(0.25, {"w": jnp.full(2, v, jnp.bfloat16)}) for v in values])
    assert merged["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["w"], jnp.full(2, 1.0078125, jnp.bfloat16))


def test_models_on_disk(models, params, tmp_path):
    base, extended = models
    merging.merge({base: 0.5, str(extended): 0.5}, tmp_path / "out", rope_from=extended)
    config, found = orbax.load_model(tmp_path / "out")
    assert config == EXTENDED
    equal(found, merging.merge_trees([(0.5, params[0]), (0.5, params[1])]))
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_window_of_the_named_source_only(models, tmp_path):
    base, extended = models
    with pytest.raises(
        UserError, match=r"rope_theta is 100000.0 in .*base, 500000.0 in .*extended .*rope_from"
    ):
        merging.merge({base: 0.5, extended: 0.5}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merging.merge({base: 0.5, extended: 0.5}, tmp_path / "out", rope_from=base)
    assert orbax.load_config(tmp_path / "out") == CONFIG


def test_other_differences_are_named(models, tmp_path):
    base, _ = models
    other = dataclasses.replace(CONFIG, mlp_dim=16, norm_eps=1e-6)
    orbax.save_model(tmp_path / "other", other, init_params(other, jax.random.key(0)))
    with pytest.raises(UserError, match=r"mlp_dim is 8 in .*, 16 in .*; norm_eps is"):
        merging.merge({base: 0.5, tmp_path / "other": 0.5}, tmp_path / "out", rope_from=base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros(3)}, r"w is \(2,\) in source 0, \(3,\) in source 1"),
        ({"w": np.zeros(2), "b": np.zeros(1)}, "b is only in source 1"),
        ({}, "w is only in source 0"),
        ({"w": np.array([0, np.nan])}, "source 1: w holds NaN"),
        ({"w": np.array([0, np.inf])}, "source 1: w holds NaN or infinite"),
    ],
)
def test_trees_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        merging.merge_trees([(0.5, {"w": np.zeros(2)}), (0.5, change)])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.6), r"\[0.5, 0.6\] sum to 1.1"),
        ((1.5, -0.5), "weight of source 0 is 1.5; allowed is 0 to 1"),
        ((float("nan"), 1), "weight of source 0 is nan"),
        ((), "no sources"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(UserError, match=message):
        merging.merge_trees([(weight, {"w": np.zeros(2)}) for weight in weights])


def test_bad_arguments_of_merge(models, tmp_path):
    base, extended = models
    both = {base: 0.5, extended: 0.5}
    for call, message in (
        (lambda: merging.merge(both, tmp_path / "out", "ties"), "method 'ties'; allowed: linear"),
        (
            lambda: merging.merge(both, tmp_path / "out", rope_from="x"),
            "rope_from 'x' is not a source",
        ),
        (lambda: merging.merge(both, base, rope_from=base), "is one of the sources"),
        (lambda: merging.merge({base: 0.5, str(base): 0.5}, tmp_path / "out"), "there twice"),
        (lambda: merging.merge({base: 0.5, tmp_path: 0.5}, tmp_path / "out"), "not an lrjax model"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not (tmp_path / "out").exists()


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lrjax.merge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command(models, params, tmp_path):
    base, extended = models
    out = tmp_path / "out"
    done = run(base, extended, "--weights=.25,.75", f"--rope_from={extended}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    equal(orbax.load_model(out)[1], merging.merge_trees([(0.25, params[0]), (0.75, params[1])]))

    mistakes = {
        "there is a model already": (base, extended, "--weights=.5,.5", f"--out={out}"),
        "sum to 1.5": (
            base,
            extended,
            "--weights=1,.5",
            f"--out={tmp_path}/x",
            f"--rope_from={base}",
        ),
        "flag 'nonsense'": (base, "--weights=1", "--nonsense=1"),
    }
    for message, arguments in mistakes.items():
        failed = run(*arguments)
        assert failed.returncode == 2
        assert message in failed.stderr.strip().splitlines()[-1]
        assert "Traceback" not in failed.stderr
