"""Rotary position embedding from explicit positions: float32 angles, no table, no maximum position.

    cos_BLH, sin_BLH = rope_angles(positions_BL, head_dim, theta)
    q_BLNH = apply_rope(q_BLNH, cos_BLH, sin_BLH)

The convention is that of Hugging Face's Llama ("rotate half"): dimension i is paired with i + head_dim / 2.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rope_angles(
    positions_BL: Int[Array, "B L"], head_dim: int, theta: float
) -> tuple[Float[Array, "B L h"], Float[Array, "B L h"]]:
    """Cosine and sine, float32 [B, L, head_dim / 2], of position * theta^(-2i / head_dim).

    float32 whatever the model computes in: bfloat16 rounds position 257 to 256.
    """
    # On the host: a compiler that folds 1 / theta^e rounds it otherwise, which shows at large positions.
    exponent_h = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency_h = np.float32(1) / (theta ** exponent_h.astype(np.float64)).astype(np.float32)
    angles_BLh = positions_BL.astype(jnp.float32)[..., None] * frequency_h
    return jnp.cos(angles_BLh), jnp.sin(angles_BLh)


def apply_rope(
    x_BLNH: Float[Array, "B L N H"], cos_BLh: Float[Array, "B L h"], sin_BLh: Float[Array, "B L h"]
) -> Float[Array, "B L N H"]:
    """Rotates every head of `x_BLNH` by its token's angles; computes in float32, keeps the dtype."""
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BLh[:, :, None, :], sin_BLh[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLNH.dtype)


def paper_theta(theta: float, factor: float, head_dim: int) -> float:
    """The RoPE base for a window `factor` times as long: theta * (f^2 - f + 1)^(d / (d - 2)).

    LongRecipe (arXiv 2409.00509) gives bases without a formula; this one reproduces all four of them.
    """
    return theta * (factor**2 - factor + 1) ** (head_dim / (head_dim - 2))
