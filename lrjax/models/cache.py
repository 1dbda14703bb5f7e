"""The key/value cache of generation: a plain tree that `Llama` reads, extends and hands back.

    cache = init_cache(config, batch=4, max_length=1024)
    x_BLD, cache = model.apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL, cache)

Every call writes its L tokens at indices `length .. length + L - 1`, in all rows, and advances `length`; a
prompt may come in chunks. RoPE scalings that depend on the length (dynamic, longrope) go by `max_length`, so
that all chunks agree on one encoding. Rows of different lengths are padded on the left with segment id 0. Writing past
`max_length` is the caller's mistake and cannot be seen under jit: size the cache for prompt and answer.
Of bfloat16 keys and values it holds the bits (`lrjax.models.bits`).
"""

import jax.numpy as jnp

from lrjax.models.bits import to_bits
from lrjax.sharding import current


def init_cache(config, batch: int, max_length: int, dtype=None) -> dict:
    """An empty cache for `batch` rows of up to `max_length` tokens.

    Returns {"k", "v": [layers, B, S, K, H] in `dtype` (default: the compute dtype) as `to_bits` has it,
    "segment_ids": int32 [B, S], 0 where empty, "length": int32 scalar}.
    """
    shape = (config.num_layers, batch, max_length, config.num_kv_heads, config.head_dim)
    dtype = to_bits(jnp.zeros((), dtype or config.dtype)).dtype
    here = current()

    def zeros(shape, dtype, names):
        # On a mesh each device makes its own part: rows, key heads, and the length.
        return jnp.zeros(shape, dtype, device=here.sharding(names, shape) if here.split else None)

    axes = ("layers", "batch", "length", "kv_heads", None)
    return {
        "k": zeros(shape, dtype, axes),
        "v": zeros(shape, dtype, axes),
        "segment_ids": zeros((batch, max_length), jnp.int32, ("batch", "length")),
        "length": jnp.zeros((), jnp.int32),
    }
