"""The token embedding on a mesh: the table is split over its width, and tokens travel, not the table.

Each device looks up its part of the width for all the tokens of its group; an all-to-all then gives every device the
whole width of its own tokens. XLA by itself would gather the table, or all tokens at full width.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lrjax import sharding
from lrjax.models.bits import from_bits, to_bits

TABLE_AXES = (None, "table_embed")


def embed(table_VD, tokens_BL, dtype):
    """Rows of the table, [B, L, D] in `dtype`; NaN for a token id beyond the table."""

    def take(table_VD, tokens_BL):
        return _rows(table_VD, tokens_BL).astype(dtype)

    here = sharding.current()
    if not here.split:
        return take(table_VD, tokens_BL)
    table_spec = here.spec(TABLE_AXES, table_VD.shape)
    tokens_spec = here.spec(("batch", "length"), tokens_BL.shape)
    batch, length, width = (_axes(e) for e in (*tokens_spec, table_spec[1]))

    def local(table_Vd, tokens_bl):
        for dimension, axes in enumerate((batch, length)):
            for axis in reversed(axes):
                if axis in width:
                    tokens_bl = lax.all_gather(tokens_bl, axis, axis=dimension, tiled=True)
        x = take(table_Vd, tokens_bl)
        for axis in reversed(width):
            if axis in batch or axis in length:
                x = lax.all_to_all(x, axis, 0 if axis in batch else 1, 2, tiled=True)
            else:
                x = lax.all_gather(x, axis, axis=2, tiled=True)
        return x

    return jax.shard_map(
        local, mesh=here.mesh, in_specs=(table_spec, tokens_spec),
        out_specs=here.spec(("batch", "length", None), (*tokens_BL.shape, table_VD.shape[1])),
        check_vma=False,
    )(table_VD, tokens_BL)  # fmt: skip


@jax.custom_vjp
def _rows(table_VD, tokens_BL):
    """Rows of the table as stored: of bfloat16, XLA's CPU backend would first make all of it float32."""
    inside_BL1 = ((tokens_BL >= 0) & (tokens_BL < len(table_VD)))[..., None]
    rows_BLD = from_bits(jnp.take(to_bits(table_VD), tokens_BL, axis=0, mode="clip"))
    return jnp.where(inside_BL1, rows_BLD, jnp.nan)


def _rows_forward(table_VD, tokens_BL):
    return _rows(table_VD, tokens_BL), (table_VD, tokens_BL)


def _rows_backward(residuals, g_BLD):
    table_VD, tokens_BL = residuals
    _, add_up = jax.vjp(lambda table: jnp.take(table, tokens_BL, axis=0, mode="fill"), table_VD)
    return *add_up(g_BLD), None


_rows.defvjp(_rows_forward, _rows_backward)


def _axes(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
