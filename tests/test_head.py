"""The head in chunks is the head at once: loss, gradients and statistics, tied or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lrjax.models import head

B, L, D, V = 2, 11, 8, 37


def make(tied, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"embedding": jax.random.normal(keys[0], (V, D)), "final_norm": jnp.ones(D)}
    if not tied:
        params["head"] = jax.random.normal(keys[1], (D, V))
    x_BLD = jax.random.normal(keys[2], (B, L, D)).astype(dtype)
    targets_BL = jax.random.randint(keys[3], (B, L), 0, V)
    weights_BL = jnp.linspace(0.0, 2.0, B * L).reshape(B, L)
    return params, x_BLD, targets_BL, weights_BL


def plain_loss(params, x_BLD, targets_BL, weights_BL):
    w_DV = params["head"] if "head" in params else params["embedding"].T
    logprobs_BLV = jax.nn.log_softmax(x_BLD.astype(jnp.float32) @ w_DV)
    picked_BL = jnp.take_along_axis(logprobs_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights_BL * picked_BL)


def chunked_loss(params, x_BLD, targets_BL, weights_BL, chunk=None):
    # Twice the loss: the cotangent that arrives is not 1.
    return 2 * head.weighted_cross_entropy(params, x_BLD, targets_BL, weights_BL, chunk)[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 100])
def test_chunked_cross_entropy_and_gradients_are_the_plain_ones(tied, chunk):
    args = make(tied)
    total, weight = head.weighted_cross_entropy(*args, chunk=chunk)
    np.testing.assert_allclose(total, plain_loss(*args), rtol=1e-5)
    np.testing.assert_allclose(weight, args[3].sum(), rtol=1e-6)
    got = jax.jit(jax.grad(chunked_loss, argnums=(0, 1, 3)), static_argnums=4)(*args, chunk)
    expected = jax.grad(plain_loss, argnums=(0, 1, 3))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, atol=2e-4), got, expected)


def test_bfloat16_gradients_are_near_and_weights_get_theirs_in_float32():
    params, x_BLD, targets_BL, weights_BL = make(True, jnp.bfloat16)
    got = jax.jit(jax.grad(chunked_loss, argnums=(0, 1)))(params, x_BLD, targets_BL, weights_BL)
    expected = jax.grad(plain_loss, argnums=(0, 1))(params, x_BLD, targets_BL, weights_BL)
    assert got[0]["embedding"].dtype == jnp.float32
    assert got[1].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = 2 * b.astype(jnp.float32)
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) <= 0.02 * jnp.linalg.norm(b)


def test_weight_zero_hides_a_target():
    params, x_BLD, targets_BL, weights_BL = make(True)
    weights_BL = weights_BL.at[:, 3].set(0)
    other_BL = targets_BL.at[:, 3].add(1) % V
    first = head.weighted_cross_entropy(params, x_BLD, targets_BL, weights_BL)[0]
    assert first == head.weighted_cross_entropy(params, x_BLD, other_BL, weights_BL)[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [None, 3, 11])
def test_token_stats(tied, chunk):
    params, x_BLD, targets_BL, _ = make(tied)
    logits_BLV = head.logits(params, x_BLD)
    assert logits_BLV.shape == (B, L, V)
    assert logits_BLV.dtype == jnp.float32
    stats = jax.jit(head.token_stats, static_argnums=3)(params, x_BLD, targets_BL, chunk)

    def picked(values_BLV):
        return jnp.take_along_axis(values_BLV, targets_BL[..., None], axis=-1)[..., 0]

    np.testing.assert_allclose(stats["logit"], picked(logits_BLV), atol=1e-5)
    np.testing.assert_allclose(stats["mean_logit"], logits_BLV.mean(-1), atol=1e-5)
    np.testing.assert_allclose(stats["logprob"], picked(jax.nn.log_softmax(logits_BLV)), atol=1e-5)
    np.testing.assert_array_equal(stats["argmax"], logits_BLV.argmax(-1))
    nan = head.token_stats(params, x_BLD * jnp.nan, targets_BL)["argmax"]
    assert (nan == 0).all()  # a token of the vocabulary all the same
    assert all(value.shape == (B, L) for value in stats.values())


@pytest.mark.parametrize("function", ["token_stats", "loss and gradient"])
def test_memory_is_that_of_a_chunk(function):
    """64 tokens of 4,096 logits are 1 MB; in chunks of 4 the whole function stays far below it."""
    params = {"embedding": jnp.zeros((4096, 4)), "final_norm": jnp.ones(4)}
    x_BLD, targets_BL = jnp.zeros((1, 64, 4)), jnp.zeros((1, 64), jnp.int32)
    if function == "token_stats":
        compiled = jax.jit(head.token_stats, static_argnums=3).lower(params, x_BLD, targets_BL, 4)
    else:
        compiled = jax.jit(jax.grad(chunked_loss, argnums=1), static_argnums=4).lower(
            params, x_BLD, targets_BL, jnp.ones((1, 64)), 4
        )
    assert compiled.compile().memory_analysis().temp_size_in_bytes < 64 * 4096 * 4 / 2


def test_split_over_eight_devices_is_one_device():
    params, _, _, _ = make(False)
    x_BLD = jax.random.normal(jax.random.key(1), (8, 6, D), jnp.bfloat16)
    targets_BL = jnp.arange(48).reshape(8, 6) % V
    weights_BL = jnp.ones((8, 6))
    value_and_grad = jax.jit(jax.value_and_grad(chunked_loss), static_argnums=4)
    expected = value_and_grad(params, x_BLD, targets_BL, weights_BL, 4)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params["embedding"] = jax.device_put(params["embedding"], NamedSharding(mesh, PartitionSpec()))
    params["head"] = jax.device_put(params["head"], rows)
    batch = [jax.device_put(a, rows) for a in (x_BLD, targets_BL, weights_BL)]
    got = value_and_grad(params, *batch, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, expected)
