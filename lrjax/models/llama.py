"""The Llama architecture: RMSNorm, rotary grouped-query attention, SwiGLU; layers scanned, remat by name.

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

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lrjax.errors import UserError
from lrjax.models import context
from lrjax.models.attention import IMPLEMENTATIONS, attention
from lrjax.models.embedding import TABLE_AXES, embed
from lrjax.models.linear import linear
from lrjax.models.rope import apply_rope, rope_angles
from lrjax.sharding import constrain, current

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

LOGICAL_AXES = {
    "embedding": TABLE_AXES,
    "layers": {
        "attention_norm": ("layers", "embed"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "k": ("layers", "embed", "kv_heads", "head_dim"),
        "v": ("layers", "embed", "kv_heads", "head_dim"),
        "o": ("layers", "heads", "head_dim", "embed"),
        "mlp_norm": ("layers", "embed"),
        "gate": ("layers", "embed", "mlp"),
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
    },
    "final_norm": ("embed",),
    "head": ("head_embed", "vocab"),  # absent when the embedding is tied
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and way of computing of a Llama model. Raises `UserError` for values that fit no model."""

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
    context_parallel: str = "gather"  # where a sequence is split over devices

    def __post_init__(self):
        positive = (
            "vocab_size num_layers embed_dim num_heads num_kv_heads head_dim mlp_dim "
            "rope_theta norm_eps max_position_embeddings"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name}: {getattr(self, name)!r}; must be positive")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads: {self.num_kv_heads} does not divide num_heads ({self.num_heads})"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim: {self.head_dim}; rotary embedding needs an even number"
            )
        for name, allowed in (
            ("dtype", ("bfloat16", "float32")),
            ("remat", tuple(REMAT_POLICIES)),
            ("attention", IMPLEMENTATIONS),
            ("context_parallel", context.CONTEXT_PARALLEL),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model.{name}: {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )


class Llama(nn.Module):
    """Tokens in, final-normed hidden states out; `lrjax.models.head` makes logits, losses or scores of them."""

    config: LlamaConfig

    @nn.compact
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
        c = self.config
        start = 0 if cache is None else cache["length"]
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(start + jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        L = tokens_BL.shape[1]
        head_tail = False
        if cache is None and context.devices_along_length() > 1:
            # Padding to whole chunks follows the sequence, so nothing sees it; it is cut off again.
            padding = -L % context.length_multiple(c.attention, c.context_parallel)
            tokens_BL, positions_BL, segment_ids_BL = (
                jnp.pad(a, ((0, 0), (0, padding)))
                for a in (tokens_BL, positions_BL, segment_ids_BL)
            )
            head_tail = c.context_parallel == "gather"
        if head_tail:
            tokens_BL, positions_BL, segment_ids_BL = (
                context.to_head_tail(a) for a in (tokens_BL, positions_BL, segment_ids_BL)
            )
        # Variance 1 for what enters the residual stream, unless the embedding is the head too.
        embedding_init = _normal(c.embed_dim if c.tie_embeddings else 1)
        embedding_VD = self.param(
            "embedding", embedding_init, (c.vocab_size, c.embed_dim), jnp.float32
        )
        x_BLD = embed(embedding_VD, tokens_BL, c.dtype)

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
        (x_BLD, k_cache, v_cache), _ = layers(
            (x_BLD, k_cache, v_cache),
            jnp.arange(c.num_layers),
            rope_angles(positions_BL, c.head_dim, c.rope_theta),
            segment_ids_BL,
            k_segment_ids_BS,
            start,
        )
        final_norm_D = self.param("final_norm", nn.initializers.ones, (c.embed_dim,), jnp.float32)
        if not c.tie_embeddings:  # read by lrjax.models.head
            self.param("head", _normal(c.embed_dim), (c.embed_dim, c.vocab_size), jnp.float32)
        x_BLD = rms_norm(x_BLD, final_norm_D, c.norm_eps)
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
        residual = (
            2 * c.num_layers
        )  # additions to the residual stream: its variance stays 1 at the start

        def weight(name, shape, inputs, branches=1):
            return self.param(name, _normal(inputs * branches), shape, jnp.float32)

        def scale(name):
            return self.param(name, nn.initializers.ones, (D,), jnp.float32)

        def axes(name):
            return LOGICAL_AXES["layers"][name][1:]

        x_BLD, k_cache, v_cache = carry
        # With a cache it is the keys that are split along the length.
        length = "length" if k_cache is None else None
        x_BLD = checkpoint_name(constrain(x_BLD, ("batch", length, None)), "layer_input")
        y_BLD = rms_norm(x_BLD, scale("attention_norm"), c.norm_eps)
        q_BLNH = apply_rope(linear(y_BLD, weight("q", (D, N, H), D), axes=axes("q")), *angles)
        k_BSKH = apply_rope(linear(y_BLD, weight("k", (D, K, H), D), axes=axes("k")), *angles)
        v_BSKH = linear(y_BLD, weight("v", (D, K, H), D), axes=axes("v"))
        q_BLNH = constrain(q_BLNH, ("batch", length, "heads", None))
        k_BSKH = constrain(k_BSKH, ("batch", length, "kv_heads", None))
        v_BSKH = constrain(v_BSKH, ("batch", length, "kv_heads", None))
        if k_cache is not None:
            k_cache, k_BSKH = _extend(k_cache, k_BSKH, layer, start)
            v_cache, v_BSKH = _extend(v_cache, v_BSKH, layer, start)
        out_BLNH = attention(
            q_BLNH,
            k_BSKH,
            v_BSKH,
            segment_ids_BL,
            k_segment_ids_BS,
            0 if k_cache is None else start,  # under remat even a plain 0 arrives traced
            implementation=c.attention,
            context_parallel=c.context_parallel,
        )
        x_BLD += linear(out_BLNH, weight("o", (N, H, D), N * H, residual), 2, axes("o"))

        y_BLD = rms_norm(x_BLD, scale("mlp_norm"), c.norm_eps)
        gate_BLF = linear(y_BLD, weight("gate", (D, F), D), axes=axes("gate"))
        up_BLF = linear(y_BLD, weight("up", (D, F), D), axes=axes("up"))
        y_BLF = constrain(nn.silu(gate_BLF) * up_BLF, ("batch", length, "mlp"))
        x_BLD += linear(y_BLF, weight("down", (F, D), F, residual), axes=axes("down"))
        return (x_BLD, k_cache, v_cache), None


def rms_norm(x_BLD, scale_D, eps: float):
    """x / rms(x) * scale over the last axis, computed in float32, returned in the dtype of x."""
    x32_BLD = x_BLD.astype(jnp.float32)
    inverse_BL1 = lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + eps)
    return (x32_BLD * inverse_BL1 * scale_D).astype(x_BLD.dtype)


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


def _normal(inputs: int):
    return nn.initializers.normal(1 / math.sqrt(inputs))


def _extend(cache_nBSKH, new_BLKH, layer, start):
    """Writes new keys or values into one layer of the cache: (the cache, that layer's [B, S, K, H])."""
    new_BLKH = new_BLKH.astype(cache_nBSKH.dtype)
    cache_nBSKH = lax.dynamic_update_slice(cache_nBSKH, new_BLKH[None], (layer, 0, start, 0, 0))
    return cache_nBSKH, lax.dynamic_index_in_dim(cache_nBSKH, layer, keepdims=False)
