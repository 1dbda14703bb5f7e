"""Training: the loss over micro-batches and shards, resuming, optimizers, and what a user gets wrong."""

import dataclasses
import importlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax import config as config_lib
from lrjax import sharding
from lrjax.checkpoints import orbax, streaming
from lrjax.checkpoints.orbax import StepCheckpoints
from lrjax.data.loader import Component
from lrjax.errors import UserError
from lrjax.longrecipe import merging
from lrjax.longrecipe.merge_settings import MergeRecipe
from lrjax.models import head
from lrjax.models.llama import Llama, LlamaConfig, init_params
from lrjax.preemption import Preempted
from lrjax.reporting.metrics import read_rows
from lrjax.training.loop import make_train_step, train
from lrjax.training.optimizer import make_optimizer, make_schedule
from lrjax.training.state import shardings_of, stochastic_round

CONFIG = LlamaConfig(
    vocab_size=40, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
    dtype="float32",
)  # fmt: skip
merge = importlib.import_module("lrjax.merge")  # `lrjax.merge` is the function
LENGTH = 12
MESH = {"fsdp": 1}


def section(**changes):
    defaults = {
        "steps": 6, "global_batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 2, "log_every": 1,
    }  # fmt: skip
    return config_lib.training(**{**defaults, **changes})


def batch(seed=0, size=8):
    """Uneven weights and two documents in each row, so that an average taken in the wrong place shows."""
    rng = np.random.default_rng(seed)
    segment_ids = np.repeat([[1, 2]], LENGTH // 2, axis=1).repeat(size, axis=0)
    return {
        "tokens": rng.integers(0, 40, (size, LENGTH)).astype(np.int32),
        "positions": np.sort(rng.integers(0, 99, (size, LENGTH)), axis=1).astype(np.int32),
        "segment_ids": segment_ids.astype(np.int32),
        "weights": (rng.random((size, LENGTH)) * np.arange(1, size + 1)[:, None]).astype(
            np.float32
        ),
    }


def one_step(mesh_sizes, micro_batches=1, optimizer="adamw"):
    mesh = sharding.make_mesh(mesh_sizes)
    with sharding.layout(mesh):
        params = init_params(CONFIG, jax.random.key(0), shardings_of)
        optimizer = make_optimizer(section(optimizer=optimizer))
        state = {"params": params, "opt_state": optimizer.init(params)}
        step = make_train_step(CONFIG, optimizer, micro_batches)
        return step(state, jax.device_put(batch(), sharding.batch_sharding(mesh)))


def test_loss_is_the_weighted_mean_over_the_global_batch():
    _, metrics = one_step(MESH)
    params, b = init_params(CONFIG, jax.random.key(0)), batch()
    x_BLD = Llama(CONFIG).apply({"params": params}, b["tokens"], b["positions"], b["segment_ids"])
    logprobs = jax.nn.log_softmax(head.logits(params, x_BLD))[:, :-1]
    ce = -np.take_along_axis(np.asarray(logprobs), b["tokens"][:, 1:, None], -1)[..., 0]
    weights = b["weights"][:, 1:]
    np.testing.assert_allclose(metrics["loss"], (weights * ce).sum() / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}],
)
def test_sharded_step_equals_single_device(sizes):
    state, metrics = one_step(sizes)
    expected_state, expected = one_step(MESH)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    jax.tree.map(
        # Adam divides by the root of the second moment, so a rounding of a tiny gradient is seen enlarged.
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        jax.device_get(state["params"]),
        jax.device_get(expected_state["params"]),
    )


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_nothing(micro_batches):
    _, metrics = one_step(MESH, micro_batches)
    _, expected = one_step(MESH)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_optimizers_lower_the_loss(optimizer):
    params = init_params(CONFIG, jax.random.key(0))
    update = make_optimizer(section(optimizer=optimizer, steps=30))
    state = {"params": params, "opt_state": update.init(params)}
    step = make_train_step(CONFIG, update, 1)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_muon_updates_matrices_and_adam_the_rest():
    """Muon's update of a matrix is orthogonal up to its scale; Adam's first one is a sign."""
    update = make_optimizer(section(optimizer="muon", weight_decay=0.0, clip_norm=0.0))
    params = init_params(CONFIG, jax.random.key(0))
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    updates, _ = update.update(grads, update.init(params), params)
    for layer in np.asarray(updates["layers"]["gate"]):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() / singular.min() < 2.5  # Newton-Schulz brings them near 1, not to it
    size = np.abs(updates["embedding"])
    np.testing.assert_allclose(size, size.mean(), rtol=1e-3)


def test_schedules():
    for name, last in (("constant", 1e-2), ("cosine", 0.0), ("linear", 0.0)):
        schedule = make_schedule(section(schedule=name, steps=10, warmup_steps=4))
        np.testing.assert_allclose(
            [schedule(0), schedule(3), schedule(4), schedule(10)],
            [2.5e-3, 1e-2 * (2.5 + 7.5 * 3 / 4) / 10, 1e-2, last], atol=1e-7,
        )  # fmt: skip


def example(record, rng):
    """Data drawn anew each epoch: resuming has to bring the same draws back."""
    tokens = (record["start"] + np.arange(LENGTH) * rng.integers(1, 3)) % 40
    return {
        "tokens": tokens.astype(np.int32),
        "positions": np.arange(LENGTH, dtype=np.int32),
        "segment_ids": np.ones(LENGTH, np.int32),
        "weights": np.ones(LENGTH, np.float32),
    }


def run_training(workdir, steps=6, mesh=None, **changes):
    source = [{"id": f"{start}", "start": start} for start in range(40)]
    return train(
        section(steps=steps, **changes), workdir, stage="extend",
        model=(CONFIG, init_params(CONFIG, jax.random.key(0))),
        components=[Component(source, example, 1.0)], seed=0, mesh=sharding.make_mesh(mesh or MESH), length=LENGTH,
    )  # fmt: skip


def test_ema_is_the_moving_average_of_the_steps(tmp_path):
    """The average of four steps, taken by hand from the steps that were kept."""
    kept = {"checkpoint_every": 1, "keep_checkpoints": 4}
    run_training(tmp_path / "steps", steps=4, **kept)
    averaged, _ = run_training(tmp_path / "ema", steps=4, ema_decay=0.5)
    expected = jax.device_get(init_params(CONFIG, jax.random.key(0)))
    for step in range(1, 5):
        source = streaming.open_source(described(tmp_path / "steps", step))
        found = read_tree(source, expected)
        expected = jax.tree.map(lambda mean, new: 0.5 * mean + 0.5 * new, expected, found)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), averaged, expected
    )
    merging.run(
        MergeRecipe("linear", merge.last_steps(tmp_path / "steps" / "checkpoints" / "extend", 3)),
        tmp_path / "mean",
    )
    _, mean = orbax.load_model(tmp_path / "mean")
    trees = [
        read_tree(streaming.open_source(described(tmp_path / "steps", step)), expected)
        for step in (2, 3, 4)
    ]
    jax.tree.map(
        lambda m, *each: np.testing.assert_allclose(m, sum(each) / 3, rtol=1e-5, atol=1e-7),
        mean, *trees,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"--last=5: .* has 4 steps"):
        merge.last_steps(tmp_path / "steps" / "checkpoints" / "extend", 5)


def described(workdir, step):
    """A step of the stage, whose model.json the recipe writes when the stage is done."""
    stage = workdir / "checkpoints" / "extend"
    content = {"config": dataclasses.asdict(CONFIG)}
    (stage / "model.json").write_text(json.dumps(content))
    return stage / "steps" / str(step)


def read_tree(source, like):
    def leaf(path, value):
        keys = [key.key for key in path]
        if keys[0] != "layers":
            return source.read(keys[0], 0, value.size).reshape(value.shape).copy()
        names = [f"layers/{layer}/{keys[1]}" for layer in range(len(value))]
        rows = [source.read(name, 0, value[0].size).copy() for name in names]
        return np.stack(rows).reshape(value.shape)

    return jax.tree.map_with_path(leaf, like)


class Killed(Exception):
    pass


def test_resumed_run_equals_uninterrupted(tmp_path, monkeypatch):
    """Stopped after step 5 of 8, the newest checkpoint being that of step 4.

    The average is part of the state: it is compared itself, the parameters by the metrics of the steps after.
    """
    whole, facts = run_training(tmp_path / "whole", steps=8, ema_decay=0.9)
    assert facts["tokens"] == 8 * 8 * LENGTH

    from lrjax.training import loop

    calls = []

    class Writer(loop.MetricWriter):
        def write(self, step, *args):
            super().write(step, *args)
            calls.append(step)
            if calls == [1, 2, 3, 4, 5]:
                raise Killed

    monkeypatch.setattr(loop, "MetricWriter", Writer)
    with pytest.raises(Killed):
        run_training(tmp_path / "stopped", steps=8, ema_decay=0.9)
    resumed, _ = run_training(tmp_path / "stopped", steps=8, ema_decay=0.9)
    assert calls[:5] == [1, 2, 3, 4, 5] and calls[5] in (3, 5)  # went on, did not start anew
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))
    read = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert read[0] == read[1]


def test_told_to_stop_it_saves_and_goes_on_on_another_mesh(tmp_path, monkeypatch):
    """SIGTERM in step 3, between checkpoints; then the same examples on four devices in place of two."""
    whole, _ = run_training(tmp_path / "whole", checkpoint_every=100)
    from lrjax.training import loop

    class Writer(loop.MetricWriter):
        def write(self, step, *args):
            super().write(step, *args)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "MetricWriter", Writer)
        with pytest.raises(Preempted, match="stopped and saved at step 3"):
            run_training(tmp_path / "run", mesh={"fsdp": 2}, checkpoint_every=100)
    resumed, _ = run_training(
        tmp_path / "run", mesh={"fsdp": 2, "context": 2}, checkpoint_every=100
    )
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(
        [row["loss"] for row in rows[1]], [row["loss"] for row in rows[0]], rtol=1e-4
    )
    jax.tree.map(  # as in test_sharded_step_equals_single_device, six steps on
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
        jax.device_get(resumed), jax.device_get(whole),
    )  # fmt: skip


def test_bfloat16_state_learns_like_float32(tmp_path):
    """Steps of 1e-3 on weights of 0.1 to 1 would be lost to plain rounding, and b2 = 0.999 would stand still."""
    exact, _ = run_training(tmp_path / "exact", learning_rate=1e-3, steps=6)
    params, _ = run_training(
        tmp_path / "half", learning_rate=1e-3, steps=6, state_dtype="bfloat16", offload=True
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    losses = [
        [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")]
        for name in ("exact", "half")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)
    start = init_params(CONFIG, jax.random.key(0))["embedding"]
    moved, expected = (np.asarray(p["embedding"], np.float32) - start for p in (params, exact))
    assert np.sum(moved * expected) > 0.8 * np.sum(expected * expected)


def test_stochastic_rounding_has_the_right_mean():
    x = jnp.full((64, 1024), 1.001)
    rounded = stochastic_round(x, 7).astype(jnp.float32)
    assert set(np.unique(rounded)) == {1.0, 1.0078125}
    np.testing.assert_allclose(rounded.mean(), 1.001, atol=1e-4)
    assert jnp.any(rounded != stochastic_round(x, 8).astype(jnp.float32))


def test_half_written_checkpoint_falls_back_and_says_so(tmp_path, caplog):
    state = {"params": jnp.arange(4.0)}
    checkpoints = StepCheckpoints(tmp_path / "steps")
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, state), next_example=step * 8)
        checkpoints.wait()
    checkpoints.close()
    (tmp_path / "steps" / "2" / "state" / "_METADATA").unlink()
    checkpoints = StepCheckpoints(tmp_path / "steps")
    step, restored, next_example = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    assert (step, next_example) == (1, 8)
    np.testing.assert_array_equal(restored["params"], jnp.arange(4.0) + 1)
    assert "checkpoint of step 2 is not whole" in caplog.text
    assert (tmp_path / "unreadable-step-2").is_dir()  # nothing is lost
    checkpoints.close()


def test_no_readable_checkpoint_is_an_error(tmp_path):
    state = {"params": jnp.arange(4.0)}
    checkpoints = StepCheckpoints(tmp_path / "steps")
    checkpoints.save(1, state, next_example=8)
    checkpoints.wait()
    checkpoints.close()
    (tmp_path / "steps" / "1" / "state" / "_METADATA").unlink()
    checkpoints = StepCheckpoints(tmp_path / "steps")
    with pytest.raises(UserError, match=r"none of the checkpoints of steps \[1\] can be read"):
        checkpoints.restore_latest(jax.eval_shape(lambda: state))
    checkpoints.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 6, "micro_batches": 4}, "global_batch_size 6 does not divide by 4"),
        ({"optimizer": "sgd"}, "optimizer 'sgd': allowed: adamw, muon, adafactor"),
        ({"schedule": "step"}, "schedule 'step': allowed: constant, cosine, linear"),
        ({"learning_rate": 1e30}, "is nan at step"),
        ({"ema_decay": 1.0}, r"ema_decay 1\.0: allowed: 0 \(off\) to below 1"),
    ],
)
def test_user_mistakes(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_training(tmp_path, **changes)


def test_mesh_mistakes():
    with pytest.raises(UserError, match="unknown axis 'rows'"):
        sharding.make_mesh({"rows": 2})
    with pytest.raises(UserError, match="needs 64 devices, this run has 8"):
        sharding.make_mesh({"fsdp": 64})
    with pytest.raises(UserError, match="8 devices do not divide by 3"):
        sharding.make_mesh({"fsdp": -1, "tensor": 3})
