"""On an NVIDIA GPU: its kernels against attention written out, and the model against itself on the CPU.

    XLA_FLAGS= JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_gpu.py

Skipped where there is none; there the same kernels run interpreted (tests/test_attention.py). XLA_FLAGS is set lest
the tests' own, for fake CPU devices, be taken.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrjax.evaluation import decoding
from lrjax.evaluation.generate import generate
from lrjax.evaluation.reader import answers
from lrjax.models.attention import attention, reference
from lrjax.models.cache import init_cache
from lrjax.models.llama import Llama, LlamaConfig, init_params
from lrjax.training.loop import make_train_step

if "cuda" not in os.environ.get("JAX_PLATFORMS", ""):
    pytest.skip("needs an NVIDIA GPU and JAX_PLATFORMS=cuda,cpu", allow_module_level=True)


def make_inputs(L, S, N, K, H, dtype=jnp.bfloat16, documents=3):
    keys = jax.random.split(jax.random.key(L), 3)
    shapes = (2, L, N, H), (2, S, K, H), (2, S, K, H)
    qkv = [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]
    ids = np.sort(np.random.default_rng(L).integers(1, documents + 1, (2, S)), axis=1)
    return *qkv, jnp.asarray(ids, jnp.int32)


def error(got, expected) -> float:
    """|got - expected| / |expected|, of all numbers at once."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def small_model(**changes):
    shape = {
        "vocab_size": 512,
        "num_layers": 3,
        "embed_dim": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "mlp_dim": 256,
    }
    return LlamaConfig(**shape, dtype="float32", **changes)


def on(platform, compute):
    with jax.default_device(jax.devices(platform)[0]):
        return jax.tree.map(np.asarray, compute())


def test_training_is_training_on_the_cpu():
    """Three steps in float32 on packed documents: the losses of both."""
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 4, (2, 600)), axis=1).astype(np.int32)
    batch = {
        "tokens": rng.integers(0, 512, (2, 600)).astype(np.int32),
        "positions": np.sort(rng.integers(0, 4096, (2, 600)), axis=1).astype(np.int32),
        "segment_ids": ids,
        "weights": np.ones((2, 600), np.float32),
    }

    def losses(attention):
        config, optimizer = small_model(attention=attention), optax.adamw(1e-2)
        params = init_params(config, jax.random.key(0))
        state = {"params": params, "opt_state": optimizer.init(params)}
        step = make_train_step(config, optimizer, micro_batches=1)
        found = []
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(metrics["loss"])
        return jnp.stack(found)

    expected = on("cpu", lambda: losses("reference"))
    assert expected[2] < expected[0]
    # JAX's kernel multiplies float32 in tf32, of 11 bits.
    np.testing.assert_allclose(on("gpu", lambda: losses("triton")), expected, rtol=2e-3)
    np.testing.assert_allclose(on("gpu", lambda: losses("blockwise")), expected, rtol=2e-4)


def test_answers_are_those_of_the_model_without_a_cache():
    """Chunks behind a cache, batches, rows of their own: the tokens that the whole sequence makes likeliest."""
    config = small_model()
    params = init_params(config, jax.random.key(1))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 512, length).astype(np.int32) for length in (1300, 700, 1299)]
    prompts[2][:1000] = prompts[0][:1000]
    expected = []
    # Of one length, so that it is compiled once: nothing sees the padding behind it.
    forward = jax.jit(lambda tokens: Llama(config).apply({"params": params}, tokens))
    for prompt in prompts:
        row = np.zeros(1408, np.int32)
        row[: len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + 4):
            row[end] = np.argmax(forward(row[None])[0, end - 1] @ params["head"])
        expected.append(row[len(prompt) : len(prompt) + 4])
    np.testing.assert_array_equal(generate(config, params, prompts, 4), expected)
    one_by_one = dict(answers(config, params, prompts, 4, chunk=256))
    np.testing.assert_array_equal([one_by_one[i] for i in range(3)], expected)


def test_decoding_holds_the_cache_once():
    """No copy with another layout, as XLA makes of it where heads are a batch axis of products."""
    config = small_model()
    params = init_params(config, jax.random.key(1))
    B = 8
    cache = init_cache(config, B, 4096)
    sampling = jnp.float32(1.0), jnp.float32(1.0), np.full(decoding._MAX_EOS, -1, np.int32)
    program = decoding._segment.lower(
        config, "greedy", params, cache, np.zeros(B, np.int32), np.zeros(B, np.int32), np.zeros(B, bool),
        1, 16, sampling, decoding.row_keys(jax.random.key(0), B),
    ).compile()  # fmt: skip
    assert program.memory_analysis().temp_size_in_bytes < cache["k"].nbytes


# Operands in bfloat16 give errors of 0.2 to 0.5 %; float32 is computed with all its bits by our kernel alone.
BFLOAT16 = 1e-2


@pytest.mark.parametrize(("N", "K", "H"), [(9, 3, 64), (8, 2, 128)])
@pytest.mark.parametrize(
    ("implementation", "documents"), [("triton", 3), ("cudnn", 1), ("blockwise", 3)]
)
def test_kernels_that_train(implementation, documents, N, K, H):
    q, k, v, ids = make_inputs(1001, 1001, N, K, H, documents=documents)
    weights = jnp.cos(jnp.arange(q.size)).reshape(q.shape)

    def both(kernel, *inputs):
        def loss(*inputs):
            out = kernel(*inputs, ids, ids)
            return jnp.sum(weights * out.astype(jnp.float32)), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return out, *gradients

    got = both(functools.partial(attention, implementation=implementation), q, k, v)
    expected = both(reference, *(x.astype(jnp.float32) for x in (q, k, v)))
    assert all(error(a, b) < BFLOAT16 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, BFLOAT16), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("keywords", [{}, {"window": 300}, {"soft_cap": 5.0, "scale": 0.2}])
@pytest.mark.parametrize(
    ("L", "S", "offset", "N", "K", "H"),
    [(1024, 4096, 3000, 9, 3, 64), (100, 1000, 900, 8, 2, 128), (64, 200, 0, 4, 4, 32)],
)
def test_the_kernel_after_a_cache(L, S, offset, N, K, H, keywords, dtype, bound):
    q, k, v, k_ids = make_inputs(L, S, N, K, H, dtype)
    ids = k_ids[:, offset : offset + L]
    kernel = functools.partial(attention, implementation="triton", **keywords)
    out = jax.jit(kernel)(q, k, v, ids, k_ids, jnp.int32(offset))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(functools.partial(reference, **keywords))(
            *(x.astype(jnp.float32) for x in (q, k, v)), ids, k_ids, offset
        )
    assert error(out, exact) < bound
