"""The scorer: right values, both models on the same prefix, and never the logits of a whole text."""

import dataclasses
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.errors import UserError
from lrjax.longrecipe import scoring
from lrjax.models import head
from lrjax.models.bits import ready
from lrjax.models.llama import Llama, LlamaConfig, abstract_params, init_params

CONFIG = LlamaConfig(
    vocab_size=97, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24,
    rope_theta=100.0, dtype="float32",
)  # fmt: skip
EXTENDED = dataclasses.replace(CONFIG, rope_theta=5000.0)


@pytest.fixture(scope="module")
def models():
    init = jax.jit(init_params, static_argnums=0)
    params, noise = init(CONFIG, jax.random.key(0)), init(CONFIG, jax.random.key(1))
    moved = jax.tree.map(lambda a, b: a + 0.1 * b, params, noise)
    return (CONFIG, params), (EXTENDED, moved)


def tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 97, shape, dtype=np.int32)


@functools.partial(jax.jit, static_argnums=0)
def hidden(config, params, *inputs):
    return Llama(config).apply({"params": params}, *inputs)


def plain(model, tokens_BL, positions_BL, segment_ids_BL):
    """What the scorer should see of one model, with all logits written out."""
    config, params = model
    x_BLD = hidden(config, params, tokens_BL, positions_BL, segment_ids_BL)
    logits_BLV = head.logits(params, x_BLD)[:, :-1]
    target = tokens_BL[:, 1:, None]
    pick = lambda a: np.take_along_axis(np.asarray(a), target, axis=-1)[..., 0]  # noqa: E731
    return pick(logits_BLV), logits_BLV.mean(-1), pick(jax.nn.log_softmax(logits_BLV))


@pytest.mark.parametrize("chunk", [None, 5])
def test_values_against_plain_logits(models, chunk):
    base, extended = models
    tokens_BL = tokens((2, 23))
    positions_BL = np.stack([np.arange(23), np.arange(23) * 3]).astype(np.int32)
    segment_ids_BL = np.ones_like(tokens_BL)
    segment_ids_BL[1, 9:] = 2
    segment_ids_BL[1, 20:] = 0
    inputs = (tokens_BL, positions_BL, segment_ids_BL)
    found = scoring.make_scorer(CONFIG, EXTENDED, chunk, kl=True)(base[1], extended[1], *inputs)

    (logit, mean, logprob), (logit2, mean2, logprob2) = (
        plain(base, *inputs),
        plain(extended, *inputs),
    )
    p_BLV, q_BLV = (
        jax.nn.log_softmax(head.logits(params, hidden(config, params, *inputs)))[:, :-1]
        for config, params in (extended, base)
    )
    valid = np.ones((2, 22), bool)
    valid[1, 8] = False  # the first token of the second document
    valid[1, 19:] = False  # padding
    np.testing.assert_array_equal(found["valid"], valid)
    for name, expected in {
        "delta_logit": logit2 - logit,
        "delta_centred": (logit2 - mean2) - (logit - mean),
        "delta_logprob": logprob2 - logprob,
        "logprob_base": logprob,
        "logprob_extended": logprob2,
        "kl": jnp.sum(jnp.exp(p_BLV) * (p_BLV - q_BLV), axis=-1),
    }.items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(
            found[name], np.where(valid, expected, 0), atol=2e-5, err_msg=name
        )


def test_both_models_read_the_same_prefix_only(models):
    tokens_BL = tokens((1, 12))
    changed_BL = tokens_BL.copy()
    changed_BL[0, 7] = (changed_BL[0, 7] + 1) % 97
    before, after = scoring.score(*models, tokens_BL), scoring.score(*models, changed_BL)
    for name in ("delta_logit", "logprob_base", "logprob_extended"):
        np.testing.assert_array_equal(before[name][0, :6], after[name][0, :6])
        assert np.all(before[name][0, 6:] != after[name][0, 6:])


def test_same_model_changes_nothing(models):
    base, _ = models
    found = scoring.score(base, base, tokens((1, 9)))
    assert found["delta_logit"].shape == (1, 8)
    for name in ("delta_logit", "delta_centred", "delta_logprob"):
        np.testing.assert_array_equal(found[name], 0)


def test_centred_and_logprob_ignore_a_constant(models):
    """A head that adds one number to every logit moves delta_logit alone."""
    config, params = models[0]
    x_BLD = hidden(config, params, tokens((1, 9)))
    direction_D = x_BLD[0, 4] / jnp.vdot(x_BLD[0, 4], x_BLD[0, 4])
    shifted = params | {"head": params["head"] + 3.0 * direction_D[:, None]}
    found = scoring.score((config, params), (config, shifted), tokens((1, 9)))
    assert found["delta_logit"][0, 4] == pytest.approx(3.0, abs=1e-4)
    assert np.abs(found["delta_centred"]).max() < 1e-4
    assert np.abs(found["delta_logprob"]).max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{"tie_embeddings": True}, {"qkv_bias": True, "qk_norm": True}, {"unit_offset_norms": True, "post_norms": True}],
    ids=["tied", "biases and norms", "Gemma's norms"],
)  # fmt: skip
def test_models_rounded_once_have_the_same_scores(changes):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", **changes)
    init = jax.jit(init_params, static_argnums=0)
    noise = init(config, jax.random.key(2))
    pair = [
        jax.tree.map(lambda a, b: a + 0.1 * b, init(config, jax.random.key(seed)), noise)
        for seed in (0, 1)
    ]
    # Of biases and norms, which begin as 0 and 1: numbers that bfloat16 does not hold.
    pair = [jax.tree.map(lambda a: a + 0.01234567, params) for params in pair]
    inputs = tokens((2, 19)), np.tile(np.arange(19, dtype=np.int32), (2, 1)), np.ones((2, 19), int)
    scorer = scoring.make_scorer(config, config, kl=True)
    expected = scorer(*pair, *inputs)
    rounded = [ready(config, params) for params in pair]
    for path, leaf in jax.tree.leaves_with_path(rounded[0]):
        stays = "norm" in path[-1].key or "bias" in path[-1].key
        assert leaf.dtype in (
            {jnp.dtype("float32")} if stays else {jnp.dtype("bfloat16"), jnp.dtype("uint16")}
        )
    for name, values in scorer(*rounded, *inputs).items():
        np.testing.assert_array_equal(values, expected[name])
    assert np.abs(expected["delta_logit"]).max() > 0


def shapes(jaxpr):
    """Every array shape in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if hasattr(variable.aval, "shape"):
                yield tuple(variable.aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes(inner)


@pytest.mark.parametrize(
    ("tied", "limit", "chunk"), [(False, "STATS_ELEMENTS", (2, 8, 97)), (True, "CACHED_ELEMENTS", (97, 2, 4))]
)  # fmt: skip
def test_never_holds_all_logits(monkeypatch, tied, limit, chunk):
    monkeypatch.setattr(scoring, "STATS_ELEMENTS", 2 * 97 * 8)
    monkeypatch.setattr(head, limit, np.prod(chunk))
    scoring.make_scorer.cache_clear()
    array_BL = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    config, extended = (dataclasses.replace(c, tie_embeddings=tied) for c in (CONFIG, EXTENDED))
    params = abstract_params(config)
    traced = scoring.make_scorer(config, extended, kl=True).trace(params, params, *[array_BL] * 3)
    weights = {(97, 16), (16, 97)}
    with_vocabulary = {shape for shape in shapes(traced.jaxpr.jaxpr) if 97 in shape} - weights
    assert chunk in with_vocabulary  # the chunk itself, so the walk does look inside
    assert max(np.prod(shape) for shape in with_vocabulary) <= 2 * 8 * 97
    scoring.make_scorer.cache_clear()


@pytest.mark.slow
def test_memory_at_8192_tokens_of_a_135m_model():
    """Compiled for SmolLM2's shape: less than 1 GB besides both models (the logits alone: 1.6 GB a model)."""
    config = LlamaConfig(
        vocab_size=49_152, num_layers=30, embed_dim=576, num_heads=9, num_kv_heads=3, head_dim=64,
        mlp_dim=1536, rope_theta=1e5, tie_embeddings=True,
    )  # fmt: skip
    params, array_BL = abstract_params(config), jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    scorer = scoring.make_scorer(config, dataclasses.replace(config, rope_theta=5e5))
    memory = scorer.lower(params, params, *[array_BL] * 3).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 1e9


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([[1, 2, 97]]), r"token id 97 at row 0, index 2; .* ids 0 to 96"),
        (np.array([[1, -1, 3]]), r"token id -1 at row 0, index 1"),
        (np.array([[1]]), r"L >= 2"),
        (np.array([1, 2]), r"\[B, L\]"),
    ],
)
def test_bad_tokens_are_named(models, bad, message):
    with pytest.raises(UserError, match=message):
        scoring.score(*models, bad)


def test_vocabularies_must_agree():
    with pytest.raises(UserError, match="vocab_size 98, the base model 97"):
        scoring.make_scorer(CONFIG, dataclasses.replace(CONFIG, vocab_size=98))
