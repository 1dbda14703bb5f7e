"""Training: one linear function, the same for pretraining, probe, extension and replay.

    params = train(config, workdir, stage="extend", model=(model_config, params), components=[...], seed=0)

`config` is a training section (see `lrjax.config.training`), `components` say where examples come from
(`lrjax.data.loader`). The state (parameters, optimizer, global example counter) is saved every
`checkpoint_every` steps; the same call goes on from there and gives, to the last digit, what an uninterrupted
run gives. Told to stop (`lrjax.preemption`), it saves the step it is at and raises `Preempted`.
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

from lrjax import preemption, sharding
from lrjax.checkpoints.orbax import StepCheckpoints
from lrjax.data.loader import make_loader
from lrjax.errors import UserError
from lrjax.models import context, head
from lrjax.models.flops import train_flops
from lrjax.models.llama import Llama, LlamaConfig
from lrjax.reporting.metrics import MetricWriter, Progress
from lrjax.training.optimizer import make_optimizer, make_schedule
from lrjax.training.state import apply_update, check_dtype, place, shardings_of, state_shardings


def train(
    config, workdir, *, stage, model, components, seed, mesh, length, row_multiple=1, hook=None, hook_every=0,
):  # fmt: skip
    """Trains a model and returns `(params, {"tokens", "flops"})`; with `ema_decay`, the average of its parameters.

    Laid out on `mesh` by the rules of the current layout (`lrjax.sharding`).

    Args:
        config: a training section (see `lrjax.config.training`).
        workdir: of the run; metrics and checkpoints go below it.
        stage: name of the stage in metrics and checkpoints.
        model: `(LlamaConfig, params)` to start from.
        components: `data.loader.Component`s, examples of `length` tokens.
        seed: of the order of the examples and their transforms.
        mesh: device mesh.
        length: tokens in an example.
        row_multiple: rows are padded to a multiple of it, with segment 0 and weight 0.
        hook: function(step, model_config, params) -> {name: value}, called every `hook_every` steps; its values
            become a row of the metrics. It gives the same when it is called again for a step.

    Raises:
        UserError: a batch or a length that the mesh cannot share out, a loss that is not finite.
        Preempted: after the state was saved.
    """
    with sharding.layout(mesh, dict(sharding.current().rules)):
        return _train(
            config, pathlib.Path(workdir), stage, model, components, seed, mesh, length, row_multiple,
            hook, hook_every,
        )  # fmt: skip


def _train(
    config, workdir, stage, model, components, seed, mesh, length, row_multiple, hook, hook_every
):
    model_config, params = model
    check_batch(config, mesh, stage)
    check_dtype(config.state_dtype)
    row_length = check_row(model_config, length, row_multiple, stage)

    # ------------------------------------------------------------------------------- state, sharded
    optimizer = make_optimizer(config)
    params = place(params, shardings_of(params, mesh), jnp.dtype(config.state_dtype))
    shardings = state_shardings(optimizer, params, mesh, config.offload)
    init = jax.jit(optimizer.init, out_shardings=shardings["opt_state"])
    state = {"params": params, "opt_state": init(params)}
    if config.ema_decay:
        # The average starts where the training does; a step gives its buffers back, so it needs its own.
        state["ema"], shardings["ema"] = jax.tree.map(jnp.copy, params), shardings["params"]
    step_fn = _train_step(model_config, config.to_json(), *_hashable(shardings))

    # ------------------------------------------------------------------------------- resume
    checkpoints = StepCheckpoints(
        workdir / "checkpoints" / stage / "steps", keep=max(config.keep_checkpoints, 2)
    )
    step, next_example = 0, 0
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    if (restored := checkpoints.restore_latest(abstract)) is not None:
        step, state, next_example = restored
        logging.info("%s: going on from step %d of %d", stage, step, config.steps)

    # ------------------------------------------------------------------------------- steps
    shape = (config.global_batch_size, row_length)
    where = sharding.batch_sharding(mesh, shape)
    rows, groups, group = sharding.own_rows(where, shape)
    batches = make_loader(
        components, seed=seed, global_batch_size=config.global_batch_size, start_example=next_example,
        process_index=group, process_count=groups,
    )  # fmt: skip

    def grown(local):
        """The batch of this step, its attention kept inside blocks while they grow."""
        block = block_length(config, step, length)
        if block < length:
            local["segment_ids"] = segments_of_blocks(local["segment_ids"], block)
        return local

    def to_device(local_bL):
        local_bL = np.pad(local_bL, ((0, 0), (0, row_length - length)))
        return jax.make_array_from_callback(
            shape, where, lambda index: local_bL[rows.index(index[0].indices(shape[0])[0]) :][
                : len(range(*index[0].indices(shape[0]))), index[1]
            ],
        )  # fmt: skip

    learning_rate = make_schedule(config)
    batch_tokens = config.global_batch_size * length
    since, since_step = time.perf_counter(), step
    with (
        MetricWriter(workdir, stage, resume_step=step) as writer,
        Progress(stage, config.steps, start=step) as progress,
        preemption.watch() as stop,
    ):
        while step < config.steps:
            batch = jax.tree.map(to_device, grown(next(batches)))
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
            if hook and step % hook_every == 0:
                begun = time.perf_counter()
                writer.write(step, hook(step, model_config, state["params"]), {})
                since += time.perf_counter() - begun  # no part of the training's speed
            told, last = stop.requested(), step == config.steps
            # The last step is the stage's model, but an average of the last ones wants it among them.
            if told or (config.keep_checkpoints if last else step % config.checkpoint_every == 0):
                checkpoints.save(step, state, next_example)
                if told:
                    checkpoints.wait()
                    checkpoints.close()
                    raise preemption.Preempted(f"{stage}: stopped and saved at step {step}")
    checkpoints.wait()
    checkpoints.close()
    return state["ema" if config.ema_decay else "params"], {
        "tokens": config.steps * batch_tokens,
        "flops": train_flops(model_config, config.steps * config.global_batch_size, length),
    }


def check_batch(config, mesh, stage) -> None:
    """Raises `UserError` unless the global batch divides over micro-batches and devices, and ema_decay averages."""
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"{stage}: ema_decay {config.ema_decay}: allowed: 0 (off) to below 1")
    if config.ema_decay and config.state_dtype != "float32":
        raise UserError(
            f"{stage}: ema_decay {config.ema_decay} with state_dtype {config.state_dtype!r}; allowed: float32, "
            "since an average of small steps is lost in fewer bits"
        )
    shards = sharding.batch_shards(mesh) * config.micro_batches
    if config.global_batch_size % shards:
        raise UserError(
            f"{stage}: global_batch_size {config.global_batch_size} does not divide by {shards} "
            f"(micro_batches {config.micro_batches} x {sharding.batch_shards(mesh)} batch shards of the mesh)"
        )


def block_length(config, step: int, length: int) -> int:
    """Tokens that attention sees together at a step (0, 1, ...): linearly from `grow_from` to all at half the steps."""
    if not config.grow_from or config.grow_from >= length:
        return length
    done = min(1.0, 2 * step / config.steps)
    return int(config.grow_from + done * (length - config.grow_from))


def segments_of_blocks(segment_ids_BL: np.ndarray, block: int) -> np.ndarray:
    """Segment ids that also part the row at every multiple of `block`; padding stays 0."""
    L = segment_ids_BL.shape[1]
    parted_BL = segment_ids_BL * L + np.arange(L, dtype=np.int32) // block
    return np.where(segment_ids_BL > 0, parted_BL, 0).astype(np.int32)


def check_row(model_config: LlamaConfig, length: int, row_multiple: int, stage: str) -> int:
    """The padded length of a row, or a `UserError` where the mesh cannot share it out."""
    row_length = -(-length // row_multiple) * row_multiple
    multiple = context.length_multiple(model_config.attention, model_config.context_parallel)
    if row_length % multiple:
        raise UserError(
            f"{stage}: rows of {row_length} tokens do not divide by {multiple} (config.mesh.context "
            f"{context.devices_along_length()} x whole blocks); allowed: config.row_multiple={multiple}"
        )
    if row_length > length:
        sharding.log_once("%s: rows of %d tokens are padded to %d", stage, length, row_length)
    return row_length


def _hashable(tree):
    leaves, structure = jax.tree.flatten(tree)
    return tuple(leaves), structure


@functools.lru_cache(maxsize=4)
def _train_step(model_config: LlamaConfig, section: str, shardings: tuple, tree):
    """`make_train_step`, compiled once for stages that train alike on different data."""
    section = ConfigDict(json.loads(section))
    return make_train_step(
        model_config,
        make_optimizer(section),
        section.micro_batches,
        jax.tree.unflatten(tree, shardings),
        section.ema_decay,
    )


def make_train_step(
    model_config: LlamaConfig, optimizer, micro_batches: int, state_shardings=None, ema_decay=0.0
):
    """The jitted step `(state, batch) -> (state, metrics)`; the state's buffers are reused.

    Args:
        state_shardings: of `lrjax.training.state`, to hold the new state where the old one lay; without it the compiler
            chooses.
        ema_decay: d > 0: the state has an "ema", which becomes d * ema + (1 - d) * params after every update.
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
        new_state = apply_update(optimizer, grads, state, on_device)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "loss_weight": total_weight,
        }
        if ema_decay:
            new_state["ema"] = optax.incremental_update(
                new_state["params"], state["ema"], 1 - ema_decay
            )
        return new_state, metrics

    on_device = None
    if state_shardings is not None and any(
        _is_offloaded(s) for s in jax.tree.leaves(state_shardings)
    ):
        on_device = jax.tree.map(
            lambda s: s.with_memory_kind("device"), state_shardings["opt_state"]
        )
    out_shardings = None if state_shardings is None else (state_shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def _is_offloaded(where) -> bool:
    return where.memory_kind == "pinned_host"
