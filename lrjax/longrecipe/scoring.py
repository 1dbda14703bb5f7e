"""The scorer: what extending a model changed for every token of a text (LongRecipe, equations 2 and 3).

The model before extension and the one after it read the same prefix; per token, the change of

    delta_logit    the raw logit of the token that came:  S_H'(x_t | x_<t) - S_H(x_t | x_<t)    (the paper's)
    delta_centred  the same after subtracting each model's mean logit over the vocabulary
    delta_logprob  its log-probability
    kl             how far the whole distribution moved, KL(p_H' || p_H) in nats; only where it is asked for

Raw logits are defined up to a constant per context, which training can move for all tokens alike; the other
three do not see it. `impact.SCORES` says how tokens are ranked by these; `contrast.py` scores with one model alone.

    scorer = make_scorer(config_base, config_extended)
    changes = scorer(params_base, params_extended, tokens_BL, positions_BL, segment_ids_BL)
    changes = score((config, params), (config_extended, params_extended), tokens_BL)

Logits exist for a chunk of indices at a time: never [B, L, V].
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lrjax import sharding
from lrjax.errors import UserError
from lrjax.models.head import STATS_ELEMENTS, kl_divergence, next_token_stats
from lrjax.models.llama import Llama, LlamaConfig


@functools.lru_cache(maxsize=8)
def make_scorer(
    config_base: LlamaConfig,
    config_extended: LlamaConfig,
    chunk: int | None = None,
    kl: bool = False,
) -> Callable[..., dict[str, Array]]:
    """The jitted scorer of two models, which may differ in all but the vocabulary (as a rule: in rope_theta).

    Args:
        chunk: indices of L whose logits exist at a time; default: as many as `models.head` chooses.
        kl: also the divergence, which computes the logits of both models once more.

    Returns:
        `scorer(params_base, params_extended, tokens_BL, positions_BL, segment_ids_BL)`, a dict of arrays
        [B, L-1] whose index t-1 is about token t given the tokens before it: delta_logit, delta_centred,
        delta_logprob, logprob_base, logprob_extended, kl if asked (float32) and valid (bool). Padding (segment 0) and
        the first token of a document have no prefix of their own: not valid, all values 0.

    Raises:
        UserError: the vocabularies differ.
    """
    if config_base.vocab_size != config_extended.vocab_size:
        raise UserError(
            f"scoring: the extended model has vocab_size {config_extended.vocab_size}, the base model "
            f"{config_base.vocab_size}; both must read the same tokens"
        )

    @jax.jit
    def scorer(params_base, params_extended, tokens_BL, positions_BL, segment_ids_BL):
        inputs = (tokens_BL, positions_BL, segment_ids_BL)
        base_BLD, base = _token_stats(config_base, params_base, *inputs, chunk)
        extended_BLD, extended = _token_stats(config_extended, params_extended, *inputs, chunk)
        valid = (segment_ids_BL[:, 1:] == segment_ids_BL[:, :-1]) & (segment_ids_BL[:, 1:] > 0)
        changes = {
            "delta_logit": extended["logit"] - base["logit"],
            "delta_centred": (extended["logit"] - extended["mean_logit"])
            - (base["logit"] - base["mean_logit"]),
            "delta_logprob": extended["logprob"] - base["logprob"],
            "logprob_base": base["logprob"],
            "logprob_extended": extended["logprob"],
        }
        if kl:
            size = chunk or max(1, STATS_ELEMENTS // (len(tokens_BL) * config_base.vocab_size))
            changes["kl"] = kl_divergence(
                params_extended, extended_BLD, params_base, base_BLD, size
            )[:, :-1]
        changes = {name: jnp.where(valid, value, 0.0) for name, value in changes.items()}
        # Whole on every process: the first one writes them.
        return jax.tree.map(
            lambda a: sharding.constrain(a, (None, None)), changes | {"valid": valid}
        )

    return scorer


def score(
    base, extended, tokens_BL: Int[Array, "B L"], positions_BL=None, segment_ids_BL=None, kl=False
) -> dict[str, np.ndarray]:
    """Scores texts with two `(config, params)` pairs; see `make_scorer` for what comes back (as numpy).

    Args:
        positions_BL: default 0..L-1.
        segment_ids_BL: default all 1: one document a row.

    Raises:
        UserError: no token to predict, token ids beyond the vocabulary, or different vocabularies.
    """
    (config_base, params_base), (config_extended, params_extended) = base, extended
    tokens_BL = np.asarray(tokens_BL)
    if tokens_BL.ndim != 2 or tokens_BL.shape[1] < 2:
        raise UserError(f"scoring: tokens have shape {tokens_BL.shape}; needed: [B, L] with L >= 2")
    scorer = make_scorer(config_base, config_extended, kl=kl)
    outside = (tokens_BL < 0) | (tokens_BL >= config_base.vocab_size)
    if outside.any():
        row, index = np.argwhere(outside)[0]
        raise UserError(
            f"scoring: token id {tokens_BL[row, index]} at row {row}, index {index}; "
            f"the model's vocabulary has ids 0 to {config_base.vocab_size - 1}"
        )
    if positions_BL is None:
        positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
    if segment_ids_BL is None:
        segment_ids_BL = np.ones_like(tokens_BL)
    inputs = [np.asarray(a, np.int32) for a in (tokens_BL, positions_BL, segment_ids_BL)]
    return jax.device_get(scorer(params_base, params_extended, *inputs))


def _token_stats(config, params, tokens_BL, positions_BL, segment_ids_BL, chunk):
    """The hidden states [B, L, D], and what `head.next_token_stats` says of the tokens but the first, [B, L-1]."""
    x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
    return x_BLD, next_token_stats(params, x_BLD, tokens_BL, chunk)
