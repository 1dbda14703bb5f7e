"""One model for the Llama family and its relatives; layers scanned, remat by name.

RMSNorm, rotary grouped-query attention and a gated MLP are common to them; what differs is a field of
`LlamaConfig` (biases, norms of queries and keys, sliding windows, norm placement, RoPE scaling, ...).

    config = LlamaConfig(vocab_size=..., num_layers=..., ...)
    params = init_params(config, jax.random.key(0))
    x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
    logits_BLV = lrjax.models.head.logits(params, x_BLD)

Positions, segment ids and the causal order are three separate things: positions only turn the rotary angles,
segment ids keep packed documents apart, causality follows the index. Parameters are a plain nested dict
(`LOGICAL_AXES` shows it), every layer's stacked on axis 0.

B batch, L query length, D model width, N query heads, K key/value heads, H head width, F feed-forward width.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lrjax.errors import UserError
from lrjax.models import context
from lrjax.models.attention import (
    IMPLEMENTATIONS,
    LANES,
    MAX_BLOCK,
    attention,
    few_queries,
    takes_few_queries,
)
from lrjax.models.bits import from_bits, to_bits
from lrjax.models.embedding import TABLE_AXES, embed
from lrjax.models.linear import linear
from lrjax.models.rope import PLAIN, RopeScaling, apply_rope, rope_angles
from lrjax.sharding import constrain, current

COMPUTE_DTYPES = ("bfloat16", "float32")

# What the backward pass finds in memory and what it computes again; "none" keeps everything. Under "full" that is
# what enters each layer; "offload" moves this to the host's memory: a long sequence then costs the device little.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": lambda x: nn.gelu(x, approximate=True)}

# Every weight that a model of this file can have; `logical_axes` picks those of one model.
LOGICAL_AXES = {
    "embedding": TABLE_AXES,
    "layers": {
        "attention_norm": ("layers", "embed"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "k": ("layers", "embed", "kv_heads", "head_dim"),
        "v": ("layers", "embed", "kv_heads", "head_dim"),
        "q_bias": ("layers", "heads", "head_dim"),
        "k_bias": ("layers", "kv_heads", "head_dim"),
        "v_bias": ("layers", "kv_heads", "head_dim"),
        "q_norm": ("layers", "head_dim"),
        "k_norm": ("layers", "head_dim"),
        "o": ("layers", "heads", "head_dim", "embed"),
        "post_attention_norm": ("layers", "embed"),
        "mlp_norm": ("layers", "embed"),
        "gate": ("layers", "embed", "mlp"),
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
        "post_mlp_norm": ("layers", "embed"),
    },
    "final_norm": ("embed",),
    "head": ("head_embed", "vocab"),  # absent when the embedding is tied
}

_EVERYTHING = 2**30  # the sliding window of a layer that has none


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and way of computing of a model. Raises `UserError` for values that fit no model."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_position_embeddings: int = 8192  # the window it was trained for; sizes nothing
    dtype: str = "bfloat16"  # of activations and matmul operands; parameters keep their own
    remat: str = "none"
    attention: str = "auto"
    attention_block: int = MAX_BLOCK  # splash: at most so many queries and keys at a time
    context_parallel: str = "gather"  # where a sequence is split over devices

    # ---- what differs between the relatives
    family: str = "llama"  # whose checkpoints it reads and writes: a name in checkpoints.families
    rope_scaling: RopeScaling = PLAIN
    partial_rotary_factor: float = 1.0  # share of the head's dimensions that is rotated
    sliding_window: int | None = None  # keys that a query sees, by index and itself among them
    sliding_layers: tuple[int, ...] | None = None  # the layers that have the window; None: all
    local_rope_theta: float | None = None  # of the sliding layers, plain RoPE; None: as the others
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over the head's dimensions, before the rotation
    post_norms: bool = False  # also norm what attention and MLP add to the residual stream
    unit_offset_norms: bool = False  # norms multiply by 1 + weight
    scale_embedding: bool = False  # multiply embeddings by sqrt(embed_dim)
    activation: str = "silu"
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attention_soft_cap: float | None = None  # scores s become cap * tanh(s / cap)

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def __post_init__(self):
        if isinstance(self.rope_scaling, dict):  # as JSON has them
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.sliding_layers is not None:
            object.__setattr__(self, "sliding_layers", tuple(self.sliding_layers))
        positive = (
            "vocab_size num_layers embed_dim num_heads num_kv_heads head_dim mlp_dim "
            "rope_theta norm_eps max_position_embeddings sliding_window local_rope_theta "
            "query_pre_attn_scalar attention_soft_cap"
        )
        for name in positive.split():
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"model.{name}: {getattr(self, name)!r}; must be positive")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads: {self.num_kv_heads} does not divide num_heads ({self.num_heads})"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim: {self.head_dim}; rotary embedding needs an even number"
            )
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2 or self.rotary_dim < 4:
            raise UserError(
                f"model.partial_rotary_factor: {self.partial_rotary_factor} rotates {self.rotary_dim} of "
                f"{self.head_dim} dimensions; allowed: an even number from 4 on"
            )
        try:
            self.rope_scaling.check_dim(self.rotary_dim)
        except UserError as error:
            raise UserError(f"model.rope_scaling.{error}") from error
        if self.sliding_layers is not None:
            layers = range(self.num_layers)
            if self.sliding_window is None or not all(i in layers for i in self.sliding_layers):
                raise UserError(
                    f"model.sliding_layers: {self.sliding_layers} with sliding_window {self.sliding_window}; "
                    f"allowed: layers from 0 to {self.num_layers - 1}, and a window"
                )
        if self.local_rope_theta is not None and self.sliding_layers is None:
            raise UserError(
                f"model.local_rope_theta: {self.local_rope_theta}; it belongs to sliding_layers, and there are none"
            )
        if self.attention_block < LANES or self.attention_block % LANES:
            raise UserError(
                f"model.attention_block: {self.attention_block}; allowed: multiples of {LANES}"
            )
        for name, allowed in (
            ("dtype", COMPUTE_DTYPES),
            ("remat", tuple(REMAT_POLICIES)),
            ("attention", IMPLEMENTATIONS),
            ("context_parallel", context.CONTEXT_PARALLEL),
            ("activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model.{name}: {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )


class Llama(nn.Module):
    """Tokens in, final-normed hidden states out; `lrjax.models.head` makes logits, losses or scores of them."""

    config: LlamaConfig

    def __call__(self, tokens_BL, positions_BL=None, segment_ids_BL=None, cache=None):
        """Runs the model.

        Args:
            tokens_BL: int32 token ids below vocab_size; one beyond it gives NaN.
            positions_BL: int32 rotary positions; default: the index (counted on from the cache's length).
            segment_ids_BL: int32 document of each token, 0 for padding; default: all 1.
            cache: of `lrjax.models.cache.init_cache`; its tokens come before these.

        Returns:
            x_BLD in config.dtype, or (x_BLD, cache) when a cache is given.
        """
        length = None
        if positions_BL is None:
            start = 0 if cache is None else cache["length"]
            positions_BL = jnp.broadcast_to(start + jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if cache is not None:  # all calls that share a cache have to agree on the encoding
            length = cache["segment_ids"].shape[1]
        angles = model_angles(self.config, positions_BL, length)
        return self.run(tokens_BL, angles, segment_ids_BL, cache)

    @nn.compact
    def run(self, tokens_BL, angles, segment_ids_BL=None, cache=None):
        """The same with the rotary angles given, as `model_angles` makes them."""
        c = self.config
        start = 0 if cache is None else cache["length"]
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        L = tokens_BL.shape[1]
        head_tail = False
        if cache is None and context.devices_along_length() > 1:
            # Padding to whole chunks follows the sequence, so nothing sees it; it is cut off again.
            padding = -L % context.length_multiple(c.attention, c.context_parallel)
            tokens_BL, segment_ids_BL = (
                jnp.pad(a, ((0, 0), (0, padding))) for a in (tokens_BL, segment_ids_BL)
            )
            angles = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, padding), (0, 0))), angles)
            head_tail = c.context_parallel in context.HEAD_TAIL
        if head_tail:
            tokens_BL, segment_ids_BL, angles = jax.tree.map(
                context.to_head_tail, (tokens_BL, segment_ids_BL, angles)
            )
        # Variance 1 for what enters the residual stream, unless the embedding is the head too.
        embedding_init = _normal(c.embed_dim if c.tie_embeddings else 1)
        embedding_VD = self.param(
            "embedding", embedding_init, (c.vocab_size, c.embed_dim), jnp.float32
        )
        x_BLD = embed(embedding_VD, tokens_BL, c.dtype)
        if c.scale_embedding:
            x_BLD *= jnp.asarray(math.sqrt(c.embed_dim), c.dtype)

        k_cache, v_cache, k_segment_ids_BS = None, None, segment_ids_BL
        if cache is not None:
            k_cache, v_cache = cache["k"], cache["v"]
            k_segment_ids_BS = lax.dynamic_update_slice(
                cache["segment_ids"], segment_ids_BL.astype(jnp.int32), (0, start)
            )
        layer = Layer
        if c.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, name="layers")
        sliding_layers = range(c.num_layers) if c.sliding_layers is None else c.sliding_layers
        (x_BLD, k_cache, v_cache), _ = layers(
            (x_BLD, k_cache, v_cache),
            # Of each layer: its index, and whether it is one of the sliding ones.
            (jnp.arange(c.num_layers), np.isin(np.arange(c.num_layers), sliding_layers)),
            angles,
            segment_ids_BL,
            k_segment_ids_BS,
            start,
        )
        final_norm_D = self.param("final_norm", _norm_init(c), (c.embed_dim,), jnp.float32)
        if not c.tie_embeddings:  # read by lrjax.models.head
            self.param("head", _normal(c.embed_dim), (c.embed_dim, c.vocab_size), jnp.float32)
        x_BLD = rms_norm(x_BLD, final_norm_D, c.norm_eps, c.unit_offset_norms)
        if head_tail:
            x_BLD = context.from_head_tail(x_BLD)
        if cache is None:
            return x_BLD[:, :L]
        return x_BLD, {
            "k": k_cache,
            "v": v_cache,
            "segment_ids": k_segment_ids_BS,
            "length": start + tokens_BL.shape[1],
        }


class Layer(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)). The whole cache is carried, one layer written."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, carry, layer, angles, segment_ids_BL, k_segment_ids_BS, start):
        c = self.config
        D, N, K, H, F = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim
        index, is_sliding = layer
        residual = (
            2 * c.num_layers
        )  # additions to the residual stream: its variance stays 1 at the start

        def weight(name, shape, inputs, branches=1):
            return from_bits(self.param(name, _normal(inputs * branches), shape, jnp.float32))

        def norm(name, x):
            scale = self.param(name, _norm_init(c), x.shape[-1:], jnp.float32)
            return rms_norm(x, scale, c.norm_eps, c.unit_offset_norms)

        def axes(name):
            return LOGICAL_AXES["layers"][name][1:]

        def project(y_BLD, name, heads):
            out_BLNH = linear(y_BLD, weight(name, (D, heads, H), D), axes=axes(name))
            if c.qkv_bias:
                zeros = nn.initializers.zeros
                bias_NH = self.param(f"{name}_bias", zeros, (heads, H), jnp.float32)
                out_BLNH += bias_NH.astype(out_BLNH.dtype)
            return constrain(out_BLNH, ("batch", length, axes(name)[1], None))

        angles, window = _of_layer(c, is_sliding, angles)
        x_BLD, k_cache, v_cache = carry
        # With a cache it is the keys that are split along the length.
        length = "length" if k_cache is None else None
        x_BLD = checkpoint_name(constrain(x_BLD, ("batch", length, None)), "layer_input")
        y_BLD = norm("attention_norm", x_BLD)
        q_BLNH, k_BSKH = project(y_BLD, "q", N), project(y_BLD, "k", K)
        if c.qk_norm:
            q_BLNH, k_BSKH = norm("q_norm", q_BLNH), norm("k_norm", k_BSKH)
        q_BLNH, k_BSKH = apply_rope(q_BLNH, *angles), apply_rope(k_BSKH, *angles)
        v_BSKH = project(y_BLD, "v", K)
        if k_cache is not None:
            k_cache, k_BSKH = _extend(k_cache, k_BSKH, index, start)
            v_cache, v_BSKH = _extend(v_cache, v_BSKH, index, start)
        segments = segment_ids_BL, k_segment_ids_BS
        options = {
            "window": window,
            "soft_cap": c.attention_soft_cap,
            "scale": c.query_pre_attn_scalar and c.query_pre_attn_scalar**-0.5,
        }
        if k_cache is not None and takes_few_queries(x_BLD.shape[1], c.attention):
            out_BLNH = few_queries(q_BLNH, k_cache, v_cache, index, *segments, start, **options)
        else:
            out_BLNH = attention(
                q_BLNH,
                k_BSKH,
                v_BSKH,
                *segments,
                0 if k_cache is None else start,  # under remat even a plain 0 arrives traced
                implementation=c.attention,
                block=c.attention_block,
                context_parallel=c.context_parallel,
                **options,
            )
        y_BLD = linear(out_BLNH, weight("o", (N, H, D), N * H, residual), 2, axes("o"))
        x_BLD += norm("post_attention_norm", y_BLD) if c.post_norms else y_BLD

        y_BLD = norm("mlp_norm", x_BLD)
        gate_BLF = linear(y_BLD, weight("gate", (D, F), D), axes=axes("gate"))
        up_BLF = linear(y_BLD, weight("up", (D, F), D), axes=axes("up"))
        y_BLF = constrain(gated(c.activation, gate_BLF, up_BLF), ("batch", length, "mlp"))
        y_BLD = linear(y_BLF, weight("down", (F, D), F, residual), axes=axes("down"))
        x_BLD += norm("post_mlp_norm", y_BLD) if c.post_norms else y_BLD
        return (x_BLD, k_cache, v_cache), None


def model_angles(config: LlamaConfig, positions_BL, length_B=None) -> tuple:
    """The rotary angles of every layer: one (cos, sin), or two where sliding layers have a theta of their own.

    `length_B` is what encodings that depend on the length go by, see `rope_angles`.
    """
    c = config
    angles = rope_angles(positions_BL, c.rotary_dim, c.rope_theta, c.rope_scaling, length_B)
    if c.local_rope_theta is None:
        return (angles,)
    return angles, rope_angles(positions_BL, c.rotary_dim, c.local_rope_theta)


def _of_layer(c: LlamaConfig, is_sliding, angles):
    """The angles of one layer, and its window: None, a number, or traced where the layers differ."""
    if c.local_rope_theta is None:
        (of_layer,) = angles
    else:
        full, local = angles
        of_layer = jax.tree.map(lambda a, b: jnp.where(is_sliding, b, a), full, local)
    if c.sliding_window is None or c.sliding_layers is None:
        return of_layer, c.sliding_window
    return of_layer, jnp.where(is_sliding, c.sliding_window, _EVERYTHING)


def rms_norm(x_BLD, scale_D, eps: float, unit_offset: bool = False):
    """x / rms(x) * scale over the last axis, computed in float32, returned in the dtype of x.

    With `unit_offset`, as in Gemma, the scale is 1 + scale_D.
    """
    x32_BLD = x_BLD.astype(jnp.float32)
    inverse_BL1 = lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + eps)
    if unit_offset:
        scale_D = 1 + scale_D.astype(jnp.float32)
    return (x32_BLD * inverse_BL1 * scale_D).astype(x_BLD.dtype)


def gated(activation: str, gate_BLF, up_BLF):
    """activation(gate) * up. On a CPU computed in float32 and rounded once: XLA rounds bfloat16 there after every step
    of the activation, which takes more than twice as long."""
    dtype = gate_BLF.dtype
    if current().platform == "cpu":
        gate_BLF, up_BLF = gate_BLF.astype(jnp.float32), up_BLF.astype(jnp.float32)
    return (ACTIVATIONS[activation](gate_BLF) * up_BLF).astype(dtype)


def logical_axes(params) -> dict:
    """The logical axis names of every leaf of a parameter tree, as `LOGICAL_AXES` has them."""

    def pick(axes, tree):
        return {
            name: pick(axes[name], leaf) if isinstance(leaf, Mapping) else axes[name]
            for name, leaf in tree.items()
        }

    return pick(LOGICAL_AXES, params)


def init_params(config: LlamaConfig, rng, shardings_of=None) -> dict:
    """Fresh float32 parameters: norms 1, weights normal with variance 1 / fan-in.

    Args:
        shardings_of: function (params, mesh) -> their shardings, to make them in place on the current layout's mesh.
    """
    # Under jit only the parameters are computed, not the forward pass that flax reads their shapes from.
    mesh = current().mesh
    where = None
    if shardings_of is not None and mesh is not None:
        where = {"params": shardings_of(abstract_params(config), mesh)}
    init = jax.jit(Llama(config).init, out_shardings=where)
    return init(rng, jnp.zeros((1, 1), jnp.int32))["params"]


def abstract_params(config: LlamaConfig) -> dict:
    """The shapes and dtypes of `init_params`, as `jax.ShapeDtypeStruct`s; computes nothing."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _norm_init(c: LlamaConfig):
    """Of a norm's weight: what multiplies by 1."""
    return nn.initializers.zeros if c.unit_offset_norms else nn.initializers.ones


def _normal(inputs: int):
    return nn.initializers.normal(1 / math.sqrt(inputs))


def _extend(cache_nBSKH, new_BLKH, layer, start):
    """Writes new keys or values into one layer of the cache: (the cache, that layer's [B, S, K, H])."""
    held = cache_nBSKH.dtype
    new_BLKH = to_bits(new_BLKH.astype(jnp.bfloat16 if held == jnp.uint16 else held))
    if context.devices_along_length() == 1:
        cache_nBSKH = lax.dynamic_update_slice(cache_nBSKH, new_BLKH[None], (layer, 0, start, 0, 0))
        return cache_nBSKH, from_bits(lax.dynamic_index_in_dim(cache_nBSKH, layer, keepdims=False))
    # The keys are split over devices. A slice that begins anywhere would have XLA gather the whole cache on each of
    # them; here every place asks for what it gets.
    old_BSKH = lax.dynamic_index_in_dim(cache_nBSKH, layer, keepdims=False)
    from_S = jnp.arange(old_BSKH.shape[1]) - start
    inside_S11 = ((from_S >= 0) & (from_S < new_BLKH.shape[1]))[:, None, None]
    placed_BSKH = jnp.take(new_BLKH, from_S, axis=1, mode="clip")
    layer_BSKH = jnp.where(inside_S11, placed_BSKH, old_BSKH)
    cache_nBSKH = lax.dynamic_update_index_in_dim(cache_nBSKH, layer_BSKH, layer, 0)
    return cache_nBSKH, from_bits(layer_BSKH)
