"""Training: one linear function, the same for pretraining, probe, extension and replay.

    params = train(config, workdir, stage="extend", model=(model_config, params), components=[...], seed=0)

`config` is a training section (see `lrjax.config.training`), `components` say where examples come from
(`lrjax.data.loader`). The state (parameters, optimizer, global example counter) is saved every
`checkpoint_every` steps; the same call goes on from there and gives, to the last digit, what an uninterrupted
run gives.
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict

from lrjax import sharding
from lrjax.checkpoints.orbax import StepCheckpoints
from lrjax.data.loader import make_loader
from lrjax.errors import UserError
from lrjax.models import head
from lrjax.models.flops import train_flops
from lrjax.models.llama import Llama, LlamaConfig, logical_axes
from lrjax.reporting.metrics import MetricWriter, Progress
from lrjax.training.optimizer import make_optimizer, make_schedule


def train(config, workdir, *, stage, model, components, seed, mesh, length):
    """Trains a model and returns `(params, {"tokens", "flops"})`.

    Args:
        config: a training section: steps, global_batch_size, micro_batches, optimizer..., checkpoint_every, log_every.
        workdir: of the run; metrics and checkpoints go below it.
        stage: name of the stage in metrics and checkpoints.
        model: `(LlamaConfig, params)` to start from.
        components: `data.loader.Component`s, examples of `length` tokens.
        seed: of the order of the examples and their transforms.
        mesh: device mesh.
        length: tokens in an example.
    """
    workdir = pathlib.Path(workdir)
    model_config, params = model
    check_batch(config, mesh, stage)

    # ------------------------------------------------------------------------------- state, sharded
    optimizer = make_optimizer(config)
    param_shardings = shardings_of(params, mesh)
    params = jax.device_put(
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), param_shardings
    )
    init = jax.jit(optimizer.init, out_shardings=_optimizer_shardings(optimizer, params, mesh))
    state = {"params": params, "opt_state": init(params)}
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
    step_fn = _train_step(model_config, config.to_json(), tuple(leaves), tree)

    # ------------------------------------------------------------------------------- resume
    checkpoints = StepCheckpoints(workdir / "checkpoints" / stage / "steps")
    step, next_example = 0, 0
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    if (restored := checkpoints.restore_latest(abstract)) is not None:
        step, state, next_example = restored
        logging.info("%s: going on from step %d of %d", stage, step, config.steps)

    # ------------------------------------------------------------------------------- steps
    batches = make_loader(
        components, seed=seed, global_batch_size=config.global_batch_size, start_example=next_example,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    to_device = functools.partial(
        jax.make_array_from_process_local_data, sharding.batch_sharding(mesh)
    )
    learning_rate = make_schedule(config)
    batch_tokens = config.global_batch_size * length
    since, since_step = time.perf_counter(), step
    with (
        MetricWriter(workdir, stage, resume_step=step) as writer,
        Progress(stage, config.steps, start=step) as progress,
    ):
        while step < config.steps:
            batch = jax.tree.map(to_device, next(batches))
            state, metrics = step_fn(state, batch)
            step += 1
            next_example += config.global_batch_size
            if step % config.log_every == 0 or step == config.steps:
                metrics = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(metrics["loss"]):
                    raise UserError(
                        f"{stage}: the loss is {metrics['loss']} at step {step}; lower learning_rate "
                        f"({config.learning_rate}) or clip_norm ({config.clip_norm})"
                    )
                metrics["learning_rate"] = float(learning_rate(step - 1))
                now = time.perf_counter()
                speed = (step - since_step) * batch_tokens / (now - since)
                since, since_step = now, step
                writer.write(step, metrics, {"tokens_per_second": speed})
                progress.update(step, loss=metrics["loss"], tokens_per_second=speed)
            if step % config.checkpoint_every == 0 and step < config.steps:
                checkpoints.save(step, state, next_example)
    checkpoints.wait()
    checkpoints.close()
    return state["params"], {
        "tokens": config.steps * batch_tokens,
        "flops": train_flops(model_config, config.steps * config.global_batch_size, length),
    }


def check_batch(config, mesh, stage) -> None:
    """Raises `UserError` unless the global batch divides over micro-batches and devices."""
    shards = sharding.batch_shards(mesh) * config.micro_batches
    if config.global_batch_size % shards:
        raise UserError(
            f"{stage}: global_batch_size {config.global_batch_size} does not divide by {shards} "
            f"(micro_batches {config.micro_batches} x {sharding.batch_shards(mesh)} batch shards of the mesh)"
        )


def shardings_of(params, mesh):
    """Shardings for a parameter tree by the logical axes of its leaves."""
    return sharding.tree_shardings(logical_axes(params), mesh)


def _optimizer_shardings(optimizer, params, mesh):
    """An optimizer's moments lie as their parameters do; counters are everywhere."""

    def names(path):
        return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))

    known = {names(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

    def sharding_of(path, leaf):
        param = known.get(names(path))
        if param is not None and param.shape == leaf.shape:
            return param.sharding
        return sharding.replicated(mesh)

    return jax.tree.map_with_path(sharding_of, jax.eval_shape(optimizer.init, params))


@functools.lru_cache(maxsize=4)
def _train_step(model_config: LlamaConfig, section: str, shardings: tuple, tree):
    """`make_train_step`, compiled once for stages that train alike on different data."""
    section = ConfigDict(json.loads(section))
    return make_train_step(
        model_config,
        make_optimizer(section),
        section.micro_batches,
        jax.tree.unflatten(tree, shardings),
    )


def make_train_step(model_config: LlamaConfig, optimizer, micro_batches: int, state_shardings=None):
    """The jitted step `(state, batch) -> (state, metrics)`; the state's buffers are reused.

    `state_shardings` holds the new state where the old one lay; without it the compiler chooses.
    """
    model = Llama(model_config)

    def weighted_loss(params, micro):
        """Sum of w * ce over the predicted tokens of a micro-batch."""
        x_BLD = model.apply(
            {"params": params}, micro["tokens"], micro["positions"], micro["segment_ids"]
        )
        # Index t predicts token t + 1; weights are given for the token that is predicted.
        targets_BL = jnp.roll(micro["tokens"], -1, axis=1)
        weights_BL = jnp.roll(micro["weights"], -1, axis=1).at[:, -1].set(0.0)
        total, _ = head.weighted_cross_entropy(params, x_BLD, targets_BL, weights_BL)
        return total

    def train_step(state, batch):
        # The weight of the whole batch is known before the first micro-batch, so the gradient of
        # sum(w ce) / sum(w) is the plain sum over micro-batches and shards.
        total_weight = jnp.sum(batch["weights"][:, 1:])
        scale = 1.0 / jnp.maximum(total_weight, 1e-6)

        def scaled(params, micro):
            return weighted_loss(params, micro) * scale

        if micro_batches == 1:
            loss, grads = jax.value_and_grad(scaled)(state["params"], batch)
        else:
            # Micro-batch m takes every m-th example, so that each keeps a part of every shard.
            split = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch
            )

            def accumulate(carry, micro):
                new = jax.value_and_grad(scaled)(state["params"], micro)
                return jax.tree.map(jnp.add, carry, new), None

            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["params"]))
            (loss, grads), _ = jax.lax.scan(accumulate, zeros, split)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "loss_weight": total_weight,
        }
        return {"params": params, "opt_state": opt_state}, metrics

    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
