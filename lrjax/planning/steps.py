"""The programs that a config runs, from shapes alone: train, full_length_train, score, prefill.

`lowered = STEPS[name](plan)` gives what can be compiled for devices that are not there. They are the same functions
that a run calls: `training.loop.make_train_step`, `longrecipe.scoring.make_scorer`, `models.llama.Llama` with a cache.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lrjax import config as config_lib
from lrjax import sharding
from lrjax.errors import UserError
from lrjax.evaluation.generate import PREFILL_CHUNK
from lrjax.longrecipe.scoring import make_scorer
from lrjax.models import COMPUTING
from lrjax.models.bits import ready
from lrjax.models.cache import init_cache
from lrjax.models.head import logits
from lrjax.models.llama import Llama, LlamaConfig, abstract_params
from lrjax.training.loop import check_batch, check_row, make_train_step
from lrjax.training.optimizer import make_optimizer
from lrjax.training.state import check_dtype, shardings_of, state_shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """A step, traced for a mesh, and what it works on."""

    traced: jax.stages.Traced
    model: LlamaConfig
    sequences: int
    length: int  # of a row, padding included
    tokens: int  # of training or scoring that it does
    forwards: int  # models that are run
    params: dict  # shapes and layouts
    opt_state: object = None


def model_of(config) -> LlamaConfig:
    """The extended model of a config, from its shape.

    Raises `UserError` for a config that does not say its shape, which its checkpoint would.
    """
    shape = dict(config.model.shape)
    if "vocab_size" not in shape:
        raise UserError(
            "config.model.shape: has no vocab_size; a plan needs the whole shape of the model"
        )
    model = LlamaConfig(**shape, **{name: config.model[name] for name in COMPUTING})
    theta = config_lib.extended_theta(config, model.rope_theta, model.head_dim)
    return dataclasses.replace(
        model, rope_theta=theta, max_position_embeddings=config.target_length
    )


def train(config, mesh, length: int) -> Program:
    """A step of config.extend with rows of `length` tokens; under the layout of `mesh`."""
    model, section = model_of(config), config.extend
    check_batch(section, mesh, "extend")
    check_dtype(section.state_dtype)
    row = check_row(model, length, config.row_multiple, "extend")
    optimizer = make_optimizer(section)
    params = _cast(abstract_params(model), section.state_dtype)
    shardings = state_shardings(optimizer, params, mesh, section.offload)
    state = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
    state = _laid_out(state, shardings)
    B = section.global_batch_size
    batch = {
        name: _array((B, row), dtype, sharding.batch_sharding(mesh, (B, row)))
        for name, dtype in (
            ("tokens", jnp.int32), ("positions", jnp.int32), ("segment_ids", jnp.int32), ("weights", jnp.float32),
        )
    }  # fmt: skip
    step = make_train_step(model, optimizer, section.micro_batches, shardings)
    return Program(
        step.trace(state, batch), model, B, row, B * length, 1, state["params"], state["opt_state"]
    )


def score(config, mesh) -> Program:
    """A batch of the scorer: two models, the whole samples."""
    model = dataclasses.replace(model_of(config), remat="none")
    length = config.score.length or config.data.source_length or config.target_length
    B = config.score.batch_size
    params = _for_reading(model, mesh)
    inputs = [_array((B, length), jnp.int32, sharding.batch_sharding(mesh, (B, length)))] * 3
    traced = make_scorer(model, model).trace(params, params, *inputs)
    return Program(traced, model, B, length, B * length, 2, params)


def prefill(config, mesh) -> Program:
    """One chunk of a prompt of the target length: `PREFILL_CHUNK` tokens onto a cache that is as good as full.

    As `generate.prefill` reads it; `reader.Reader`, which reads one row alone, takes twice as many tokens at a time.
    """
    model = dataclasses.replace(model_of(config), remat="none")
    params = _for_reading(model, mesh)
    here = sharding.current()
    axes = {
        "k": ("layers", "batch", "length", "kv_heads", None),
        "v": ("layers", "batch", "length", "kv_heads", None),
        "segment_ids": ("batch", "length"),
        "length": (),
    }
    with sharding.layout(None):
        cache = jax.eval_shape(lambda: init_cache(model, 1, config.target_length))
    cache = {
        name: _array(leaf.shape, leaf.dtype, here.sharding(axes[name], leaf.shape))
        for name, leaf in cache.items()
    }
    inputs = [_array((1, PREFILL_CHUNK), jnp.int32, sharding.replicated(mesh))] * 3

    def read(params, cache, tokens_BL, positions_BL, segment_ids_BL):
        x_BLD, cache = Llama(model).apply(
            {"params": params}, tokens_BL, positions_BL, segment_ids_BL, cache
        )
        return logits(params, x_BLD[:, -1:]), cache

    traced = jax.jit(read, donate_argnums=1).trace(params, cache, *inputs)
    return Program(traced, model, 1, PREFILL_CHUNK, PREFILL_CHUNK, 1, params)


def _for_reading(model, mesh):
    params = abstract_params(model)
    with sharding.layout(None):
        rounded = jax.eval_shape(lambda params: ready(model, params), params)
    return _laid_out(rounded, shardings_of(params, mesh))


def _cast(params, dtype):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params)


def _laid_out(tree, shardings):
    return jax.tree.map(lambda x, where: _array(x.shape, x.dtype, where), tree, shardings)


def _array(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
