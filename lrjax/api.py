"""The library in a notebook: `lrjax.load`, `lrjax.score`, `lrjax.merge`.

model = lrjax.load("smollm2")
model.logits(model.tokenizer.encode("Hello")[None])
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lrjax.checkpoints import huggingface, loading, orbax
from lrjax.checkpoints.card import model_card
from lrjax.data.tokenizers import check_ids, load_tokenizer
from lrjax.errors import UserError
from lrjax.evaluation.generate import generate
from lrjax.evaluation.questions import before_stop
from lrjax.longrecipe import merging, scoring
from lrjax.models import head
from lrjax.models.llama import Llama, LlamaConfig


def load(source, dtype: str = "float32") -> "Model":
    """Opens a checkpoint: an HF directory, a GGUF file, an lrjax model, the workdir of a run, or "smollm2".

    Args:
        source: the path.
        dtype: of the computation, float32 or bfloat16; parameters keep their own.

    Raises:
        UserError: nothing there that can be read.
    """
    config, params, tokenizer = loading.load(source)
    params = jax.tree.map(jnp.asarray, params)
    return Model(
        dataclasses.replace(config, dtype=dtype),
        params,
        None if tokenizer is None else load_tokenizer(tokenizer),
        str(source),
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to ask: its config, parameters and tokenizer (None where the checkpoint brought none)."""

    config: LlamaConfig
    params: dict
    tokenizer: object = None
    origin: str | None = None  # where it was read from, for the card of an export

    def logits(self, tokens_BL, positions_BL=None, segment_ids_BL=None) -> Float[Array, "B L V"]:
        """Next-token logits, float32. Positions default to the index, segment ids to one document."""
        return _logits(
            self.config, self.params, *self._inputs(tokens_BL, positions_BL, segment_ids_BL)
        )

    def token_logprobs(
        self, tokens_BL, positions_BL=None, segment_ids_BL=None
    ) -> Float[Array, "B L-1"]:
        """Log-probability of every token but the first given those before it; never holds [B, L, V]."""
        inputs = self._inputs(tokens_BL, positions_BL, segment_ids_BL)
        return _token_logprobs(self.config, self.params, *inputs)

    def generate(
        self, prompts, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, *,
        top_p: float = 1.0, stop: Sequence[str] = (),
    ):  # fmt: skip
        """Continues prompts: texts give texts, arrays of token ids give arrays of token ids.

        Answers to texts end before the first of the `stop` strings. Raises `UserError` for an empty prompt, ids
        beyond the vocabulary, or a text without a tokenizer.
        """
        texts = all(isinstance(prompt, str) for prompt in prompts)
        if texts and self.tokenizer is None:
            raise UserError("the checkpoint brought no tokenizer; allowed: prompts as token ids")
        ids = [self.tokenizer.encode(prompt) if texts else np.asarray(prompt) for prompt in prompts]

        def stopped(row) -> bool:
            text = self.tokenizer.decode(row)
            return any(word in text for word in stop)

        out = generate(
            self.config, self.params, ids, max_new_tokens, temperature=temperature, top_p=top_p,
            stop=stopped if texts and stop else None,
            eos_id=None if self.tokenizer is None else self.tokenizer.end_ids or None,
            rng=jax.random.key(seed),
        )  # fmt: skip
        return [before_stop(self.tokenizer.decode(row), stop) for row in out] if texts else out

    def save(self, path, format: str = "orbax") -> None:
        """Writes the model: "hf" (config.json, safetensors, tokenizer, model card) or "orbax" (an lrjax model)."""
        path = pathlib.Path(path)
        if format == "hf":
            card = model_card(self.config, self.origin)
            huggingface.save(path, self.config, self.params, self.tokenizer, card=card)
        elif format == "orbax":
            orbax.save_model(path, self.config, self.params)
        else:
            raise UserError(f"format {format!r}: allowed: hf, orbax")
        if self.tokenizer is not None and format == "orbax":
            self.tokenizer.save(path / "tokenizer")

    def _inputs(self, tokens_BL: Int[Array, "B L"], positions_BL, segment_ids_BL):
        tokens_BL = np.asarray(tokens_BL)
        if tokens_BL.ndim != 2:
            raise UserError(f"tokens have shape {tokens_BL.shape}; allowed: [B, L]")
        check_ids(tokens_BL.ravel(), self.config.vocab_size, "tokens")
        if positions_BL is None:
            positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if segment_ids_BL is None:
            segment_ids_BL = np.ones_like(tokens_BL)
        for name, array in (("positions", positions_BL), ("segment_ids", segment_ids_BL)):
            if np.shape(array) != tokens_BL.shape:
                raise UserError(
                    f"{name} have shape {np.shape(array)}, the tokens {tokens_BL.shape}"
                )
        return (
            tokens_BL,
            jnp.asarray(positions_BL, jnp.int32),
            jnp.asarray(segment_ids_BL, jnp.int32),
        )


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens_BL, positions_BL, segment_ids_BL):
    x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
    return head.logits(params, x_BLD)


@functools.partial(jax.jit, static_argnums=0)
def _token_logprobs(config, params, tokens_BL, positions_BL, segment_ids_BL):
    x_BLD = Llama(config).apply({"params": params}, tokens_BL, positions_BL, segment_ids_BL)
    return head.next_token_stats(params, x_BLD, tokens_BL)["logprob"]


def score(base: Model, extended: Model, tokens_BL) -> dict[str, Float[Array, "B L-1"]]:
    """Per-token change from `base` to `extended` on the same prefix: raw logit, centred logit, log-probability.

    The significance of the paper's eq. 3 before its sum over samples; see `lrjax.longrecipe.scoring`.
    """
    check_ids(np.ravel(tokens_BL), base.config.vocab_size, "tokens")
    return scoring.score(
        (base.config, base.params), (extended.config, extended.params), np.asarray(tokens_BL)
    )


merge = merging.merge
