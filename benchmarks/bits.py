"""What it costs on a CPU to move bfloat16 as it is, and as the integers of its bits (`lrjax.models.bits`).

    python -m benchmarks.bits

At SmolLM2-135M's shape: one pass over 30 stacked [576, 1536] matrices, each cut out and multiplied with one row (a
step of decoding); the key cache of 4,608 tokens, every layer of which is extended and cut out; and one
[2048, 5632] matrix placed into a stack of 21 (an import). Milliseconds, best of 8 calls after one to compile.
"""

import time

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import contenders
from lrjax.models.bits import from_bits, to_bits


def best(function, *arguments, donated: bool = False) -> float:
    """Milliseconds of a jitted function whose first argument, if donated, becomes its first result."""
    jitted = jax.jit(function, donate_argnums=0 if donated else ())
    first, *rest = arguments
    result = jax.block_until_ready(jitted(first, *rest))
    seconds = []
    for _ in range(8):
        if donated:
            first = jax.tree.leaves(result)[0]
        start = time.perf_counter()
        result = jax.block_until_ready(jitted(first, *rest))
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def multiply(row_1I, stack_nIO):
    def layer(total, w_IO):
        product = lax.dot(row_1I, from_bits(w_IO), preferred_element_type=jnp.float32)
        return total + product, None

    return lax.scan(layer, jnp.zeros((1, stack_nIO.shape[2])), stack_nIO)[0]


def extend(cache_nSKH, new_1KH):
    def layer(carry, index):
        cache_nSKH, total = carry
        cache_nSKH = lax.dynamic_update_slice(cache_nSKH, new_1KH[None], (index, 4100, 0, 0))
        keys_SKH = from_bits(lax.dynamic_index_in_dim(cache_nSKH, index, keepdims=False))
        return (cache_nSKH, total + keys_SKH.astype(jnp.float32).sum(axis=0)), None

    start = cache_nSKH, jnp.zeros(new_1KH.shape[1:])
    (cache_nSKH, total), _ = lax.scan(layer, start, jnp.arange(cache_nSKH.shape[0]))
    return cache_nSKH, total


def place(stack_nIO, matrix_IO):
    return lax.dynamic_update_index_in_dim(stack_nIO, matrix_IO, 3, axis=0)


def main() -> None:
    row_1I = jnp.ones((1, 576), jnp.bfloat16)
    print(f"{contenders.machine()}\n{'ms':28}{'bfloat16':>10}{'as bits':>10}")
    for name, measure in (
        ("30 matrices times a row", lambda hold: best(
            multiply, row_1I, hold(jnp.ones((30, 576, 1536), jnp.bfloat16)))),
        ("30 layers of a cache", lambda hold: best(
            extend, hold(jnp.ones((30, 4608, 3, 64), jnp.bfloat16)),
            hold(jnp.ones((1, 3, 64), jnp.bfloat16)), donated=True)),
        ("one matrix into a stack", lambda hold: best(
            place, hold(jnp.ones((21, 2048, 5632), jnp.bfloat16)), hold(jnp.ones((2048, 5632), jnp.bfloat16)),
            donated=True)),
    ):  # fmt: skip
        print(f"{name:28}{measure(lambda x: x):>10.2f}{measure(to_bits):>10.2f}")


if __name__ == "__main__":
    main()
