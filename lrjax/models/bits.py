"""bfloat16 arrays that layers are cut out of, held as the integers of their bits.

XLA's CPU backend moves bfloat16 element by element: cutting a layer out of a stack of weights or out of the cache takes
about ten times as long as with the same bytes as integers (`python -m benchmarks.bits`). On other platforms the two
are one.
"""

import jax.numpy as jnp
from jax import lax


def to_bits(x):
    """bfloat16 as uint16, anything else as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x):
    """The inverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
