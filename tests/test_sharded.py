"""A model on a mesh is the model on one device: loss, gradients, scores, for every way to split it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax import sharding
from lrjax.errors import UserError
from lrjax.models import attention, context, head
from lrjax.models.llama import Llama, LlamaConfig, init_params
from lrjax.training.loop import check_row
from lrjax.training.state import shardings_of

CONFIG = LlamaConfig(
    vocab_size=48, num_layers=2, embed_dim=16, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=32,
    dtype="float32", remat="full", attention="blockwise",
)  # fmt: skip


@functools.cache
def inputs(length, batch=2):
    """Packed documents at positions that jump, weights that differ."""
    rng = np.random.default_rng(0)
    shape = (batch, length)
    return (
        rng.integers(0, 48, shape).astype(np.int32),
        np.sort(rng.integers(0, 999, shape), axis=1).astype(np.int32),
        np.sort(rng.integers(1, 4, shape), axis=1).astype(np.int32),
        rng.random(shape).astype(np.float32),
    )


@functools.cache
def results(config, mesh_items, length):
    """Loss, gradients and per-token statistics, as numpy."""
    mesh = sharding.make_mesh(dict(mesh_items))
    with sharding.layout(mesh):
        params = init_params(config, jax.random.key(0), shardings_of)
        where = sharding.batch_sharding(mesh, inputs(length)[0].shape)
        batch = jax.device_put(inputs(length), where)

        def loss(params, tokens, positions, segment_ids, weights):
            x_BLD = Llama(config).apply({"params": params}, tokens, positions, segment_ids)
            targets = jnp.roll(tokens, -1, axis=1)
            total, weight = head.weighted_cross_entropy(params, x_BLD, targets, weights)
            still = jax.lax.stop_gradient((params, x_BLD))
            stats = head.token_stats(*still, targets)
            # Against itself with larger logits; three tokens' logits at a time, which the lengths do not divide.
            larger = jax.tree.map(lambda a: 1.2 * a, still)
            stats["kl"] = head.kl_divergence(*still, *larger, chunk=3)
            return total / weight, stats

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, stats), grads = step(params, *batch)
        for (path, g), where in zip(
            jax.tree.leaves_with_path(grads),
            jax.tree.leaves(shardings_of(params, mesh)),
            strict=True,
        ):  # never a whole matrix on a device; norms are small
            norm = path[-1].key.endswith("norm")
            assert norm or g.sharding.is_equivalent_to(where, g.ndim), path
        return jax.device_get((value, grads, stats))


@pytest.mark.parametrize(
    ("mesh", "changes", "length"),
    [
        ({"fsdp": 2, "context": 2, "data": 2}, {}, 32),
        ({"context": 4, "tensor": 2}, {}, 30),  # padded to 32
        ({"context": 4, "tensor": 2}, {"context_parallel": "ring", "attention": "auto"}, 30),
        ({"context": 2, "tensor": 2, "fsdp": 2}, {"context_parallel": "ulysses"}, 32),
        ({"tensor": 4, "fsdp": 2}, {}, 32),
        ({"context": 2, "tensor": 2, "fsdp": 2}, {"tie_embeddings": True}, 32),
    ],
    ids=["gather", "gather padded", "ring padded", "ulysses", "tensor", "tied"],
)
def test_sharded_is_single_device(mesh, changes, length):
    config = dataclasses.replace(CONFIG, **changes)
    value, grads, stats = results(config, tuple(mesh.items()), length)
    single = dataclasses.replace(CONFIG, tie_embeddings=config.tie_embeddings)
    expected_value, expected_grads, expected_stats = results(single, (("fsdp", 1),), length)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for (path, got), expected in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=str(path))
        np.testing.assert_allclose(
            np.linalg.norm(got), np.linalg.norm(expected), rtol=1e-5, err_msg=str(path)
        )
    for name, expected in expected_stats.items():  # in the order of the document
        np.testing.assert_allclose(stats[name], expected, atol=3e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context_parallel", "window"), [("gather", None), ("ring", None), ("ring", 150)]
)
def test_splash_under_context_parallelism_is_single_device(context_parallel, window):
    """Interpreted; two runs of queries on a device, and blocks of 128."""
    base = dataclasses.replace(CONFIG, num_layers=1, sliding_window=window)
    config = dataclasses.replace(base, attention="splash", context_parallel=context_parallel)
    mesh = (("context", 2), ("tensor", 2), ("fsdp", 2))
    got = results(config, mesh, 512)
    expected = results(base, (("fsdp", 1),), 512)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), got[:2], expected[:2])
    np.testing.assert_allclose(got[2]["logprob"], expected[2]["logprob"], atol=1e-5)


@pytest.mark.parametrize("window", [None, 7, "traced"])
def test_ring_with_a_window_and_a_soft_cap(window):
    """Chunks of 4 tokens: a window of 7 reaches over two of them, most pairs of chunks see nothing."""
    L = 32
    rng = np.random.default_rng(0)
    q, weights = (jnp.asarray(rng.normal(size=(2, L, 4, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, L, 2, 8)), jnp.float32) for _ in range(2))
    seg = jnp.asarray(np.sort(rng.integers(0, 2, (2, L)), axis=1))
    settings = {"soft_cap": 2.0, "scale": 0.5}

    def ring(q, k, v, window):
        inputs = map(context.to_head_tail, (q, k, v, seg, seg))
        out = attention.attention(
            *inputs, implementation="blockwise", context_parallel="ring", window=window, **settings
        )
        return context.from_head_tail(out)

    def whole(q, k, v, window):
        return attention.reference(q, k, v, seg, seg, window=window, **settings)

    def with_gradients(f):
        def loss(q, k, v, traced):
            return jnp.sum(weights * f(q, k, v, traced if window == "traced" else window))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v, jnp.int32(7))

    with sharding.layout(sharding.make_mesh({"context": 4, "fsdp": 2})):
        got = with_gradients(ring)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        got,
        with_gradients(whole),
    )


def test_a_ring_takes_less_memory_than_gathering():
    """Under remat, JAX could keep what every step of a round finds: more than all keys and values."""

    def temporary(context_parallel):
        config = dataclasses.replace(CONFIG, context_parallel=context_parallel, num_kv_heads=8)
        mesh = sharding.make_mesh({"context": 8})
        with sharding.layout(mesh):
            params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

            def loss(params, tokens):
                x_BLD = Llama(config).apply({"params": params}, tokens)
                return jnp.sum(jnp.square(x_BLD))

            tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
            compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
            return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("ring") < 0.4 * temporary("gather")


@pytest.mark.parametrize("n", [2, 4, 8])
def test_head_tail_order_and_back(n):
    mesh = sharding.make_mesh({"context": n, "fsdp": 1})
    with sharding.layout(mesh):
        x_BL = jnp.arange(2 * 4 * n).reshape(1, -1)
        ordered = jax.jit(context.to_head_tail)(x_BL)
        chunks = np.asarray(ordered).reshape(n, 2, 4)[..., 0] // 4
        np.testing.assert_array_equal(chunks, [[d, 2 * n - 1 - d] for d in range(n)])
        np.testing.assert_array_equal(jax.jit(context.from_head_tail)(ordered), x_BL)


def test_logits_of_all_tokens_never_exist():
    """Per device the loss and its gradient stay far below a device's [L, V]."""
    mesh = sharding.make_mesh({"context": 8})
    with sharding.layout(mesh):
        params = {"head": jnp.zeros((8, 4096)), "embedding": jnp.zeros((4096, 8))}
        x_BLD, targets_BL = jnp.zeros((1, 1024, 8)), jnp.zeros((1, 1024), jnp.int32)

        def loss(head_DV, x_BLD):
            whole = params | {"head": head_DV}
            return head.weighted_cross_entropy(whole, x_BLD, targets_BL, jnp.ones((1, 1024)), 64)[0]

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params["head"], x_BLD)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 1024 * 4096 / 8 * 4 / 2


def test_mistakes_are_named():
    mesh = sharding.make_mesh({"context": 8})
    with sharding.layout(mesh):
        with pytest.raises(
            UserError, match=r"rows of 1000 tokens do not divide by 16.*row_multiple=16"
        ):
            check_row(CONFIG, 1000, 1, "extend")
        assert check_row(CONFIG, 1000, 16, "extend") == 1008
        q = jnp.zeros((1, 100, 8, 8))
        ids = jnp.zeros((1, 100), jnp.int32)
        with pytest.raises(UserError, match="length 100 does not divide by 16"):
            attention.attention(q, q, q, ids, ids, implementation="blockwise")
        short, short_ids = q[:, :96], ids[:, :96]
        with pytest.raises(UserError, match=r"'ring': attention 'reference'.*blockwise, splash"):
            attention.attention(
                short, short, short, short_ids, short_ids,
                implementation="reference", context_parallel="ring",
            )  # fmt: skip
    with sharding.layout(sharding.make_mesh({"tensor": 8})):
        k = jnp.zeros((1, 100, 4, 8))
        with pytest.raises(
            UserError, match=r"config.mesh.tensor 8 does not divide the 8 heads and 4"
        ):
            attention.attention(q, k, k, ids, ids, implementation="blockwise")
    with pytest.raises(UserError, match=r"config.rules: unknown axis 'rows'; allowed: batch"):
        sharding.check_rules({"rows": "fsdp"})
    with pytest.raises(UserError, match=r"config.rules.mlp: unknown mesh axis 'depth'"):
        sharding.check_rules({"mlp": "depth"})


def test_rules_of_the_config_change_the_layout():
    mesh = sharding.make_mesh({"fsdp": 2, "context": 4})
    leaf = {"w": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
    axes = {"w": ("embed", "mlp")}
    default = sharding.tree_shardings(axes, leaf, mesh)["w"].spec
    changed = sharding.tree_shardings(axes, leaf, mesh, {"embed": "fsdp", "mlp": "context"})[
        "w"
    ].spec
    assert default == jax.sharding.PartitionSpec(("fsdp", "context"), "tensor")
    assert changed == jax.sharding.PartitionSpec("fsdp", "context")
