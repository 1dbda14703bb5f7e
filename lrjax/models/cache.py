"""The key/value cache of generation: a plain tree that `Llama` reads, extends and hands back.

    cache = init_cache(config, batch=4, max_length=1024)
    x_BLD, cache = model.apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL, cache)

Every call writes its L tokens at indices `length .. length + L - 1`, in all rows, and advances `length`; a
prompt may come in chunks. RoPE scalings that depend on the length (dynamic, longrope) go by `max_length`, so
that all chunks agree on one encoding. Rows of different lengths are padded on the left with segment id 0. Writing past
`max_length` is the caller's mistake and cannot be seen under jit: size the cache for prompt and answer.
"""

import jax.numpy as jnp


def init_cache(config, batch: int, max_length: int, dtype=None) -> dict:
    """An empty cache for `batch` rows of up to `max_length` tokens.

    Returns {"k", "v": [layers, B, S, K, H] in `dtype` (default: the compute dtype),
    "segment_ids": int32 [B, S], 0 where empty, "length": int32 scalar}.
    """
    shape = (config.num_layers, batch, max_length, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(dtype or config.dtype)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "segment_ids": jnp.zeros((batch, max_length), jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }
