"""Rotary position embedding from explicit positions: float32 angles, no table, no maximum position.

    cos_BLh, sin_BLh = rope_angles(positions_BL, rotary_dim, theta, scaling)
    q_BLNH = apply_rope(q_BLNH, cos_BLh, sin_BLh)

The convention is that of Hugging Face's Llama ("rotate half"): dimension i is paired with i + rotary_dim / 2.
`RopeScaling` holds what a checkpoint's `rope_scaling` says beside theta; plain RoPE with another theta (ABF, the
paper's base rule `paper_theta`) needs none.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lrjax.errors import UserError

# Which fields of `RopeScaling` each encoding reads.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of plain RoPE are changed, with the names of Hugging Face's configs.

    * `linear`: every frequency divided by `factor` (position interpolation, arXiv 2306.15595).
    * `dynamic`: the base grows with the length beyond the original window (NTK by length).
    * `yarn`: fast dimensions kept, slow ones divided by `factor`, a ramp between them; queries and keys are
      multiplied by the attention factor, by default 0.1 ln(factor) + 1 (arXiv 2309.00071).
    * `llama3`: the same in wavelengths (Llama 3.1).
    * `longrope`: one divisor per dimension, `short_factor` within the original window and `long_factor`
      beyond it; attention factor sqrt(1 + ln(factor) / ln(original window)) (arXiv 2402.13753).

    `dynamic` and `longrope` depend on the length of each row (see `rope_angles`). Raises `UserError` for values that
    an encoding cannot have, and for values of fields that it does not read.
    """

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # tokens; the window before the extension
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("short_factor", "long_factor"):  # lists, as JSON has them
            object.__setattr__(self, name, tuple(float(f) for f in getattr(self, name)))
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope_type: {self.rope_type!r}; allowed: {', '.join(ROPE_TYPES)}")
        read = ROPE_TYPES[self.rope_type]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rope_type", *read) and value != field.default:
                raise UserError(
                    f"{field.name}: {value!r}; rope_type {self.rope_type} has no such field"
                )
        window = self.original_max_position_embeddings
        for name, good, allowed in (
            ("factor", self.factor >= 1, "1 and more"),
            ("original_max_position_embeddings", window > 1 or "original_max_position_embeddings" not in read,
             "2 tokens and more"),
            ("attention_factor", self.attention_factor is None or self.attention_factor > 0, "more than 0"),
            ("beta_slow", 0 < self.beta_slow < self.beta_fast, "more than 0 and below beta_fast"),
            ("low_freq_factor", 0 < self.low_freq_factor < self.high_freq_factor,
             "more than 0 and below high_freq_factor"),
            ("short_factor", all(f > 0 for f in self.short_factor), "positive numbers"),
            ("long_factor", all(f > 0 for f in self.long_factor), "positive numbers"),
        ):  # fmt: skip
            if not good:
                raise UserError(
                    f"{name}: {getattr(self, name)!r} with rope_type {self.rope_type}; allowed: {allowed}"
                )

    def check_dim(self, rotary_dim: int) -> None:
        """Raises `UserError` unless LongRoPE's lists have one factor for each pair of dimensions."""
        if self.rope_type != "longrope":
            return
        for name in ("short_factor", "long_factor"):
            if (count := len(getattr(self, name))) != rotary_dim // 2:
                raise UserError(
                    f"{name} has {count} numbers; needed: {rotary_dim // 2}, one for each pair of "
                    f"the {rotary_dim} rotated dimensions"
                )

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self.rope_type in ("dynamic", "longrope")

    def attention_scale(self) -> float:
        """What rotated queries and keys are both multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.rope_type == "yarn":
            log = math.log(self.factor)
            if self.mscale and self.mscale_all_dim:
                return (0.1 * self.mscale * log + 1) / (0.1 * self.mscale_all_dim * log + 1)
            return 0.1 * log + 1
        if self.rope_type == "longrope":
            window = math.log(self.original_max_position_embeddings)
            return math.sqrt(1 + math.log(self.factor) / window)
        return 1.0


PLAIN = RopeScaling()


def rope_angles(
    positions_BL: Int[Array, "B L"],
    rotary_dim: int,
    theta: float,
    scaling: RopeScaling = PLAIN,
    length_B: Int[Array, "B"] | int | None = None,
) -> tuple[Float[Array, "B L h"], Float[Array, "B L h"]]:
    """Cosine and sine, float32 [B, L, rotary_dim / 2], of position * frequency, times the attention factor.

    float32 whatever the model computes in: bfloat16 rounds position 257 to 256.

    Args:
        length_B: tokens that `dynamic` and `longrope` set their frequencies for, by row. Default: the row's
            largest position + 1, so that no row depends on its neighbours (transformers takes the largest of the
            batch).
    """
    if scaling.by_length:
        if length_B is None:
            length_B = jnp.max(positions_BL, axis=1) + 1
        length_B11 = jnp.broadcast_to(length_B, positions_BL.shape[:1])[:, None, None]
        frequency = _frequency_by_length(rotary_dim, theta, scaling, length_B11)
    else:
        frequency = frequencies(rotary_dim, theta, scaling)
    angles_BLh = positions_BL.astype(jnp.float32)[..., None] * frequency
    scale = scaling.attention_scale()
    return jnp.cos(angles_BLh) * scale, jnp.sin(angles_BLh) * scale


def apply_rope(
    x_BLNH: Float[Array, "B L N H"], cos_BLh: Float[Array, "B L h"], sin_BLh: Float[Array, "B L h"]
) -> Float[Array, "B L N H"]:
    """Rotates every head by its token's angles: the first 2h dimensions, the others stay (partial RoPE).

    Computes in float32, keeps the dtype.
    """
    h = cos_BLh.shape[-1]
    first, second, rest = jnp.split(x_BLNH.astype(jnp.float32), (h, 2 * h), axis=-1)
    cos, sin = cos_BLh[:, :, None, :], sin_BLh[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_BLNH.dtype)


def paper_theta(theta: float, factor: float, head_dim: int) -> float:
    """The RoPE base for a window `factor` times as long: theta * (f^2 - f + 1)^(d / (d - 2)).

    LongRecipe (arXiv 2409.00509) gives bases without a formula; this one reproduces all four of them. It is the
    base that `dynamic` with the same factor reaches at the end of the longer window.
    """
    return theta * (factor**2 - factor + 1) ** (head_dim / (head_dim - 2))


def _plain_frequency(rotary_dim: int, theta: float) -> np.ndarray:
    """theta^(-2i / rotary_dim), float32 [h]."""
    # On the host: a compiler that folds 1 / theta^e rounds it otherwise, which shows at large positions.
    exponent_h = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.float32(1) / (theta ** exponent_h.astype(np.float64)).astype(np.float32)


def frequencies(rotary_dim: int, theta: float, s: RopeScaling) -> np.ndarray:
    """Radians per position, float32 [h], of the encodings that do not look at the length."""
    plain_h = _plain_frequency(rotary_dim, theta)
    slow_h = plain_h / np.float32(s.factor)
    if s.rope_type == "default":
        return plain_h
    if s.rope_type == "linear":
        return slow_h
    window = s.original_max_position_embeddings
    if s.rope_type == "yarn":
        # The (fractional) dimension that turns so many times within the original window.
        low, high = (
            rotary_dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (s.beta_fast, s.beta_slow)
        )
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        width = high - low or 0.001
        ramp_h = (np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(
            width
        )
        slow_share_h = np.clip(ramp_h, 0, 1)
        return slow_h * slow_share_h + plain_h * (1 - slow_share_h)
    # llama3: wavelengths over window / low_freq_factor are slowed down, those below window / high_freq_factor kept.
    wavelength_h = 2 * math.pi / plain_h.astype(np.float64)
    kept_h = (window / wavelength_h - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    kept_h = np.clip(kept_h, 0, 1)
    return ((1 - kept_h) * plain_h / s.factor + kept_h * plain_h).astype(np.float32)


def _frequency_by_length(rotary_dim: int, theta: float, s: RopeScaling, length_B11):
    """The same, float32 [B, 1, h], of the encodings that look at the length of each row."""
    plain_h = _plain_frequency(rotary_dim, theta)
    window = s.original_max_position_embeddings
    beyond_B11 = length_B11 > window
    if s.rope_type == "longrope":
        long_h, short_h = (
            plain_h / np.asarray(factor, np.float32) for factor in (s.long_factor, s.short_factor)
        )
        return jnp.where(beyond_B11, long_h, short_h)
    grown_B11 = s.factor * length_B11.astype(jnp.float32) / window - (s.factor - 1)
    base_B11 = theta * jnp.maximum(grown_B11, 1.0) ** (rotary_dim / (rotary_dim - 2))
    exponent_h = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return jnp.where(beyond_B11, 1 / base_B11**exponent_h, plain_h)
